"""What a model family is: the facts and the few functions that truly differ between families.

A family is one subclass of `FamilySpec` in one module of this package, with its instance beside it: so it is
found. Nothing outside this package asks which family it is dealing with.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from utils.errors import raise_if
from utils.families import config as kinds
from utils.families.text import Places, Text
from utils.model.architecture import Architecture, ModelShape
from utils.model.weights import Stored, Weight, weights
from utils.settings import Table

if TYPE_CHECKING:
    from utils.families.tokenizers import Tokenizer


Layers = list[tuple[Any, Any]]  # (key, value) tensors of every layer
# (layer, hidden, cached key, cached value) -> (hidden, key, value); hidden states are [batch, length, hidden],
# keys and values [batch, cached + length, kv_heads, head_dim], of this process's heads
LayerForward = Callable[[Any, Any, Any, Any], tuple[Any, Any, Any]]


@dataclass(frozen=True)
class Dropout:
    """A share of something that training drops.

    Attributes:
        of: what is dropped.
        name: the setting of `config_class`.
        default: the share where config.json says nothing.
    """

    of: Literal["attention", "hidden", "embedding"]
    name: str
    default: float = 0.0


@dataclass(frozen=True)
class Context:
    """What the layers of one batch need besides hidden states.

    It follows from the batch and the configuration alone, so whoever has only some of the layers works out
    the same from a copy of the batch.

    Attributes:
        ids: [batch, length] int64.
        positions: as the family's `embed` and `layer` take them; None if they take none.
        attend: the attention of all layers, with its mask and dropout; see `utils.kernels.masks.Attend`.
    """

    ids: Any
    positions: Any
    attend: Any


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
        settings: the kinds of the values of config.json, beside those of every family.
        needed: keys of config.json without a default; "a/b" is either of two names.
        head_width: keys of config.json that say how wide a head is; without, it is the width divided by the heads.
        head_multiple: what divides the width of a head: positions that turn it take dimensions in pairs.
        config_class, model_class: "module:Class" of the library's classes.
        backbone: attribute of the model that holds the decoder without its head.
        head: attribute of the model that holds its head.
        head_weight: path from the model to the weight of the head, or of the embedding that it is tied to.
        embedding: attribute of the backbone that embeds tokens (dots reach further inside).
        layers: attribute path from the model to the list of its transformer layers.
        stored: how files hold its parameters.
        dropouts: all of the model's.
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
    settings: ClassVar[Table] = {}
    needed: tuple[str, ...]
    head_width: tuple[str, ...] = ()
    head_multiple: int = 1
    config_class: str
    model_class: str
    backbone: str
    head: str = "lm_head"
    head_weight: str = "lm_head.weight"
    embedding: str = "embed_tokens"
    layers: str
    stored: Stored = Stored()
    dropouts: tuple[Dropout, ...] = ()
    lora_targets: tuple[str, ...] = ()
    chat_template: str | None = None
    tokenizer_files: tuple[str, ...] = ()

    # --- selection and configuration -------------------------------------------------------------

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json (as a dict) describes a model of this family."""
        named = config.get("architectures")
        listed = named if isinstance(named, list) else [named]
        return any(name in self.architectures for name in listed) or config.get("model_type") in self.model_types

    def read_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json of either layout with every value that decides the model in its own type.

        All other methods take what this returns.

        Raises:
            UserError: values of another kind, keys that are missing, or what this family does not compute.
        """
        known, faults = kinds.read(self.settings, self.needed, config)
        raise_if(faults)
        self.paddle_config(known)
        apart = any(name in known for name in self.head_width)
        raise_if(kinds.size_faults(self.shape(known), heads_apart=apart, multiple=self.head_multiple))
        return known

    def paddle_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of `config_class` from a config.json of either layout."""
        return dict(config)

    def published_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json in the Hugging Face layout from the model's configuration."""
        return dict(config)

    def dropout_rates(self, config: Mapping[str, Any]) -> dict[str, float]:
        """What training drops of what, by a config.json."""
        known = self.paddle_config(config)
        return {dropout.of: known.get(dropout.name, dropout.default) for dropout in self.dropouts}

    def weights(self, config: Mapping[str, Any]) -> list[Weight]:
        """Every weight of the model, in layer order (embedding first, head last if untied)."""
        return weights(self.architecture(config), self.stored)

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
        """A `model_class` instance built from `config` (imports Paddle); weights are not loaded.

        It has three attributes beside the library's:
            enable_recompute: whether training computes the activations inside of layers twice; the trainer
                sets it on every part of a model that has an attribute of this name.
            tensor_part: (rank, degree) of the process among those that share its heads.
            key_value_group: these processes where their number does not divide the key and value heads, so that
                each has all of them; else None.
        """
        arguments = {**self.paddle_config(config), **overrides}
        model = import_attribute(self.model_class)(import_attribute(self.config_class)(**arguments))
        model.enable_recompute, model.tensor_part, model.key_value_group = False, (0, 1), None
        return model

    # The forward pass in parts. None knows how many layers there are or how many heads a process has: hidden
    # states are whole everywhere, and heads are counted by the width of what a projection returns.

    def stack(self, model: Any) -> Any:
        """The list of the model's layers."""
        return attrgetter(self.layers)(model)

    @abstractmethod
    def context(self, model: Any, batch: Mapping[str, Any], cached: int) -> Context:
        """What all layers need to know of a training batch.

        Args:
            model: for its configuration and mode; no weights are read.
            batch: see `forward_hidden`.
            cached: number of prefix positions.
        """

    @abstractmethod
    def inference_context(self, model: Any, input_ids: Any, places: Places) -> Context:
        """As `context`, for new tokens [batch, length] at `places`."""

    @abstractmethod
    def embed(self, model: Any, context: Context) -> Any:
        """Hidden states [batch, length, hidden] as the first layer takes them."""

    @abstractmethod
    def layer(self, model: Any, context: Context) -> LayerForward:
        """The forward pass of any one layer; `model` is read for its configuration and mode only."""

    @abstractmethod
    def finish(self, model: Any, hidden: Any) -> Any:
        """What the head takes, [batch, length, hidden], from what the last layer gives."""

    def forward_hidden(self, model: Any, batch: Mapping[str, Any], cache: Layers | None = None) -> Any:
        """Last hidden states [batch, length, hidden], after the final norm, of a training batch.

        Args:
            model: the `model_class` instance (its Linears may be LoRA layers).
            batch: tensors of the collator: `input_ids` [batch, length] and, when packed,
                `position_ids` [batch, length] and `segment_ends` [batch, 1, length, 1] int32
                (for each key position the first query position that may no longer see it).
            cache: (key, value) of every layer of prefix tuning, each [batch, prefix, kv_heads, head_dim], or
                None. Every position sees all of it.
        """
        from utils.families.models.decoder import run_layers

        context = self.context(model, batch, 0 if cache is None else cache[0][0].shape[1])
        hidden, forward = self.embed(model, context), self.layer(model, context)
        return self.finish(
            model, run_layers(self.stack(model), hidden, cache, forward, recomputed=model.enable_recompute)
        )

    def logits(self, model: Any, hidden: Any) -> Any:
        """Logits [..., vocabulary] of hidden states [..., hidden]; this process's part of a shared vocabulary."""
        import paddle

        weight = attrgetter(self.head_weight)(model)
        return paddle.matmul(hidden, weight, transpose_y=self.head_by_rows(model))

    def head_by_rows(self, model: Any) -> bool:
        """Whether the head's weight is [vocabulary, hidden]; else it is [hidden, vocabulary]."""
        return True

    @abstractmethod
    def architecture(self, config: Mapping[str, Any]) -> Architecture:
        """What the model computes, for the generic decoder of `utils.inference`."""

    # --- generation ------------------------------------------------------------------------------

    def text(self, config: Mapping[str, Any], prompt: Sequence[int]) -> Text:
        """A text that begins with a prompt, as models of this family read it."""
        return Text(prompt)

    def window(self, config: Mapping[str, Any]) -> int | None:
        """How many tokens one sees, itself among them; None sees all before it."""
        return None

    def shares_heads(self, config: Mapping[str, Any]) -> bool:
        """Whether what a model keeps of a text's beginning is the same whatever follows."""
        return True
