"""Many students: searches, comparisons, and how the work scales. Imports `student` and `pipeline`."""
