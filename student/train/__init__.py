"""`retort train`: objectives, the training loop, who shares the work, and the Ray Train job around it."""
