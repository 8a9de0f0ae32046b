"""Logit shards: their columns, their codec, and the manifest that makes them one data set."""
