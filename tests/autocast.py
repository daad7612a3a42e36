"""What mixed precision does on a GPU, on a CPU: Paddle keeps its level there, and casts nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import paddle
from paddle import Tensor
from paddle.base import core
from paddle.base.framework import _dygraph_tracer


def half(x: Tensor) -> Tensor:
    """Rounded to float16: infinite above 65,504."""
    return x.astype("float16").astype("float32")


@contextmanager
def autocast() -> Iterator[None]:
    """float16 at O1: every matrix product is one of float16, unless autocast is off where it is computed."""
    tracer, product = _dygraph_tracer(), paddle.matmul

    def rounded(x: Tensor, y: Tensor, *options: Any, **named: Any) -> Tensor:
        if tracer._amp_level == core.AmpLevel.O0:
            return product(x, y, *options, **named)
        return half(product(half(x), half(y), *options, **named))

    before = tracer._amp_level, tracer._amp_dtype
    tracer._amp_level, tracer._amp_dtype = core.AmpLevel.O1, "float16"
    try:
        with mock.patch("paddle.matmul", rounded):
            yield
    finally:
        tracer._amp_level, tracer._amp_dtype = before
