"""What a model family is: the facts and the few functions that truly differ between families.

A family is one subclass of `FamilySpec` in one module of this package, with its instance beside it: so it is
found. Nothing outside this package asks which family it is dealing with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from utils.errors import raise_if
from utils.families import config as kinds
from utils.families.text import Text
from utils.model.architecture import Architecture, ModelShape
from utils.model.weights import Stored, Weight, weights
from utils.settings import Table

if TYPE_CHECKING:
    from utils.families.tokenizers import Tokenizer


@dataclass(frozen=True)
class Dropout:
    """A share of something that training drops.

    Attributes:
        of: what is dropped.
        name: the setting in the Paddle layout's config.json.
        default: the share where config.json says nothing.
    """

    of: Literal["attention", "hidden", "embedding"]
    name: str
    default: float = 0.0


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
        stored: how files hold its parameters.
        dropouts: all of the model's.
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
    stored: Stored = Stored()
    dropouts: tuple[Dropout, ...] = ()
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
        """A config.json in the Paddle layout from one of either."""
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

    @abstractmethod
    def architecture(self, config: Mapping[str, Any]) -> Architecture:
        """What the model computes."""

    # --- generation ------------------------------------------------------------------------------

    def text(self, config: Mapping[str, Any], prompt: Sequence[int]) -> Text:
        """A text that begins with a prompt, as models of this family read it."""
        return Text(prompt)

    def window(self, config: Mapping[str, Any]) -> int | None:
        """How many tokens one sees, itself among them; None sees all before it."""
        return None

    def shares_prefixes(self, config: Mapping[str, Any]) -> bool:
        """Whether what a model keeps of a text's beginning is the same whatever follows."""
        return True
