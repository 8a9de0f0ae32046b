"""A student as an HTTP service: `retort serve`."""
