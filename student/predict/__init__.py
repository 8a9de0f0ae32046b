"""`retort predict`: files of comments to files of answers, and the teacher for the unsure ones."""
