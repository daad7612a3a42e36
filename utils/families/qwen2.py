"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv:2407.10671): LLaMA's architecture with biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from utils.errors import UserError
from utils.families import config as kinds
from utils.families.llama import Llama
from utils.model.architecture import Role
from utils.model.weights import Stored
from utils.settings import FLAG, TEXTS, Table, whole


class Qwen2(Llama):
    name = "qwen2"
    title = "Qwen2"
    model_types = ("qwen2",)
    architectures = ("Qwen2ForCausalLM",)
    settings: ClassVar[Table] = {
        **Llama.settings,
        "use_sliding_window": FLAG,
        "sliding_window": kinds.WINDOW,
        "max_window_layers": whole(0, 10_000),
        "layer_types": TEXTS,
    }
    backbone = "qwen2"
    stored = Stored({"qwen2": "model"})
    chat_template = (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    published_names = (*Llama.published_names, "use_sliding_window", "sliding_window", "max_window_layers")

    def biased(self, config: Mapping[str, Any]) -> tuple[Role, ...]:
        return ("query_key_value",)

    def window(self, config: Mapping[str, Any]) -> int | None:
        if not config.get("use_sliding_window"):
            return None
        layers = config["num_hidden_layers"]
        full = min(config.get("max_window_layers", 28), layers)  # that many at the bottom see everything
        kinds = config.get("layer_types") or ["full_attention"] * full + ["sliding_attention"] * (layers - full)
        if set(kinds) == {"full_attention"}:
            return None
        if set(kinds) != {"sliding_attention"}:
            raise UserError(
                "config.json: use_sliding_window on some layers only (max_window_layers, layer_types) is not "
                "supported; set use_sliding_window false there for texts shorter than the window"
            )
        return config.get("sliding_window", 4096)

    def paddle_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        known = super().paddle_config(config)
        self.window(known)  # refuses what is not supported
        return known


QWEN2 = Qwen2()
