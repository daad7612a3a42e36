"""Which way computes the operators of a run, as far as it is decided at its start. No Paddle."""

from __future__ import annotations


def flash_attention(device: str, *, wanted: bool, plain_scores: bool) -> bool:
    """Whether a GPU's fused operators compute attention, of half precision and without dropout; else plain ones do.

    Args:
        plain_scores: they have no biases, and their type is that of queries and keys.
    """
    return wanted and plain_scores and device.startswith("gpu")


def described(device: str, dtype: str, *, flash: bool, dropout: float) -> str:
    """One line about all operators of a training.

    Args:
        dtype: the type to compute in.
        flash: see `flash_attention`.
        dropout: of attention weights.
    """
    half, on_gpu = dtype != "float32", device.startswith("gpu")
    products = f"in float32, rounded to {dtype}" if half and not on_gpu else "plain"
    attention = "flash" if flash and half and not dropout else "plain"
    return f"operators: matrix products {products}; attention {attention}; norms, rotation, MLP and loss plain"
