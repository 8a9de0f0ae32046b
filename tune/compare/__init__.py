"""Students side by side: their runs in MLflow, grouped over seeds, as a table and a page."""
