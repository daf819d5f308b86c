"""Data files and images behind `s3://` addresses, through a cache of this host (docs/storage.md).

`service` asks the store, `cache` keeps what it gave, `objects` is what the rest of the suite calls. The packages of the
extra "storage" are imported when the first address is read.
"""
