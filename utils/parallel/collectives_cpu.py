"""What fleet needs and Paddle's CPU build over gloo lacks; nothing here acts on a build for GPUs.

`install` runs before the parallel environment starts. Each of `PARTS` adds what one kind of exchange or of
parallelism needs, and says why.
"""

from __future__ import annotations

from collections.abc import Callable

from utils.parallel.cpu.exchanges import whole_exchanges
from utils.parallel.cpu.operators import tensor_parallel_operators
from utils.parallel.cpu.pipeline import inputs_on_cpu, ordered_neighbours
from utils.parallel.cpu.sharding import sharded_optimizers
from utils.parallel.cpu.stores import private_stores

_installed = False


def install() -> bool:
    """Adds every missing part, once per process; returns whether this build needed any."""
    global _installed
    import paddle

    if paddle.is_compiled_with_cuda() or paddle.is_compiled_with_xpu():
        return False
    if not _installed:
        for part in PARTS:
            part()
        _installed = True
    return True


PARTS: tuple[Callable[[], None], ...] = (
    private_stores,
    whole_exchanges,
    tensor_parallel_operators,
    ordered_neighbours,
    inputs_on_cpu,
    sharded_optimizers,
)
