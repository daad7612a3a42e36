"""The model as the trainer sees it: a batch goes in, summed losses come out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import paddle
from paddle import Tensor, nn

from utils.adapters.prefix import PrefixTuning
from utils.data.encode import IGNORED
from utils.families import FamilySpec
from utils.kernels import split
from utils.kernels.loss import summed_loss
from utils.model.decoder import Decoder
from utils.partition.stages import Part


class TrainingModel(nn.Layer):
    """A causal language model, perhaps with an adapter, with its loss.

    Logits are computed at supervised positions only: with a vocabulary of 50,000 and a hidden size
    of 576 the head is a fifth of a small model's work, and two thirds of the positions are prompt.

    Attributes:
        family: of the decoder.
        base: the decoder; its Linear layers may be LoRA layers.
        prefix: the prefix encoder of prefix tuning, or None.
    """

    def __init__(
        self,
        family: FamilySpec,
        base: Decoder,
        *,
        prefix: PrefixTuning | None = None,
        neftune_alpha: float | None = None,
        inputs_need_gradient: bool = False,
        vocabulary_group: Any = None,
        sequence: Any = None,
        stages: Any = None,
    ) -> None:
        """
        Args:
            neftune_alpha: noise scale of NEFTune, None for none.
            inputs_need_gradient: recomputation needs it when the embedding is frozen: a recomputed
                block whose inputs have no gradient gives none to the adapter inside.
            vocabulary_group: the tensor-parallel ranks that share the vocabulary of the head, or None.
            sequence: of sequence parallelism (`utils.partition.sequence.Sequence`), None without.
            stages: the pipeline's (`utils.partition.pipeline.Stages`), None without one. Every stage then hands
                a gradient on to the one before, also where the embedding is frozen.
        """
        super().__init__()
        self.family, self.base, self.prefix = family, base, prefix
        self.neftune_alpha = neftune_alpha
        self.inputs_need_gradient = inputs_need_gradient or stages is not None
        self.vocabulary_group, self.sequence, self.stages = vocabulary_group, sequence, stages
        self.layers = len(base.layers)
        if prefix is not None:
            for parameter in base.parameters():
                parameter.stop_gradient = True
        if stages is None or stages.parts[0].first:
            base.embedding.register_forward_post_hook(self._after_embedding)
        self.head = Head(base)

    @property
    def has_head(self) -> bool:
        """Whether this process has the head: not on the pipeline stages before the last."""
        return self.stages is None or bool(self.stages.last)

    def _after_embedding(self, layer: nn.Layer, inputs: Any, output: Tensor) -> Tensor:
        if not self.training:
            return output
        if self.neftune_alpha:
            # NEFTune (Jain et al. 2023, arXiv:2310.05914): uniform noise of norm alpha / sqrt(L d)
            bound = self.neftune_alpha / math.sqrt(output.shape[1] * output.shape[2])
            output = output + paddle.uniform(output.shape, dtype=output.dtype, min=-bound, max=bound)
        if self.inputs_need_gradient and output.stop_gradient:
            output = output.detach()
            output.stop_gradient = False
        return output

    def through(self, part: Part, batch: Mapping[str, Tensor], hidden: Tensor | None) -> Tensor:
        """Hidden states [batch, length, hidden] after some layers, behind the last ones after the final norm.

        Args:
            batch: of the collator, without labels.
            hidden: what the layer before gives; None before the first.
        """
        base, prefix = self.base, self.prefix
        context = base.context(batch, 0 if prefix is None else prefix.length)
        if hidden is None:
            hidden = base.embed(context)
            hidden = hidden if self.sequence is None else self.sequence.piece(hidden, base)
        known = None if prefix is None else prefix.cache(hidden.shape[0], part.layers)
        hidden = base.run(part.layers, hidden, context, known)
        if not part.last:
            return hidden
        return base.finish(hidden if self.sequence is None else self.sequence.whole(hidden, base))

    def travelling(self, batch: Mapping[str, Tensor]) -> int:
        """The length of the hidden states of a training batch between layers."""
        length = int(batch["input_ids"].shape[1])
        return length if self.sequence is None else length // int(self.sequence.group.nranks)

    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Last hidden states [batch, length, hidden] of a collated batch; None where only other stages have them."""
        if self.stages is None:
            return self.through(Part(range(self.layers), True, True), batch, None)
        return self.stages.passing(lambda part, hidden: self.through(part, batch, hidden))

    def supervised(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [targets, vocabulary] and labels [targets] of the supervised positions; [1, vocabulary] without any.

        Args:
            hidden: last hidden states [batch, length, hidden].
            labels: [batch, length] int64, already shifted; IGNORED where nothing is supervised.

        With a shared vocabulary the logits are this rank's part of it.
        """
        flat = labels.reshape([-1])
        positions = paddle.nonzero(flat != IGNORED).reshape([-1])
        # without targets one position goes through the head all the same: ranks exchange there, and not nothing
        chosen = positions if positions.shape[0] else paddle.zeros([1], dtype="int64")
        hidden = hidden.reshape([-1, hidden.shape[-1]]).index_select(chosen)
        hidden = split.for_parts(hidden, self.vocabulary_group)
        return self.head(hidden), flat.index_select(positions)

    def summed_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Sum of the losses (float32 scalar, in nats) of what `supervised` returned."""
        return summed_loss(logits, targets, self.vocabulary_group)

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Sum of the losses (float32 scalar, in nats) over the targets of a batch, see `supervised`."""
        logits, targets = self.supervised(hidden, labels)
        if not targets.shape[0]:
            return logits.astype("float32").sum() * 0.0  # keeps the graph: a batch of cut prompts has no target
        return self.summed_loss(logits, targets)

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        """The `loss` of a batch of the collator; not with pipeline stages, see `utils.training.steps`."""
        return self.loss(self.hidden(inputs), labels)

    @paddle.no_grad()
    def score(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        """Sum of losses, number of right greedy guesses and of targets of an evaluation batch: float64 [3].

        All are 0 on pipeline stages before the last.
        """
        hidden = self.hidden(inputs)
        if hidden is None:
            return paddle.zeros([3], dtype="float64")
        logits, targets = self.supervised(hidden, labels)
        if not targets.shape[0]:
            return paddle.zeros([3], dtype="float64")
        loss = self.summed_loss(logits, targets)
        if self.vocabulary_group is not None:
            logits = split.gathered(logits, self.vocabulary_group)
        right = (logits.argmax(axis=-1) == targets).sum()
        count = paddle.full([], targets.shape[0], dtype="float64")
        return paddle.stack([loss.astype("float64"), right.astype("float64"), count])


class Head(nn.Layer):
    """Logits [..., vocabulary] of hidden states [..., hidden], as a layer of its own that has no parameters.

    Weights that are gathered when a layer is called (sharding stage 3) are there only if a layer is called.
    """

    def __init__(self, base: Decoder) -> None:
        super().__init__()
        self.parts = (base,)  # a tuple, so that the model does not become a part of this layer

    @property
    def borrowed(self) -> list[Tensor]:
        """The weight that this layer reads and another one has."""
        return [self.parts[0].head_weight]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.parts[0].logits(hidden)
