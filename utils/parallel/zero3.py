"""Sharding stage 3 (ZeRO-3, Rajbhandari et al. 2019, arXiv:1910.02054): every rank keeps a slice of each weight,
gradient and optimizer tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from utils.parallel.sharding import Accumulator, Share, device_kind
from utils.parallel.states import host

SLICE = "slice@"  # fleet's name of a slice begins with it
SLICED_TYPES = (paddle.float32, paddle.float16, paddle.bfloat16)
# Tables of positions, which some families read without calling their layer: as large as a fraction of a layer.
WHOLE_LAYERS = ("position_embeddings", "block_position_embeddings", "embed_positions")


class Zero3(Share):
    """Stage 3: a layer's weights are gathered when it is called and when its gradient is due.

    Vectors (norms, biases) stay whole on every rank, and what is no larger than the largest of them. All others are
    sliced, frozen ones too: a transformer layer has
    some ten vectors of the hidden size h, and matrices of 12 h^2 elements in all, so that whole vectors cost less
    than 1/h of the weights, and save more than half of the exchanges. Weights in other types than floats (quantized
    ones) stay whole, fleet cannot slice them.
    """

    stage = 3

    def __init__(
        self,
        model: nn.Layer,
        optimizer: Any,
        group: Any,
        borrowed: Mapping[nn.Layer, Sequence[Tensor]],
    ) -> None:
        from paddle.distributed.fleet.meta_parallel.sharding import group_sharded_stage3 as fleet

        super().__init__(model, optimizer, group)
        self.code = fleet
        for layer in model.sublayers(include_self=True):
            if getattr(layer, "extra_parameters", ()) is None:  # of a layer that has None for every name
                layer.extra_parameters = []
        for layer, parameters in borrowed.items():
            layer.extra_parameters = list(parameters)  # fleet's own name for them
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.trained.items()}
        self.fleet = fleet.GroupShardedStage3(
            model,
            optimizer,
            group,
            device=device_kind(),
            segment_size=max((p.size for p in model.parameters() if p.ndim < 2), default=0),  # of the largest vector
            pretrain_sync_models=False,
            # gathers wait for their end. Otherwise each layer gathers the next one of the first step's order, and
            # what was gathered for nothing (after a recomputation, another order in generation) is read as it was
            # before the update.
            sync_comm=True,
            exclude_layer=[id(layer) for layer in _unsliceable(model)],
        )
        self.fleet._world_size_scaling = 1.0  # sums
        self.optimizer = optimizer
        decays = optimizer._apply_decay_param_fun
        if decays is not None:  # it is asked by the names of slices
            optimizer._apply_decay_param_fun = lambda name: decays(name.removeprefix(SLICE))
        self.sliced = [p for p in model.parameters() if hasattr(p, "fw_storage")]
        self.frozen = [p for p in self.sliced if p.stop_gradient]
        self.vectors = [p for p in self.trained.values() if not hasattr(p, "fw_storage")]
        for parameter in self.vectors if self.rank else ():  # alike on all ranks
            parameter.counted = False
        self.gathered = False  # within `whole`
        self.silent: list[Tensor] = []  # parameters without a gradient in this step
        self._release_after_gradients(model)
        clear = optimizer.clear_grad

        def clear_grad(*_: Any, **__: Any) -> None:
            with self._without_silent():
                clear()

        optimizer.clear_grad = clear_grad

    # --- frozen weights ------------------------------------------------------------------------------

    def _release_after_gradients(self, model: nn.Layer) -> None:
        """Fleet lets go of a gathered weight when its gradient is there; frozen weights have none and would all
        stay gathered from the first backward pass on. Here their layer's input tells that its gradient is done."""
        frozen = {id(p) for p in self.frozen}
        for layer in model.sublayers(include_self=True):
            own = [p for p in self.code._current_layer_params(layer) if id(p) in frozen]
            if own:
                layer.register_forward_pre_hook(self._release_hook(own))
        model.register_forward_pre_hook(lambda *_: self._release_forgotten())

    def _release_hook(self, own: list[Tensor]) -> Callable[[Any, Any], Any]:
        def hook(layer: nn.Layer, inputs: tuple[Any, ...]) -> Any:
            if not inputs or not isinstance(inputs[0], Tensor) or inputs[0].stop_gradient:
                return None
            if not paddle.is_grad_enabled():
                return None
            return (_Watched.apply(inputs[0], lambda: self._release(own)), *inputs[1:])

        return hook

    def _release(self, parameters: Iterable[Tensor]) -> None:
        gathered = [p for p in parameters if p.status == "all"]
        self.code._release_param(gathered, self.fleet._param2buffer, self.rank, self.fleet._task_flow)

    def _release_forgotten(self) -> None:
        """Frozen weights of layers whose input has no gradient, such as the embedding."""
        if not self.gathered:
            forgotten = [p for p in self.frozen if p.status == "all"]
            for parameter in forgotten:
                parameter.use_count = 1
            self._release(forgotten)

    # --- gradients -----------------------------------------------------------------------------------

    @paddle.no_grad()
    def exchange(self) -> None:
        # Each backward pass has summed the gradients of whole weights and kept this rank's slices. This sums those
        # of the vectors, and gives the optimizer the slices.
        self._release_forgotten()
        trained = [p for p in self.trained.values() if hasattr(p, "fw_storage")]
        self.silent = [p for p in trained if p.bw_storage is None]
        with self._without_silent():
            self.optimizer.update_slice()
        self.optimizer.update_scaler = True  # `step` would do it again

    @contextmanager
    def _without_silent(self) -> Iterator[None]:
        """Fleet takes every parameter that needs a gradient for one that has one."""
        for parameter in self.silent:
            parameter.stop_gradient = True
        try:
            yield
        finally:
            for parameter in self.silent:
                parameter.stop_gradient = False

    def owned(self) -> list[tuple[Tensor, Tensor]]:
        silent = {id(p) for p in self.silent}
        sliced = [p for p in self.trained.values() if hasattr(p, "fw_storage") and id(p) not in silent]
        vectors = [(p, p.grad) for p in self.vectors if p.grad is not None]
        return [*((p, p.fw_storage.grad) for p in sliced), *vectors]

    # --- weights -------------------------------------------------------------------------------------

    @contextmanager
    def whole(self) -> Iterator[None]:
        before, self.gathered = self.gathered, True
        with paddle.no_grad():
            self._gather(self.sliced)
        try:
            yield
        finally:
            self.gathered = before
            with paddle.no_grad():
                self._keep_replaced()
                self._release(self.sliced)

    def _gather(self, parameters: Sequence[Tensor]) -> None:
        self.code._allgather_buffer(
            parameters,
            self.group,
            param2buffer_size=self.fleet._param2buffer_size,
            use_calc_stream=True,
            task_flow=self.fleet._task_flow,
            sync_wait=True,
        )

    def _keep_replaced(self) -> None:
        """Copies weights that were given other memory within `whole` to where slices are cut from."""
        for parameter in self.sliced:
            gathered, _ = self.fleet._task_flow.full_param[parameter.name]
            if gathered.data_ptr() != parameter.data_ptr():
                gathered[: parameter.size] = parameter.reshape([-1])

    # --- the optimizer's state -----------------------------------------------------------------------

    def _kept(self, name: str) -> tuple[str, Tensor] | None:
        parameter = self.trained[name]
        if not hasattr(parameter, "fw_storage"):
            return parameter.name, parameter
        return f"{SLICE}{parameter.name}", self._slice(parameter)

    def _slice(self, parameter: Tensor) -> Tensor:
        """This rank's slice of a weight, which fleet drops while the weight is whole."""
        if parameter.fw_storage is not None:
            return parameter.fw_storage
        start, end = self.fleet._param2buffer[parameter.name][self.rank]
        gathered, _ = self.fleet._task_flow.full_param[parameter.name]
        return gathered[start:end]

    def read(self, accumulator: Accumulator) -> np.ndarray:
        kept = self._kept(accumulator.parameter)
        assert kept is not None
        tensor = self.states.get(*kept, accumulator.name)
        parameter = self.trained[accumulator.parameter]
        if "pow" in accumulator.name or not hasattr(parameter, "fw_storage"):
            return host(tensor)
        size = self.fleet._param2buffer_size[parameter.name]
        gathered, task = self.code._all_gather(tensor, size, self.group)
        task.wait()
        count = int(np.prod(accumulator.shape))
        return host(gathered)[:count].reshape(accumulator.shape)

    def write(self, accumulator: Accumulator, value: np.ndarray) -> None:
        kept = self._kept(accumulator.parameter)
        assert kept is not None
        parameter = self.trained[accumulator.parameter]
        if "pow" not in accumulator.name and hasattr(parameter, "fw_storage"):
            start, end = self.fleet._param2buffer[parameter.name][self.rank]
            flat = value.reshape([-1])[start:end]
            value = np.concatenate([flat, np.zeros(end - start - flat.size, dtype=flat.dtype)])
        self.states.set(*kept, accumulator.name, value)


class _Watched(PyLayer):
    """A layer's input, unchanged; says when its gradient is complete."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, done: Callable[[], None]) -> Tensor:
        ctx.done = done
        same = paddle.empty([0], dtype=x.dtype)  # the same memory; `detach` would pass for a change in place
        same.get_tensor()._share_data_with(x.get_tensor())
        return same

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        ctx.done()
        return gradient


def _unsliceable(model: nn.Layer) -> Iterator[nn.Layer]:
    for name, layer in model.named_sublayers(include_self=True):
        own = layer.parameters(include_sublayers=False)
        if name.rpartition(".")[2] in WHOLE_LAYERS or any(p.dtype not in SLICED_TYPES for p in own):
            yield layer
