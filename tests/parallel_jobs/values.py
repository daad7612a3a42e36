"""What the checks of `collectives.py` and `training.py` compute with, and how they compare."""

from __future__ import annotations

from typing import Any

import numpy as np

WORDS, WIDTH, ROWS = 12, 6, 5
_random = np.random.default_rng(7)


def numbers(*shape: int) -> np.ndarray:
    """float32, the same on all ranks."""
    return _random.normal(size=shape).astype("float32")


def leaf(values: np.ndarray) -> Any:
    import paddle

    return paddle.to_tensor(values, stop_gradient=False)


def close(found: Any, wanted: Any, what: str) -> None:
    found = found.astype("float32").numpy() if hasattr(found, "stop_gradient") else found
    wanted = wanted.astype("float32").numpy() if hasattr(wanted, "stop_gradient") else wanted
    np.testing.assert_allclose(found, wanted, atol=1e-6, rtol=1e-6, err_msg=what)
