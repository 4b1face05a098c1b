"""The online path from shards to batches: plan, then fetch, encode, collate."""
