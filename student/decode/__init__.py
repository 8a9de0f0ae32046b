"""A student's answers under the automaton, and how likely it finds every value."""
