"""The teacher: its engines, each in a process of its own, and what is captured of its logits."""
