"""Comparing trainings: MLflow tracking."""
