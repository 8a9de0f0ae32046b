"""From comments to logit shards: the task, the teacher, and the `retort` command."""
