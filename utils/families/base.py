"""What a model family is: the facts and the few functions that truly differ between families.

A family is one subclass of `FamilySpec` in one module of this package, registered in
`utils.families`. Nothing outside this package asks which family it is dealing with.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from utils.families.tokenizers import Tokenizer


@dataclass(frozen=True)
class Weight:
    """How one tensor of the Hugging Face layout maps to one parameter of the Paddle model.

    Attributes:
        published: its name in published checkpoints.
        parameter: the name of the Paddle model's parameter.
        transpose: Paddle's Linear keeps [in, out] where PyTorch keeps [out, in].
        conv1d: the matrix of a Linear that is published as [in, out] too (GPT-2's Conv1D).
        part: (index, count): the parameter is one of `count` equal parts of the published tensor along
            its output axis, such as the query of a fused query, key and value.
    """

    published: str
    parameter: str
    transpose: bool = False
    conv1d: bool = False
    part: tuple[int, int] | None = None

    @property
    def is_linear(self) -> bool:
        """Whether the parameter is the matrix of a Linear layer."""
        return self.transpose or self.conv1d

    @property
    def output_axis(self) -> int:
        """The axis of the published tensor (matrix or bias) along which its parts lie."""
        return 0 if self.transpose else -1


def import_attribute(path: str) -> Any:
    """The object that "package.module:name" stands for; imported when asked, never earlier."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


class FamilySpec(ABC):
    """One family. Subclasses fill in the facts and override what differs.

    Attributes:
        name: the short name, also the folder of the JSON argument files.
        title: the name that users read.
        model_types: values of `model_type` in config.json that select the family.
        architectures: values in `architectures` of config.json that select it.
        config_class, model_class: "module:Class" of the library's classes.
        backbone: attribute of the model that holds the decoder without its head.
        head: attribute of the model that turns hidden states into logits.
        embedding: attribute of the backbone that embeds tokens (dots reach further inside).
        lora_targets: last name parts of the Linear layers that LoRA adapts by default.
        chat_template: Jinja text used when a checkpoint brings none; None joins source and target
            as they are (right for base models).
        tokenizer_files: names of the vocabulary files of a format that only this family has; the
            formats that several families share are known to `utils.families.tokenizers`.
    """

    name: str
    title: str
    model_types: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    config_class: str
    model_class: str
    backbone: str
    head: str = "lm_head"
    embedding: str = "embed_tokens"
    lora_targets: tuple[str, ...] = ()
    chat_template: str | None = None
    tokenizer_files: tuple[str, ...] = ()

    # --- selection and configuration -------------------------------------------------------------

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json (as a dict) describes a model of this family."""
        named = set(config.get("architectures") or ())
        return bool(named & set(self.architectures)) or config.get("model_type") in self.model_types

    def paddle_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of `config_class` from a config.json of either layout."""
        return dict(config)

    def published_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json in the Hugging Face layout from the model's configuration."""
        return dict(config)

    @abstractmethod
    def weights(self, config: Mapping[str, Any]) -> list[Weight]:
        """Every weight of the model, in layer order (embedding first, head last if untied)."""

    def ignored_weights(self) -> tuple[str, ...]:
        """Regular expressions of published tensors that hold no parameter (rotary caches, masks)."""
        return (r".*rotary_emb\.inv_freq$",)

    # --- sizes, for checks and estimates before any weights load ---------------------------------

    @abstractmethod
    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        """The sizes of a model of this family, from its config.json."""

    # --- the tokenizer ---------------------------------------------------------------------------

    def tokenizer(self, folder: Path, config: Mapping[str, Any]) -> Tokenizer | None:
        """The tokenizer of a checkpoint folder in this family's own format.

        Returns:
            None if the folder holds one of the formats that several families share, or none at all.

        Raises:
            UserError: the files are there but broken, or do not fit the model.
        """
        return None

    # --- the model -------------------------------------------------------------------------------

    def create(self, config: Mapping[str, Any], **overrides: Any) -> Any:
        """A `model_class` instance built from `config` (imports Paddle); weights are not loaded."""
        arguments = {**self.paddle_config(config), **overrides}
        return import_attribute(self.model_class)(import_attribute(self.config_class)(**arguments))

    @abstractmethod
    def forward_hidden(self, model: Any, batch: Mapping[str, Any], cache: Any = None) -> Any:
        """Last hidden states [batch, length, hidden], after the final norm, of a training batch.

        Args:
            model: the `model_class` instance (its Linears may be LoRA layers).
            batch: tensors of the collator: `input_ids` [batch, length] and, when packed,
                `position_ids` [batch, length] and `segment_ends` [batch, 1, length, 1] int32
                (for each key position the first query position that may no longer see it).
            cache: per-layer (key, value) of prefix tuning, or None. Then every position may also
                see the whole cache, and `attention_mask` [batch, 1, length, cached + length] is in
                `batch` when segments are packed.
        """

    def logits(self, model: Any, hidden: Any) -> Any:
        """Logits [..., vocabulary] of hidden states [..., hidden]."""
        return getattr(model, self.head)(hidden)

    @abstractmethod
    def step(
        self, model: Any, input_ids: Any, attention_mask: Any, position_ids: Any, cache: Any = None
    ) -> tuple[Any, Any]:
        """One inference forward of the library's model: prefill (cache None or a prefix) or decode.

        Args:
            input_ids: [batch, length] int64, left padded.
            attention_mask: [batch, cached + length] int64, 1 for real tokens.
            position_ids: [batch, length] int64.
            cache: what the previous call returned, `prefix_cache` of prefix tuning, or None.

        Returns:
            logits of the last position [batch, vocabulary], and the new cache.
        """

    @abstractmethod
    def prefix_cache(self, flat: Any) -> Any:
        """The cache of prefix tuning in the layout of the model.

        Args:
            flat: [batch, prefix, 2 * layers, kv_heads, head_dim]; keys of all layers, then values.
        """

    @abstractmethod
    def flatten_cache(self, cache: Any) -> Any:
        """The inverse of `prefix_cache`: [batch, length, 2 * layers, kv_heads, head_dim]."""

    @abstractmethod
    def cache_select(self, cache: Any, rows: Any) -> Any:
        """The cache of some rows of the batch; `rows` is an int64 tensor of row numbers."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder: counts of heads, layers, vocabulary; `positions` is None without a limit."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    positions: int | None
    tied: bool

    @property
    def parameters(self) -> int:
        """Number of weights, norms and biases left out (below 1 %)."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.vocabulary * self.hidden * (1 if self.tied else 2)
