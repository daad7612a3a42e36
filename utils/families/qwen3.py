"""Qwen3 (Yang et al. 2025, arXiv:2505.09388): LLaMA's architecture, queries and keys are normalised by head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from utils.families.llama import Llama
from utils.families.qwen2 import Qwen2
from utils.model.architecture import ModelShape, Role
from utils.model.weights import Stored


class Qwen3(Qwen2):
    name = "qwen3"
    title = "Qwen3"
    model_types = ("qwen3",)
    architectures = ("Qwen3ForCausalLM",)
    backbone = "qwen3"
    stored = Stored({"qwen3": "model"})
    parts = replace(Llama.parts, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")

    def biased(self, config: Mapping[str, Any]) -> tuple[Role, ...]:
        return Llama.biased(self, config)

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        return super().shape({**config, "head_dim": config.get("head_dim") or 128})


QWEN3 = Qwen3()
