"""The student as an MLflow model, and its place in the registry."""
