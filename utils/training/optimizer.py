"""The optimizer of a run and the course of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import paddle
from paddle import nn
from paddle.optimizer import AdamW
from paddle.optimizer.lr import LambdaDecay

from utils.kernels.precision import HALF, on_cpu

if TYPE_CHECKING:
    from utils.arguments import RunArguments

OF_COPY = "_fp32_master"  # in the optimizer's names of float32 copies, behind the parameter's
POLYNOMIAL_END = 1e-7  # where the polynomial schedule (of power 1) ends without a rate of its own


def adamw(args: RunArguments, model: nn.Layer, schedule: LambdaDecay) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) whose weight decay is for matrices: norms and biases, of
    whatever name, are vectors.

    A trained parameter in half precision has a float32 copy, which is updated in its place.
    """
    matrices = {parameter.name for parameter in model.parameters() if parameter.ndim > 1}
    return _AdamW(
        schedule,
        beta1=args.adam_beta1,
        beta2=args.adam_beta2,
        epsilon=args.adam_epsilon,
        parameters=model.parameters(),
        weight_decay=args.weight_decay,
        apply_decay_param_fun=lambda name: name.partition(OF_COPY)[0] in matrices,
        multi_precision=True,
    )


class _AdamW(AdamW):
    """Paddle's operator, which knows no half precision on a CPU: there the float32 copy is updated, then rounded."""

    def _append_optimize_op(self, block: Any, param_and_grad: Any) -> Any:
        parameter, gradient = param_and_grad
        if parameter.dtype not in HALF or not on_cpu():
            return super()._append_optimize_op(block, param_and_grad)
        copy = self._master_weights[parameter.name]
        copy.optimize_attr = parameter.optimize_attr  # LoRA+ has two rates
        super()._append_optimize_op(block, (copy, gradient.astype("float32")))
        return paddle.assign(copy.astype(parameter.dtype), parameter)


def learning_rate(args: RunArguments, steps: int, last_rate: float = 0.0) -> LambdaDecay:
    """The learning rate of every optimizer step.

    Args:
        steps: of the whole run.
        last_rate: where it ends.
    """
    warmup = args.warmup_steps or int(args.warmup_ratio * steps)
    share = share_of(args.lr_scheduler_type, args.learning_rate, warmup, steps, last_rate)
    return LambdaDecay(args.learning_rate, share)


def share_of(kind: str, highest: float, warmup: int, steps: int, last_rate: float = 0.0) -> Callable[[int], float]:
    """A function step -> share of the highest rate, 0 to 1: warms up linearly, then goes down to `last_rate`.

    Args:
        kind: one of lr_scheduler_type.
        highest: the highest rate.
        warmup: steps of the warm-up, which "constant" leaves out.
        steps: of the whole run.
    """
    rest = max(1, steps - warmup)
    end = last_rate or POLYNOMIAL_END

    def lowered(step: int) -> float:
        done = (step - warmup) / rest
        if kind == "linear":
            return max(0.0, (steps - step) / rest)
        if kind == "cosine":
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
        if kind == "polynomial" and highest:
            return end / highest if step > steps else ((highest - end) * (1 - done) + end) / highest
        return 1.0

    def share(step: int) -> float:
        if step < warmup and kind != "constant":
            return step / max(1, warmup)
        if kind == "polynomial" or not last_rate:
            return lowered(step)
        floor = last_rate / highest
        return floor + (1.0 - floor) * lowered(step)

    return share
