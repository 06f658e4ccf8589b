"""Where bytes live: stores, shards, receipts, seal, verify, open, catalog. No torch."""
