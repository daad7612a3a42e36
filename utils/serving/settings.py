"""What the process of the model has to know: which models, and how many requests at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from utils.arguments import ServeArguments
from utils.inference.loading import Prepared, prepare, prepare_beside
from utils.parallel.process_group import ProcessGroup


@dataclass(frozen=True)
class ModelSettings:
    """The models of a server, without what only its HTTP side needs (the key of its API, for one).

    Attributes:
        served_name: of the model, for clients.
        name, device, dtype, chat_template, special_tokens_in_text, lora_path, prefix_path, mode, inference_model: see
            `utils.inference.loading.prepare`.
        adapters: (served name, folder) of LoRA adapters beside it.
        batch_size: most answers of a model in the making.
        prefill_chunk: see `Scheduler`.
        prompt_cache_bytes: most memory for beginnings of prompts that may come again.
    """

    served_name: str
    name: str
    device: str = "cpu"
    dtype: str | None = None
    chat_template: str | None = None
    special_tokens_in_text: bool = False
    lora_path: str | None = None
    prefix_path: str | None = None
    mode: str = "dynamic"
    inference_model: bool = False
    adapters: tuple[tuple[str, str], ...] = ()
    batch_size: int = 8
    prefill_chunk: int | None = None
    prompt_cache_bytes: int = 0

    @classmethod
    def of(cls, run: ServeArguments) -> ModelSettings:
        """What the arguments of a server say."""
        return cls(
            str(run.served_model_name),
            str(run.model_name_or_path),
            run.device,
            run.dtype,
            run.chat_template,
            run.special_tokens_in_text,
            run.lora_path,
            run.prefix_path,
            run.mode,
            run.inference_model,
            tuple(run.adapters),
            run.max_batch_size,
            run.prefill_chunk,
            int(run.prompt_cache_gib * 2**30),
        )

    def to_json(self) -> dict[str, Any]:
        """All of it as a JSON value."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ModelSettings:
        """What `to_json` has written."""
        return cls(**{**value, "adapters": tuple((name, folder) for name, folder in value["adapters"])})

    def prepare(self, processes: ProcessGroup | None = None) -> dict[str, Prepared]:
        """The models by served name, found and checked; the first is the base.

        Raises:
            UserError: see `utils.inference.loading.prepare` and `prepare_beside`.
        """
        base = prepare(
            self.name,
            device=self.device,
            dtype=self.dtype,
            chat_template=self.chat_template,
            special_tokens_in_text=self.special_tokens_in_text,
            lora_path=self.lora_path,
            prefix_path=self.prefix_path,
            mode=self.mode,
            inference_model=self.inference_model,
            processes=processes,
        )
        beside = prepare_beside(
            base,
            self.adapters,
            chat_template=self.chat_template,
            special_tokens_in_text=self.special_tokens_in_text,
        )
        return {self.served_name: base, **beside}
