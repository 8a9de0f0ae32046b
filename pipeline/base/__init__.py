"""What every room stands on: errors, files, signals, the console, Ray, MLflow, strict configuration and plots."""
