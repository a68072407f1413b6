"""From images to shards, by Ray."""
