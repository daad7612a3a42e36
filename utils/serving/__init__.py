"""Serving: an HTTP side that speaks with clients, and a process of its own for the model."""
