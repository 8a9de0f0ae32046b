"""`retort grow`: a student that chooses which texts its teacher is asked about, until it may answer most of them alone."""
