"""From logit shards to a small model: training, decoding, and the fidelity report."""
