"""What a model is, stated once: its facts, and what is computed from them."""
