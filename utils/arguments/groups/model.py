"""Which model, and what is trained of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from utils.arguments.fields import Arguments, arg
from utils.arguments.groups.common import MODEL_HELP


@dataclass
class ModelArguments(Arguments):
    """Which model."""

    group: ClassVar[str] = "Model"

    model_name_or_path: str | None = arg(None, MODEL_HELP, path=True)
    tokenizer_name_or_path: str | None = arg(None, "tokenizer, if it is not the model's own", path=True)
    use_flash_attention: bool = arg(False, "use the fused attention of the GPU build")


@dataclass
class AdapterArguments(Arguments):
    """What finetuning trains of a model, and how conversations become text."""

    group: ClassVar[str] = "Model"

    chat_template: str | None = arg(None, "a .jinja file that replaces the model's chat template", path=True)
    lora: bool = arg(False, "train low-rank adapters (LoRA) instead of all weights")
    lora_path: str | None = arg(
        None, "folder of an adapter to start from (PEFT folders too)", needs=["lora"], path=True
    )
    lora_rank: int = arg(8, "rank of the adapters", minimum=1, needs=["lora"])
    lora_alpha: float | None = arg(
        None, "scale of the adapters, divided by the rank; 2 * lora_rank by default", above=0, needs=["lora"]
    )
    lora_dropout: float = arg(
        0.0, "share of the adapters' inputs dropped in training", minimum=0, below=1, needs=["lora"]
    )
    lora_target_modules: list[str] | None = arg(  # noqa: RUF009
        None,
        "names of the Linear layers to adapt, such as q_proj,v_proj; all Linear layers by default",
        needs=["lora"],
    )
    rslora: bool = arg(False, "scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA)", needs=["lora"])
    lora_plus_scale: float = arg(
        1.0,
        "learning rate of the B matrices relative to that of the A matrices (LoRA+)",
        above=0,
        needs=["lora"],
    )
    prefix_tuning: bool = arg(False, "train a prefix of keys and values instead of the weights")
    prefix_path: str | None = arg(None, "folder of a prefix to start from", needs=["prefix_tuning"], path=True)
    num_prefix_tokens: int = arg(128, "length of the prefix", minimum=1, unit="tokens", needs=["prefix_tuning"])
    prefix_projection: bool = arg(
        False, "compute the prefix by a small network while training", needs=["prefix_tuning"]
    )
    prefix_projection_hidden_size: int | None = arg(
        None, "width of that network; the model's own by default", minimum=1, needs=["prefix_projection"]
    )
    neftune: bool = arg(False, "add noise to the embeddings in training (NEFTune)")
    neftune_noise_alpha: float = arg(5.0, "strength of that noise", minimum=0, needs=["neftune"])
