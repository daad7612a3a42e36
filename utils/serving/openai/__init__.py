"""The API that OpenAI's clients speak, with the fields that vLLM and llama.cpp have added to it."""
