"""`retort evaluate`: fidelity on test comments, calibration, the floors, and the report."""
