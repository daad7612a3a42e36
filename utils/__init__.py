"""LLM toolchain for PaddlePaddle: the package that the per-stage scripts share.

Importing this package, `utils.arguments` or `utils.families` loads no Paddle, so that `--help` and
argument errors answer at once.
"""
