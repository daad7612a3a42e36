"""Fine-tuning: the trainer, what users see while it runs, and exact resume."""
