"""Where automatic mixed precision must not compute in half precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import paddle


def in_own_type(wanted: bool = True) -> AbstractContextManager[Any]:
    """A block in which operators compute in the types of their inputs.

    Autocast casts the inputs of every matrix product to half precision, also those that are float32 because their
    product does not fit: 65,504 is the largest float16.

    Args:
        wanted: False leaves everything as it is.
    """
    return paddle.amp.auto_cast(False) if wanted and paddle.in_dynamic_mode() else nullcontext()
