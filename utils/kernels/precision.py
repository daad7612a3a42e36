"""In which type a matrix product is computed: automatic mixed precision, and half precision on CPUs.

Paddle's builds for CPUs have no matrix product in float16 or bfloat16, hardly another operator, and their autocast
casts nothing. There, a product of half precision is worked out from operands rounded to the half type, multiplied in
float32 and rounded again, and so are its gradients. What is kept between products stays float32. This takes longer
than float32 does: it is for tests and checks, which so run every switch that a run on a GPU has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any

import paddle
from paddle import Tensor

HALF = (paddle.float16, paddle.bfloat16)

_autocast: tuple[Any, str] | None = None  # (type, level) of the block that is running


def on_cpu() -> bool:
    """Whether operators run on a CPU."""
    # while a program is traced there is no place
    return not paddle.is_compiled_with_cuda() or bool(paddle.framework._current_expected_place().is_cpu_place())


def autocast(dtype: str, level: str = "O1") -> AbstractContextManager[Any]:
    """A block of a forward pass in mixed precision: each matrix product is one of `dtype`, whatever its operands are.

    Args:
        dtype: "float16" or "bfloat16"; "float32" changes nothing.
        level: "O1" or "O2" as Paddle calls them. They differ in what else runs in half precision on a GPU.
    """
    return nullcontext() if dtype == "float32" else _within(getattr(paddle, dtype), level)


def in_own_type(wanted: bool = True) -> AbstractContextManager[Any]:
    """A block in which operators compute in the types of their inputs.

    Autocast casts the inputs of every matrix product to half precision, also those that are float32 because their
    product does not fit: 65,504 is the largest float16.

    Args:
        wanted: False leaves everything as it is.
    """
    return _within(None, "O1") if wanted and paddle.in_dynamic_mode() else nullcontext()


@contextmanager
def _within(dtype: Any, level: str) -> Iterator[None]:
    global _autocast
    before, _autocast = _autocast, None if dtype is None else (dtype, level)
    try:
        with nullcontext() if on_cpu() else _of_paddle(dtype, level):
            yield
    finally:
        _autocast = before


def _of_paddle(dtype: Any, level: str) -> AbstractContextManager[Any]:
    if dtype is None:
        return paddle.amp.auto_cast(False)
    sums = {"reduce_sum", "c_softmax_with_cross_entropy"}
    tables = {"lookup_table", "lookup_table_v2"} if level == "O2" else set()  # which Paddle would compute in float32
    name = str(dtype).removeprefix("paddle.")
    return paddle.amp.auto_cast(True, custom_white_list=tables, custom_black_list=sums, level=level, dtype=name)


def under_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` in the mixed precision of now, whenever it is called: recomputation calls it outside of the block."""
    if _autocast is None:
        return function
    dtype, level = _autocast

    @wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        with _within(dtype, level):
            return function(*arguments, **named)

    return run


def activation_dtype(dtype: str) -> str:
    """The type of hidden states, keys and values in a model whose weights have a type."""
    return "float32" if dtype in ("float16", "bfloat16") and on_cpu() else dtype


def product_dtype(own: Any) -> Any:
    """The type in which a product with weights of a type is computed."""
    return own if _autocast is None else _autocast[0]


def is_half(dtype: Any) -> bool:
    """Whether a type of Paddle's is half precision. There is one object of each, and comparing two takes long."""
    return dtype is paddle.float16 or dtype is paddle.bfloat16


def cast(x: Tensor, dtype: Any) -> Tensor:
    """`x` as an operand of a product in a type, with a gradient. On a CPU values of a half type come as float32."""
    if is_half(dtype) and on_cpu():
        return (x if x.dtype is dtype else x.astype(dtype)).astype("float32")
    return x if x.dtype is dtype else x.astype(dtype)


def rounded_to(x: Tensor, y: Tensor) -> Any:
    """The half type that a product of two must be rounded to; None where Paddle computes it as it is to be."""
    if _autocast is None and not is_half(x.dtype) and not is_half(y.dtype):
        return None
    if not on_cpu():
        return None
    return _autocast[0] if _autocast is not None else next(one.dtype for one in (x, y) if is_half(one.dtype))


def matmul(x: Tensor, y: Tensor, transpose_y: bool = False) -> Tensor:
    """x @ y, or x @ yᵀ over the last two axes, in half precision where autocast or an operand says so."""
    half = rounded_to(x, y)
    if half is None:
        return paddle._C_ops.matmul(x, y, False, transpose_y)  # the public function costs more than a small product
    return cast(paddle.matmul(cast(x, half), cast(y, half), transpose_y=transpose_y), half)
