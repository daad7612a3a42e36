"""Quantization after training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from utils.arguments.fields import Arguments, arg


@dataclass
class QuantArguments(Arguments):
    """Quantization after training."""

    group: ClassVar[str] = "Quantization (not part of this version yet)"

    quant_type: str = arg(
        "A8W8",
        "bits of activations and weights",
        choices=("A8W8", "WINT4", "WINT8"),
        needs=["do_ptq", "do_gptq"],
    )
    do_ptq: bool = arg(False, "quantize after training (PTQ)")
    ptq_step: int = arg(32, "calibration batches", minimum=1, unit="batches", needs=["do_ptq"])
    shift: bool = arg(False, "shift activations before PTQ; needs do_ptq")
    shift_all_linear: bool = arg(False, "shift before every Linear, at the cost of two operators", needs=["shift"])
    shift_sampler: str = arg(
        "none",
        "zero points from minimum and maximum, or their moving average",
        choices=("none", "ema"),
        needs=["shift"],
    )
    shift_step: int = arg(32, "batches that shift looks at", minimum=1, unit="batches", needs=["shift"])
    smooth: bool = arg(False, "smooth activations before PTQ (SmoothQuant); needs do_ptq")
    smooth_all_linears: bool = arg(False, "smooth before every Linear, at the cost of two operators", needs=["smooth"])
    smooth_sampler: str = arg(
        "none",
        "multi_step keeps several batches, in more memory",
        choices=("none", "multi_step"),
        needs=["smooth"],
    )
    smooth_step: int = arg(32, "batches that smooth looks at", minimum=1, unit="batches", needs=["smooth"])
    smooth_piecewise_search: bool = arg(
        False, "search the strength piece by piece of the activations", needs=["smooth"]
    )
    smooth_k_piece: int = arg(
        3, "number of pieces; 3 suits 10B models, 6 suits 100B", minimum=1, needs=["smooth_piecewise_search"]
    )
    smooth_search_piece: bool = arg(
        False, "search the number of pieces too, which takes long", needs=["smooth_piecewise_search"]
    )
    do_gptq: bool = arg(False, "quantize weights to 4 bits by GPTQ: slower, more exact")
    gptq_step: int = arg(8, "calibration batches", minimum=1, unit="batches", needs=["do_gptq"])
