"""Rotary frequencies (Su et al. 2021, arXiv:2104.09864) and their scalings for long contexts. No Paddle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.errors import UserError

SUPPORTED = ("linear", "llama3", "yarn")
OF_ANY_KIND = {"rope_theta", "partial_rotary_factor"}  # of an object that needs no rope_type


@dataclass(frozen=True)
class Frequencies:
    """What turns positions into angles.

    Attributes:
        inverse: float32 [head_dim / 2], radians per position.
        magnitude: what cos and sin are multiplied with (YaRN's attention factor), else 1.
    """

    inverse: NDArray[np.float32]
    magnitude: float = 1.0


def rope_scaling(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scaling of a config.json in the Hugging Face form ("rope_type", "factor", ...), or None.

    Understands `rope_scaling` with either spelling of its type, and Paddle's `rope_scaling_type` and
    `rope_scaling_factor`.

    Raises:
        UserError: a kind that is not computed here, or one whose numbers are missing.
    """
    scaling = config.get("rope_scaling")
    if not scaling:
        if not config.get("rope_scaling_type"):
            return None
        scaling = {"rope_type": config["rope_scaling_type"], "factor": config.get("rope_scaling_factor", 1.0)}
    if not isinstance(scaling, Mapping):
        raise UserError(f"config.json: rope_scaling is {scaling!r}; expected an object")
    apart = [name for name, value in scaling.items() if isinstance(value, Mapping)]
    if apart:
        raise UserError(
            f"config.json: rotary positions differ between kinds of layers ({', '.join(apart)}); not supported"
        )
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind is None and set(scaling) - OF_ANY_KIND:
        raise UserError(
            f"config.json: rope_type is missing beside {', '.join(sorted(set(scaling) - OF_ANY_KIND))} of the rotary "
            f"positions; add it (one of default, {', '.join(SUPPORTED)})"
        )
    if kind in (None, "default"):
        return None
    if kind not in SUPPORTED:
        raise UserError(
            f"config.json: rope_scaling of type {kind!r} is not supported (supported: {', '.join(SUPPORTED)}); "
            'set "rope_scaling": null there to use the model within its original context length'
        )
    if scaling.get("attn_factor") is not None and (kind != "yarn" or scaling.get("attention_factor") is not None):
        raise UserError(
            "config.json: attn_factor belongs to rope_scaling of type 'yarn' and stands for attention_factor there; "
            "remove one of them"
        )
    needed = {"llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    missing = [name for name in needed.get(kind, ("factor",)) if not isinstance(scaling.get(name), int | float)]
    if missing:
        raise UserError(f"config.json: rope_scaling of type {kind!r} needs the numbers {', '.join(missing)}")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(
            f"config.json: low_freq_factor {scaling['low_freq_factor']:g} must be below high_freq_factor "
            f"{scaling['high_freq_factor']:g} in rope_scaling of type 'llama3'"
        )
    if kind == "yarn" and _base(config) <= 1:
        raise UserError(
            f"config.json: rope_theta is {_base(config):g}; expected a number above 1 with rope_scaling of type 'yarn'"
        )
    return {**{name: value for name, value in scaling.items() if name not in ("type", "rope_theta")}, "rope_type": kind}


def _base(config: Mapping[str, Any]) -> float:
    return float(config.get("rope_theta") or 10000.0)


def frequencies(config: Mapping[str, Any], head_dim: int) -> Frequencies:
    """The frequencies of a model, in float64 until the end.

    Raises:
        UserError: see `rope_scaling`.
    """
    base = _base(config)
    plain = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    scaling = rope_scaling(config)
    if scaling is None:
        return Frequencies(plain.astype(np.float32))
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":  # position interpolation (Chen et al. 2023, arXiv:2306.15595)
        return Frequencies((plain / factor).astype(np.float32))
    if scaling["rope_type"] == "llama3":
        return Frequencies(_llama3(plain, scaling).astype(np.float32))
    positions = float(scaling.get("original_max_position_embeddings") or config.get("max_position_embeddings", 2048))
    return Frequencies(_yarn(plain, scaling, base, head_dim, positions).astype(np.float32), _yarn_magnitude(scaling))


def _llama3(plain: NDArray[np.float64], scaling: Mapping[str, Any]) -> NDArray[np.float64]:
    """Llama 3.1's scaling (Grattafiori et al. 2024, arXiv:2407.21783): slow rotations are slowed further."""
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = float(scaling["original_max_position_embeddings"]) * plain / (2 * math.pi)  # over the old context
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * plain + (1 - kept) * plain / float(scaling["factor"])


def _yarn(
    plain: NDArray[np.float64], scaling: Mapping[str, Any], base: float, head_dim: int, positions: float
) -> NDArray[np.float64]:
    """YaRN's "by parts" interpolation (Peng et al. 2023, arXiv:2309.00071, section 3.2)."""

    def dimension(turns: float) -> float:
        """The dimension that turns so often over the old context."""
        return head_dim * math.log(positions / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    slowed = np.clip((np.arange(head_dim // 2, dtype=np.float64) - low) / width, 0.0, 1.0)
    return slowed * plain / float(scaling["factor"]) + (1 - slowed) * plain


def _yarn_magnitude(scaling: Mapping[str, Any]) -> float:
    """YaRN's attention factor (section 3.4), as a factor of cos and sin.

    `attention_factor` is all of it, `attn_factor` (of the authors' own code) what it is multiplied with.
    """
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    own = float(scaling.get("attn_factor") or 1.0)

    def of(weight: float) -> float:
        factor = float(scaling["factor"])
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return own * of(scaling["mscale"]) / of(scaling["mscale_all_dim"])
    return own * of(1.0)
