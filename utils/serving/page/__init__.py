"""The chat page: a process of its own, `python -m utils.serving.page`, that speaks HTTP with the server."""
