"""Comments from files, filtered, and cut into the numbered units of a plan."""
