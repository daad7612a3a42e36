"""The registry of model families. A new family is one module here and one line below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.families.base import FamilySpec, Layers
from utils.families.bloom import BLOOM
from utils.families.chatglm import CHATGLM
from utils.families.chatglm2 import CHATGLM2
from utils.families.glm import GLM
from utils.families.gpt import GPT
from utils.families.gptj import GPTJ
from utils.families.llama import LLAMA
from utils.families.mistral import MISTRAL
from utils.families.opt import OPT
from utils.families.qwen import QWEN
from utils.families.qwen2 import QWEN2

FAMILIES: dict[str, FamilySpec] = {
    spec.name: spec for spec in (LLAMA, CHATGLM, CHATGLM2, BLOOM, GPT, OPT, GLM, QWEN, QWEN2, MISTRAL, GPTJ)
}

__all__ = ["FAMILIES", "FamilySpec", "Layers", "family_of"]


def family_of(config: Mapping[str, Any]) -> FamilySpec | None:
    """The family that a config.json (as a dict) belongs to, or None if none knows it."""
    return next((spec for spec in FAMILIES.values() if spec.matches(config)), None)
