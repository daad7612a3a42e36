"""Data of a run: read, check, template, tokenize, pack, collate. Nothing here loads Paddle on import."""
