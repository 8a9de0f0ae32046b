"""How extraction and training scale: measurements, the model fitted to them, and their page."""
