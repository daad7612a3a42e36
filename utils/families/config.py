"""What config.json may say: the kinds of its values, and the sizes that belong together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from utils.settings import FLAG, TEXT, TEXTS, Kind, Table, list_of, number, typed, whole, whole_of

if TYPE_CHECKING:
    from utils.model.architecture import ModelShape

FILE = "config.json"
# Far above every model there is, and low enough that nothing is made of a mistyped number.
WIDTH = whole(1, 10_000_000)
LAYERS = whole(1, 10_000)
HEADS = whole(1, 100_000)
TOKENS = whole(1, 100_000_000)
POSITIONS = whole(1, 1_000_000_000)
WINDOW = whole(1, 1_000_000_000, null=True)  # null is none
EPSILON = number(0.0, 1.0, above=True)
SHARE = number(0.0, 1.0, below=True)
SCALE = number(0.0, 1e9, above=True)
SPREAD = number(0.0, 1e9)
ID = whole(0, 1_000_000_000)


def _id(value: Any) -> int:
    found = whole_of(value)
    if not -1 <= found <= 1_000_000_000:
        raise ValueError
    return found


IDS = list_of(_id, "the id of a token, a list of ids or null", null=True)  # -1 is how LLaMA 1 says none

# of families whose activation differs from model to model
ACTIVATIONS: Table = dict.fromkeys(("activation", "activation_function", "hidden_activation", "hidden_act"), TEXT)
# of every family
COMMON: Table = {
    "architectures": TEXTS,
    "vocab_size": TOKENS,
    "tie_word_embeddings": FLAG,
    "initializer_range": SPREAD,
    "bos_token_id": IDS,
    "eos_token_id": IDS,
    "pad_token_id": IDS,
    "tensor_parallel_degree": whole(1, 100_000),
    "quantization_config": {},
}
ROPE: Table = {
    "type": TEXT,
    "rope_type": TEXT,
    "rope_theta": SCALE,
    "factor": SCALE,
    "original_max_position_embeddings": POSITIONS,
    "low_freq_factor": SCALE,
    "high_freq_factor": SCALE,
    "beta_fast": SCALE,
    "beta_slow": SCALE,
    "mscale": SPREAD,
    "mscale_all_dim": SPREAD,
    "attention_factor": SCALE,
    "attn_factor": SCALE,
    "truncate": FLAG,
    "partial_rotary_factor": SCALE,
}


def read(table: Table, needed: tuple[str, ...], config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A config.json whose known values have their types; what is null is left out where null has no meaning.

    Args:
        table: of one family, beside `COMMON`.
        needed: keys without a default; "a/b" is either of two names.

    Returns:
        The configuration and its faults.
    """
    kinds: Table = {**COMMON, **table}
    known, faults = typed(kinds, config, FILE)
    for names in needed:
        either = names.split("/")
        if not any(config.get(name) is not None for name in either):
            kind = kinds[either[0]]
            expected = kind.expected if isinstance(kind, Kind) else "an object"
            faults.append(f"{FILE}: {' or '.join(either)} is missing; expected {expected}")
    return known, faults


def size_faults(shape: ModelShape, *, heads_apart: bool, multiple: int) -> list[str]:
    """Sizes that no model has together.

    Args:
        heads_apart: whether the width of a head is a number of its own.
        multiple: see `FamilySpec.head_multiple`.
    """
    faults = []
    if not heads_apart and shape.hidden % shape.heads:
        faults.append(f"{FILE}: a width of {shape.hidden} cannot be divided among {shape.heads} attention heads")
    elif shape.head_dim % multiple:
        faults.append(
            f"{FILE}: the width of an attention head is {shape.head_dim}; positions that turn it need a multiple "
            f"of {multiple}"
        )
    if shape.heads % shape.kv_heads:
        faults.append(f"{FILE}: {shape.heads} attention heads cannot share {shape.kv_heads} heads of keys and values")
    return faults


def activation_name(config: Mapping[str, Any], default: str) -> str:
    """The activation by its published name. In PaddleNLP's configurations "gelu" is the tanh form."""
    published = config.get("activation") or config.get("activation_function")
    if published:
        return str(published)
    name = config.get("hidden_activation") or config.get("hidden_act") or default
    return "gelu_new" if name == "gelu" else str(name)
