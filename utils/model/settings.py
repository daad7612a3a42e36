"""What a run chooses about a model that its checkpoint does not decide. No Paddle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Settings:
    """
    Attributes:
        dtype: of weights and hidden states.
        use_flash_attention: whether a GPU's fused operators compute attention where they can.
        dropouts: what share training drops of "attention" (its weights), "hidden" (the outputs of attention and MLP)
            and "embedding"; what is not named is kept.
    """

    dtype: str = "float32"
    use_flash_attention: bool = False
    dropouts: Mapping[str, float] = field(default_factory=dict)
