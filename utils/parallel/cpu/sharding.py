"""What fleet's sharded optimizers need on a CPU: they ask for a GPU, and copy to it and back.

Nothing here changes what is computed. Stage 1 is `DygraphShardingOptimizer` (whole parameters per rank) or its
second version (slices of fused buffers), stages 2 and 3 are `group_sharded_parallel`.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import ModuleType
from typing import Any


class Standing:
    """A module with a few of its names replaced, for one user of it."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def sharded_optimizers() -> None:
    _fused_buffers()
    _stages_two_and_three()


def _fused_buffers() -> None:
    """Buffers that join parameters: fleet knows alignments (in bytes) of GPUs only, any is right here."""
    from paddle.distributed.fleet.utils import tensor_fusion_helper

    tensor_fusion_helper.alignment["cpu"] = 256
    setattr(tensor_fusion_helper, "__current_device_type__", "cpu")  # noqa: B010


def _stages_two_and_three() -> None:
    import paddle
    from paddle.base import core
    from paddle.distributed.fleet.meta_parallel.sharding import (
        group_sharded_optimizer_stage2,
        group_sharded_stage2,
        group_sharded_stage3,
        group_sharded_storage,
        group_sharded_utils,
    )
    from paddle.distributed.sharding import group_sharded

    def device() -> str:
        return "cpu:0"  # fleet reads the number behind the colon, which Paddle's "cpu" lacks

    numbered = Standing(paddle, get_device=device, device=Standing(paddle.device, get_device=device))
    modules: tuple[ModuleType, ...] = (
        group_sharded_optimizer_stage2,
        group_sharded_stage2,
        group_sharded_stage3,
        group_sharded_storage,
        group_sharded_utils,
    )
    replaced = {
        "paddle": numbered,
        # the constructors refuse a build without CUDA
        "core": Standing(core, is_compiled_with_cuda=lambda: True),
        # work is put aside to the CPU and back to the device: both are here
        "device_guard": lambda *_, **__: nullcontext(),
        "cvt_to_device": lambda tensor, *_, **__: tensor,
    }
    for module in modules:
        for name, value in replaced.items():
            if hasattr(module, name):
                setattr(module, name, value)
    # the entry refuses devices other than GPUs and plug-ins
    plugged = Standing(paddle.device, get_all_custom_device_type=lambda: ["cpu"])
    group_sharded.paddle = Standing(paddle, get_device=device, device=plugged)

    add = group_sharded_storage.ParamStorage.add_rank_params

    def add_rank_params(self: Any, parameters: Any, aligned: Any, convert_gpu: bool = True) -> None:
        """Not by way of `parameter.cpu()`: that is no copy here, and the parameter is cleared before it is read."""
        add(self, parameters, aligned, False)

    group_sharded_storage.ParamStorage.add_rank_params = add_rank_params
