"""The tensors of an AdamW optimizer, parameter by parameter, under the names that optimizer files use."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from paddle.base.framework import EagerParamBase

HALF = (paddle.float16, paddle.bfloat16)
MASTER = "master"  # the float32 copy of a parameter in half precision
OF_MASTER = "fp32_master_0_"  # the names of other tensors begin with it where there is such a copy


class OptimizerStates:
    """Reads and fills an optimizer's tensors, which need not exist yet.

    Paddle's own `set_state_dict` wants all of them, by names that count how many the process has made.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.kinds = {
            f"{kind}_0": kind
            for kind in (
                optimizer._moment1_acc_str,
                optimizer._moment2_acc_str,
                optimizer._beta1_pow_acc_str,
                optimizer._beta2_pow_acc_str,
            )
        }

    def accumulators(self, dtype: Any) -> list[str]:
        """The names of a parameter's tensors in optimizer files."""
        if self.optimizer._multi_precision and dtype in HALF:
            return [MASTER, *(f"{OF_MASTER}{name}" for name in self.kinds)]
        return list(self.kinds)

    def own_accumulator(self, accumulator: str, dtype: Any) -> str | None:
        """What an accumulator of a file, perhaps of a run in another precision, is called here; None if it has no
        place."""
        plain = {name.removeprefix(OF_MASTER): name for name in self.accumulators(dtype)}
        return plain.get(accumulator.removeprefix(OF_MASTER))

    @paddle.no_grad()
    def _tensor(self, name: str, share: Tensor, accumulator: str) -> Tensor:
        """
        Args:
            name: the optimizer's name of a parameter or of a slice of it.
            share: the parameter or slice.
        """
        kept = EagerParamBase(shape=share.shape, dtype=share.dtype, name=name)  # name, shape and type are read
        if self.optimizer._multi_precision and share.dtype in HALF and name not in self.optimizer._master_weights:
            share._share_buffer_to(kept)
        self.optimizer._create_accumulators(paddle.static.default_main_program().global_block(), [kept])
        if accumulator == MASTER:
            return self.optimizer._master_weights[name]
        return self.optimizer._get_accumulator_master(self.kinds[accumulator.removeprefix(OF_MASTER)], kept)

    def get(self, name: str, share: Tensor, accumulator: str) -> Tensor:
        return self._tensor(name, share, accumulator)

    def set(self, name: str, share: Tensor, accumulator: str, value: np.ndarray) -> None:
        tensor = self._tensor(name, share, accumulator)
        tensor.set_value(np.ascontiguousarray(value, dtype=np.float32).reshape(tensor.shape))

    @paddle.no_grad()
    def take_weights(self, name: str, share: Tensor) -> None:
        """Makes the float32 copy that of the present weights, if there is one."""
        if name in self.optimizer._master_weights:
            paddle.assign(share.astype("float32"), self.optimizer._master_weights[name])


def host(tensor: Tensor) -> np.ndarray:
    """A copy of a float32 tensor; `numpy` may share memory on a CPU."""
    return np.array(tensor.numpy(), dtype=np.float32)
