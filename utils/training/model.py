"""The model as the trainer sees it: a batch goes in, summed losses come out."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from utils.adapters.prefix import PrefixTuning
from utils.data.encode import IGNORED
from utils.families import FamilySpec
from utils.kernels.masks import packed


class TrainingModel(nn.Layer):
    """A causal language model, perhaps with an adapter, with its loss.

    Logits are computed at supervised positions only: with a vocabulary of 50,000 and a hidden size
    of 576 the head is a fifth of a small model's work, and two thirds of the positions are prompt.

    Attributes:
        base: the library's model; its Linear layers may be LoRA layers.
        prefix: the prefix encoder of prefix tuning, or None.
    """

    def __init__(
        self,
        family: FamilySpec,
        base: nn.Layer,
        *,
        prefix: PrefixTuning | None = None,
        neftune_alpha: float | None = None,
        inputs_need_gradient: bool = False,
    ) -> None:
        """
        Args:
            neftune_alpha: noise scale of NEFTune, None for none.
            inputs_need_gradient: recomputation needs it when the embedding is frozen: a recomputed
                block whose inputs have no gradient gives none to the adapter inside.
        """
        super().__init__()
        self.family, self.base, self.prefix = family, base, prefix
        self.config = base.config
        self.neftune_alpha = neftune_alpha
        self.inputs_need_gradient = inputs_need_gradient
        if prefix is not None:
            for parameter in base.parameters():
                parameter.stop_gradient = True
        embedding = attrgetter(f"{family.backbone}.{family.embedding}")(base)
        embedding.register_forward_post_hook(self._after_embedding)
        self.head = Head(family, base, embedding)

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

    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """Last hidden states [batch, length, hidden] of a collated batch."""
        if self.prefix is None:
            return self.family.forward_hidden(self.base, batch)
        ids = batch["input_ids"]
        if "segment_ends" in batch:
            batch = {**batch, "attention_mask": packed(batch["segment_ends"], self.prefix.length)}
        return self.family.forward_hidden(self.base, batch, self.prefix.cache(ids.shape[0]))

    def supervised(self, labels: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [targets, vocabulary] and labels [targets] of the supervised positions."""
        flat = labels.reshape([-1])
        positions = paddle.nonzero(flat != IGNORED).reshape([-1])
        hidden = self.hidden(inputs)
        hidden = hidden.reshape([-1, hidden.shape[-1]]).index_select(positions)
        return self.head(hidden), flat.index_select(positions)

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        """Sum of the losses (float32 scalar, in nats) over the targets of a batch.

        Args:
            labels: [batch, length] int64, already shifted; IGNORED where nothing is supervised.
            inputs: the other tensors of the collator.
        """
        logits, targets = self.supervised(labels, **inputs)
        if not targets.shape[0]:
            return logits.sum() * 0.0  # keeps the graph: a batch of cut prompts has no target
        return summed_loss(logits, targets)

    @paddle.no_grad()
    def score(self, labels: Tensor, **inputs: Tensor) -> tuple[float, int, int]:
        """(sum of losses, number of right greedy guesses, number of targets) of an evaluation batch."""
        logits, targets = self.supervised(labels, **inputs)
        if not targets.shape[0]:
            return 0.0, 0, 0
        loss = summed_loss(logits, targets)
        right = (logits.argmax(axis=-1) == targets).sum()
        return float(loss), int(right), int(targets.shape[0])


class Head(nn.Layer):
    """Logits [..., vocabulary] of hidden states [..., hidden], as a layer of its own that has no parameters.

    Families read the head's weight in ways of their own, a tied one from the embedding. Weights that are
    gathered when a layer is called (sharding stage 3) are there only if a layer is called.
    """

    def __init__(self, family: FamilySpec, base: nn.Layer, embedding: nn.Layer) -> None:
        super().__init__()
        self.parts = (family, base)  # a tuple, so that the model does not become a part of this layer
        words = getattr(embedding, "word_embeddings", embedding)  # some embed positions in the same layer
        rows = words.weight.shape[0]
        tables = [p for p in base.parameters() if p.ndim == 2 and rows in p.shape]
        self.borrowed: tuple[Tensor, ...] = tuple(tables[-1:])  # of an untied head, else of the embedding

    def forward(self, hidden: Tensor) -> Tensor:
        family, base = self.parts
        return family.logits(base, hidden)


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies (float32 scalar, in nats) of logits [n, vocabulary] at targets [n].

    Paddle's operator for CPUs answers NaN and infinite logits with a finite loss, in silence: the loss
    of a broken model would look like that of a guessing one. Here it is NaN.
    """
    logits = logits.astype("float32")
    loss = F.cross_entropy(logits, targets, reduction="sum")
    with paddle.no_grad():
        broken = paddle.matmul(logits, paddle.ones([logits.shape[-1], 1])).sum() * 0.0
    return loss + broken
