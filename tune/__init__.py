"""Comparing trainings: MLflow tracking, and the best student as an MLflow model."""
