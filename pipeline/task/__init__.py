"""A task and what it compiles to: the teacher's tokenizer, the output automaton, and the watched tokens."""
