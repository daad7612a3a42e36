"""How much a client may ask for in one request. What is beyond gets a 4xx that names the field and the limit."""

from __future__ import annotations

BODY_BYTES = 4 * 2**20
HEADER_BYTES = 32 * 2**10
JSON_DEPTH = 64  # objects and lists in each other
NUMBER_DIGITS = 64  # of a whole number as it is written
MESSAGES = 1024  # rounds of a history, or messages of a conversation
ANSWERS = 64  # to all prompts of a request together
TOP_LOGPROBS = 20
STOP_CHARACTERS = 256  # of each text that ends an answer
NAMED_TOKENS = 1024  # that a request biases, or that end its answers
SCHEMA_BYTES = 64 * 2**10
INPUTS = 256  # texts to embed
