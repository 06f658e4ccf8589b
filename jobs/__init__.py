"""What runs models: corpora, tokenising, capture, blocks, build. Needs the extra `actcache[jobs]`."""
