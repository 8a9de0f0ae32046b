"""The student itself: its shape, its network, its folder, and Gemma 3 models read as one."""
