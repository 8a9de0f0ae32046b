"""From logit shards to a small model, and what it is put to. Imports `pipeline`."""
