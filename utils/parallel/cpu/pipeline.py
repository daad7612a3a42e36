"""Pipeline stages as neighbours over gloo, and the same inputs for all ranks of a tensor parallel group."""

from __future__ import annotations

from typing import Any


def ordered_neighbours() -> None:
    """Lets fleet's pipeline send whole tensors in an order in which no two stages wait for each other.

    A send over gloo ends when the partner receives. Fleet has an order for such devices, receive from the
    previous stage before sending to the next, but reads from the environment whether to use it. Sending
    each tensor in as many parts as there are tensor parallel ranks needs methods that gloo lacks.
    """
    from paddle.distributed.fleet.meta_parallel.pp_utils import p2p_communication

    p2p_communication._sync_send = True
    p2p_communication._is_valid_send_recv_partial = lambda tensor, ranks: False


def inputs_on_cpu() -> None:
    """Lets fleet's wrapper of tensor parallel models hand out inputs that are on a CPU, which it refuses."""
    import paddle
    from paddle.distributed import ParallelEnv
    from paddle.distributed.fleet.meta_parallel import tensor_parallel
    from paddle.distributed.fleet.utils import hybrid_parallel_util

    nested = hybrid_parallel_util._broadcast_nested_data

    def broadcast_input_data(hcg: Any, *inputs: Any, **named: Any) -> tuple[Any, Any]:
        """Fills the tensors in the inputs with those of the first rank of the group; returns (positional, named)."""
        nested(hcg, "cpu", paddle.CPUPlace(), inputs)
        nested(hcg, "cpu", paddle.CPUPlace(), named)
        return inputs, named

    for module in (hybrid_parallel_util, tensor_parallel):
        module.broadcast_input_data = broadcast_input_data
    # fleet reads the number of the device, which the launcher does not give without one
    ParallelEnv.device_id = property(lambda self: getattr(self, "_device_id", 0))
