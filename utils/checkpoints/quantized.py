"""Weights that another tool has quantized: recognised before they are read, and refused with what to do instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

ADVICE = (
    "quantized weights are not read here; take the unquantized model that they were made from, or turn them back "
    "into float16 or bfloat16 with the tool that made them"
)
_TITLES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8 (FBGEMM)",
    "compressed-tensors": "compressed-tensors",
    "mxfp4": "MXFP4",
}
# In which keys configurations keep what their tool has done: transformers, older compressed-tensors, MLX.
_PLACES = ("quantization_config", "compression_config", "quantization")
_PADDLE = ("weight_quantize_algo", "quant_type")  # null in what PaddleNLP writes beside ordinary weights
_BITS = ("bits", "w_bit", "weight_bits", "quantization_bit")
# How tensors end that only quantized weights have.
_ENDINGS = (
    *(".qweight", ".qzeros", ".g_idx", ".scales", ".SCB", ".absmax", ".quant_map", ".nested_absmax", ".weight_format"),
    *(".quant_scale", ".weight_scale", ".weight_scale_inv", ".weight_packed", ".weight_shape", ".weight_zero_point"),
    *(".input_scale", ".input_activations_scale"),
)


def method_of(config: Mapping[str, Any]) -> str | None:
    """How the weights of a config.json were quantized, as users know it, or None."""
    for place in _PLACES:
        found = config.get(place)
        if isinstance(found, Mapping) and (method := _method(found)) is not None:
            return f"by {method} ({place})"
    bits = config.get("quantization_bit")  # of ChatGLM's own int4 and int8 folders
    return f"to {bits} bits (quantization_bit)" if isinstance(bits, int) and bits > 0 else None


def _method(settings: Mapping[str, Any]) -> str | None:
    named = settings.get("quant_method") or settings.get("quant_algo")
    if named:
        return _TITLES.get(str(named).lower(), str(named))
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return _TITLES["bitsandbytes"]
    paddle = next((settings[name] for name in _PADDLE if settings.get(name)), None)
    if paddle is not None:
        return f"PaddleNLP ({paddle})"
    return "an unnamed method" if any(settings.get(name) for name in _BITS) else None


def of_quantized(names: Iterable[str]) -> list[str]:
    """The names of tensors that only quantized weights have."""
    return [name for name in names if name.endswith(_ENDINGS) or ".quant_state." in name]
