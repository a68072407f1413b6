"""From shards to batches, by DALI."""
