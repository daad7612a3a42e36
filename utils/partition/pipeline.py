"""Pipeline parallelism: each stage holds some layers of the model and hands hidden states on.

One way for all families and methods: fleet's pipeline is given functions that compute parts of the model, not
layers of its own, so parameters keep their names and files their layout. Only hidden states travel. Every
stage reads the same rows and works out masks and positions from them by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import paddle
import paddle.distributed as dist
from paddle import Tensor, nn
from paddle.distributed import fleet
from paddle.distributed.fleet.meta_parallel import (
    PipelineLayer,
    PipelineParallel,
    PipelineParallelWithInterleave,
)
from paddle.distributed.fleet.meta_parallel.pp_utils import p2p_communication

from utils.kernels.precision import in_own_type
from utils.model.decoder import Decoder
from utils.model.plain import PlainDecoder
from utils.parallel.process_group import STEP_SECONDS, ProcessGroup
from utils.parallel.topology import Layout
from utils.partition.parts import Parts
from utils.partition.stages import Part, all_parts, own_parts

Batch = Mapping[str, Tensor]


class Divided(Protocol):
    """A model that computes parts of its layers."""

    def through(self, part: Part, batch: Batch, hidden: Tensor | None) -> Tensor:
        """Hidden states [batch, length, hidden] after a part; `hidden` None is the embedding's own."""

    def travelling(self, batch: Batch) -> int:
        """The length of the hidden states of a batch between layers."""

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Sum of the losses (scalar) of what the last part gives."""


# --- the model of a stage ------------------------------------------------------------------------------


def keep_own(model: nn.Layer, elsewhere: Collection[str]) -> None:
    """Takes out of a model what only other stages have: layers with no parameter left, and parameters.

    The others keep their names; a list of layers keeps its length.

    Args:
        elsewhere: names of parameters.
    """
    gone = {id(parameter) for name, parameter in model.named_parameters() if name in elsewhere}
    for layer in model.sublayers(include_self=True):
        for name, child in layer._sub_layers.items():
            if child is not None and (found := child.parameters()) and all(id(one) in gone for one in found):
                layer._sub_layers[name] = nn.Layer()
        for kind, parameter in layer._parameters.items():
            if id(parameter) in gone:
                layer._parameters[kind] = None


def mark_tied(parameter: Any, layout: Layout) -> None:
    """Marks this stage's copy of the embedding that is also the head; see `utils.training.gradients`."""
    parameter.summed_over = ("ends",)
    parameter.counted = layout.coordinates(layout.rank)[1] == 0


# --- forward passes ------------------------------------------------------------------------------------


class Stages:
    """The stages of one pipeline, for passes without gradients.

    A stage begins with the next batch as soon as it has handed one on, so the passes over several batches
    overlap by themselves.

    Attributes:
        parts: this stage's, in the order of a pass.
    """

    def __init__(self, layout: Layout, layers: int) -> None:
        self.layout, self.parts = layout, own_parts(layout, layers)
        self._count = layers
        self._neighbours: Any = None

    @property
    def layers(self) -> list[int]:
        """The numbers of this stage's layers, in their order."""
        return [number for part in self.parts for number in part.layers]

    @property
    def last(self) -> bool:
        """Whether this stage has the head."""
        return self.parts[-1].last

    def passing(self, compute: Callable[[Part, Tensor | None], Tensor]) -> Tensor | None:
        """What the last part gives; None on all but the last stage.

        Args:
            compute: (part, hidden states before it, None for the first) -> hidden states after it.
        """
        if self.layout.pipeline == 1:
            return compute(self.parts[0], None)
        if self._neighbours is None:
            p2p_communication.initialize_p2p_groups(fleet.get_hybrid_communicate_group(), False)
            self._neighbours = p2p_communication.P2pHelper(use_cache=False)
        hidden = None
        for part in self.parts:
            hidden = compute(part, self._neighbours.recv_forward(part.first))
            self._neighbours.send_forward(hidden, part.last)
        return hidden if self.last else None

    def complete(self, own: Tensor) -> Tensor:
        """Keys and values of all layers in turn [2 * layers, ...], on every stage, from those of this stage's."""
        every = paddle.zeros([self._count, 2, *own.shape[1:]], dtype=own.dtype)
        for place, number in enumerate(self.layers):
            every[number] = own[2 * place : 2 * place + 2]
        dist.all_reduce(every, group=_group())
        return every.reshape([-1, *own.shape[1:]])

    def from_last(self, value: Tensor | None, shape: Sequence[int], dtype: str) -> Tensor:
        """A tensor of the last stage, on every stage."""
        group = _group()
        found = paddle.empty(list(shape), dtype=dtype) if value is None else value.astype(dtype).contiguous()
        dist.broadcast(found, group.ranks[-1], group=group)
        return found


def _group() -> Any:
    return fleet.get_hybrid_communicate_group().get_pipe_parallel_group()


