"""`retort extract` and `retort score`: units of comments through teacher actors to shards."""
