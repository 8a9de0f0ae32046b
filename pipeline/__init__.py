"""From texts to logit shards: the first of four packages, each of which imports only those before it."""
