"""`retort tune`, and chains of prunings: many trainings on the same shards, proposed, stopped early and compared."""
