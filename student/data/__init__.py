"""Shards as examples: unpacked to a local disk, split, and cut into batches."""
