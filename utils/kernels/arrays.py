"""Arrays of NumPy as tensors.

Paddle's own ways, `to_tensor` and `from_dlpack`, lose some 100 bytes of memory each time, which adds up to gigabytes in
a server that makes hundreds of tensors a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor


def copied(values: NDArray[Any] | Sequence[int]) -> Tensor:
    """A tensor on the current device with the shape (of at least one dimension), type and values of an array; a list of
    integers becomes int64."""
    array = np.asarray(values, dtype=None if isinstance(values, np.ndarray) else np.int64)
    place = paddle.framework._current_expected_place()
    if not place.is_cpu_place():
        return paddle.to_tensor(array)
    tensor = paddle.empty(array.shape, dtype=str(array.dtype))
    tensor.get_tensor().set(array, place)
    return tensor


def shared(array: NDArray[Any]) -> Tensor:
    """A tensor in the memory of a contiguous array, on the CPU: what is written into one is in the other."""
    tensor = paddle.empty([0], dtype=str(array.dtype))
    tensor.get_tensor().set(array, paddle.CPUPlace(), True)
    return tensor


def fixed(tensor: Tensor) -> Tensor:
    """A tensor as a parameter that is not trained: the tracer of static programs takes no other for a constant."""
    return paddle.base.framework.EagerParamBase.from_tensor(tensor, trainable=False)
