"""Mistral 7B (Jiang et al. 2023, arXiv:2310.06825): LLaMA's architecture, attention reaches back a window.

The library's Mistral class gives tokens beyond the window weight; so this family is LLaMA's class, whose
mathematics are otherwise the same, with masks of our own. Files in the Paddle layout thus have LLaMA's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from utils.families import config as kinds
from utils.families.llama import Llama
from utils.settings import Table


class Mistral(Llama):
    name = "mistral"
    title = "Mistral"
    model_types = ("mistral",)
    architectures = ("MistralForCausalLM",)
    settings: ClassVar[Table] = {**Llama.settings, "sliding_window": kinds.WINDOW}
    published_names = (*Llama.published_names, "sliding_window")

    def window(self, config: Mapping[str, Any]) -> int | None:
        return config.get("sliding_window")


MISTRAL = Mistral()
