"""Searching for a student, comparing students, and MLflow, which keeps them."""
