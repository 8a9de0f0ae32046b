"""Students cut from trained models: what matters in them, what is kept, and chains of ever smaller ones."""
