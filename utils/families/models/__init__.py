"""PaddleNLP's model classes with our own forward pass, where theirs is wrong for what we need. Imports Paddle."""
