"""From a model's name to a generator: the one sequence that everything which answers prompts uses.

`prepare` finds and checks all files in well under a second, without Paddle; `load` reads the weights.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils import runtime
from utils.adapters.check import LORA_CONFIG, PREFIX_CONFIG, check_adapter
from utils.checkpoints.locate import Checkpoint, locate
from utils.data.encode import encode_source
from utils.data.template import ChatTemplate, Message
from utils.families.tokenizers import Tokenizer, load_tokenizer
from utils.inference.sampling import SamplingOptions

if TYPE_CHECKING:
    from utils.inference.generator import Generator


@dataclass(frozen=True)
class Prepared:
    """A model that was found and checked, with all that turns text to ids and back.

    Attributes:
        checkpoint: the model.
        tokenizer, template: of the checkpoint (or the user's template).
        dtype: the type to compute in.
        lora, prefix: folders of adapters of this model, or None.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    template: ChatTemplate
    dtype: str
    lora: Path | None = None
    prefix: Path | None = None

    @property
    def positions(self) -> int | None:
        """Most tokens of prompt and answer together; None without a limit."""
        return self.checkpoint.family.shape(self.checkpoint.config).positions

    def encode(self, messages: Sequence[Message], src_length: int) -> tuple[list[int], bool]:
        """(prompt ids of a conversation that ends with a question, whether it was cut to src_length)."""
        return encode_source(messages, self.tokenizer, self.template, src_length)


def prepare(
    name: str,
    *,
    device: str,
    dtype: str | None = None,
    chat_template: str | None = None,
    lora_path: str | None = None,
    prefix_path: str | None = None,
) -> Prepared:
    """Finds and checks a model and its adapter; reads no weights and loads no Paddle.

    An adapter's folder may hold the chat template that it was trained with; that one is used then.

    Args:
        name: folder, hub id or the embedded model's name.
        device: "cpu" or "gpu", already checked.
        dtype: None takes the checkpoint's own.
        chat_template: a template file of the user's.

    Raises:
        UserError: no such model, no tokenizer, an adapter of another model, and so on.
    """
    checkpoint = locate(name)
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config)
    for path, config_name in ((lora_path, LORA_CONFIG), (prefix_path, PREFIX_CONFIG)):
        if path is not None:
            check_adapter(path, config_name, checkpoint)
    default = checkpoint.family.chat_template
    template = ChatTemplate.load(
        checkpoint.folder, default=default, override=Path(chat_template) if chat_template else None
    )
    adapter = lora_path or prefix_path
    if adapter is not None and chat_template is None:
        trained_with = ChatTemplate.load(Path(adapter), default=None)
        template = template if trained_with.source == "plain" else trained_with
    return Prepared(
        checkpoint,
        tokenizer,
        template,
        runtime.resolve_dtype(dtype or checkpoint.dtype, device),
        Path(lora_path) if lora_path else None,
        Path(prefix_path) if prefix_path else None,
    )


def load(prepared: Prepared, device: str, *, warm_up: bool = False) -> Generator:
    """Reads the weights and returns a generator over the eager engine.

    Args:
        warm_up: generate a few tokens first, so that figures of speed hold no one-time costs.

    Raises:
        UserError: weights that do not fit the model or the adapter.
    """
    started = time.perf_counter()
    runtime.use_device(device)
    from utils.checkpoints.load import load_model
    from utils.inference.eager import EagerEngine
    from utils.inference.generator import Generator, Speed

    checkpoint = prepared.checkpoint
    family = checkpoint.family
    model = load_model(checkpoint, prepared.dtype)
    prefix = None
    if prepared.lora is not None:
        from utils.adapters.lora import load_lora

        adapted = load_lora(model, family, prepared.lora, checkpoint)
        adapted.eval()
        model = adapted.model
    if prepared.prefix is not None:
        from utils.adapters.prefix import load_prefix

        prefix = load_prefix(model, family, prepared.prefix, checkpoint)
        prefix.eval()
    engine = EagerEngine(family, model, checkpoint.config, prefix=prefix)
    generator = Generator(engine, prepared.tokenizer, prepared.template.stop_ids(prepared.tokenizer))
    seconds = time.perf_counter() - started
    if warm_up:
        generator.generate([[prepared.tokenizer.eos_id] * 8] * 2, SamplingOptions(max_new_tokens=4))
    generator.speed = Speed(load_seconds=seconds)
    return generator