class StageDecoder(PlainDecoder):
    """A stage of a model as a step over the cache of its own layers; every stage comes to the same logits."""

    def __init__(self, model: Decoder, stages: Stages, parts: Parts | None, group: Any) -> None:
        super().__init__(model, parts=parts, group=group, layers=stages.layers)
        self.stages = stages

    def states(self, given: Mapping[str, Tensor], cache: Sequence[Tensor]) -> Tensor:
        """See the base class. They count on the last stage only."""
        step = self.begin(given, cache)

        def compute(part: Part, hidden: Tensor | None) -> Tensor:
            hidden = step.layers(part.layers, step.embed() if hidden is None else hidden)
            return step.finish(hidden) if part.last else hidden

        states = self.stages.passing(compute)
        return paddle.zeros([given["chosen"].shape[0], 1]) if states is None else states

    def logits(self, states: Tensor) -> Tensor:
        logits = super().logits(states) if self.stages.last else None
        return self.stages.from_last(logits, [states.shape[0], self.architecture.shape.vocabulary], "float32")


# --- training ------------------------------------------------------------------------------------------


class _Interleaved(PipelineParallelWithInterleave):
    """Fleet's schedule for virtual stages, which it refuses to two stages.

    Its exchanges suit two as well: they come in the same order on both sides. The number of micro-batches is
    checked with the arguments.
    """

    def _check_sanity(self) -> None:
        pass


class Schedule:
    """The micro-batches of a step through all stages and back: 1F1B, interleaved with virtual stages.

    Micro-batches may have different lengths. Hidden states are padded to the longest only to travel: fleet's
    schedules want one shape for all messages of a step.

    Args:
        layers: of the whole model.
        micro_batches: of a step.
    """

    def __init__(self, model: Divided, layers: int, micro_batches: int, processes: ProcessGroup) -> None:
        self.model, self.processes, layout = model, processes, processes.layout
        self._batches: Sequence[Batch] = ()
        self._scale = 1.0
        self._begun: dict[Part, int] = {}  # how many micro-batches of the step have entered a part
        self._losses = 0
        hybrid = fleet.get_hybrid_communicate_group()
        strategy = fleet.DistributedStrategy()
        strategy.hybrid_configs = {
            "pp_configs": {
                "delay_scale_loss": True,  # else losses are divided by the number of micro-batches
                "clear_every_step_cache": True,  # of the shape of messages
                # interleaved messages in one batch have an order in which gloo's senders wait in a ring
                "use_batch_p2p_comm": layout.virtual == 1,
            }
        }
        strategy.pipeline_configs = {
            "accumulate_steps": micro_batches,
            "micro_batch_size": 1,
            "enable_partial_send_recv": False,
        }
        pipeline = PipelineLayer(
            layers=[self._computing(part) for part in all_parts(layout, layers)],
            topology=hybrid.topology(),
            loss_fn=self._loss,
            seg_method="layer:compute",  # one to each part
            num_virtual_pipeline_stages=layout.virtual if layout.virtual > 1 else None,
        )
        kind = _Interleaved if layout.virtual > 1 else PipelineParallel
        self._fleet = kind(pipeline, hybrid, strategy)

    def run(self, batches: Sequence[Batch], scale: float) -> list[Tensor]:
        """Adds the gradients of a step's micro-batches; returns their losses, the same on all stages.

        Args:
            batches: with `labels`.
            scale: losses are divided by it for their gradients.
        """
        self._batches, self._scale, self._begun, self._losses = batches, scale, {}, 0
        self._length = max(map(self.model.travelling, batches))
        self.processes.barrier("waiting for the other pipeline stages", STEP_SECONDS)
        self._fleet.set_virtual_pipeline_rank(0)
        nothing = iter([(None, None)] * len(batches))  # the parts find their batches themselves
        losses = self._fleet.forward_backward_pipeline(nothing, None, return_micro_batch_loss=True)
        self._batches = ()
        with in_own_type():  # a sum of losses may be none of float16
            return list(losses * scale)

    def _computing(self, part: Part) -> Callable[[Tensor | None], Tensor]:
        def compute(hidden: Tensor | None) -> Tensor:
            number = self._begun.get(part, 0)
            self._begun[part] = number + 1
            batch = {name: value for name, value in self._batches[number].items() if name != "labels"}
            length = self.model.travelling(batch)
            if hidden is not None:
                hidden = hidden[:, :length]
            hidden = self.model.through(part, batch, hidden)
            if not part.last and length < self._length:
                batch_size, _, width = hidden.shape
                rest = paddle.zeros([batch_size, self._length - length, width], dtype=hidden.dtype)
                hidden = paddle.concat([hidden, rest], axis=1)
            return hidden

        return compute

    def _loss(self, hidden: Tensor, _: None) -> Tensor:
        labels = self._batches[self._losses]["labels"]
        self._losses += 1
        loss = self.model.loss(hidden, labels)
        with in_own_type():
            return loss / self._scale
