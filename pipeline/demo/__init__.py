"""A task with nothing from outside: comments written by rules and a small teacher fitted to their labels."""
