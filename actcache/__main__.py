"""`python -m actcache` is the command line too."""

from actcache.clients.cli import main

main()
