"""`retort plan`: hours, bytes and money of a run before it is paid for. Pure arithmetic: no Ray, no GPU, no network."""
