"""From a model's name to a generator: the one sequence that everything which answers prompts uses.

`prepare` finds and checks all files in well under a second, without Paddle; `load` reads the weights.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from utils import runtime
from utils.adapters.lora_files import LoraAdapter, read_lora
from utils.adapters.prefix_files import read_prefix_settings
from utils.checkpoints.locate import Checkpoint, locate
from utils.data.encode import encode_source
from utils.data.template import ChatTemplate, Message, Tools
from utils.errors import UserError, notice, raise_if
from utils.families.tokenizers import Tokenizer, load_tokenizer
from utils.inference.manifest import Manifest, check_same_kind, is_export, prefix_cache, read_export
from utils.inference.sampling import SamplingOptions
from utils.parallel.process_group import ProcessGroup
from utils.partition.parts import Parts

if TYPE_CHECKING:
    from utils.inference.engine import Engine
    from utils.inference.generator import Generator
    from utils.partition.tensor import ShardPlan


@dataclass(frozen=True)
class Prepared:
    """A model that was found and checked, with all that turns text to ids and back.

    Attributes:
        checkpoint: the model.
        tokenizer, template: of the checkpoint (or the user's template).
        dtype: the type to compute in.
        lora: an adapter of this model, or None.
        prefix: the folder of a prefix of this model, or None.
        inference_model: whether the fused decoder computes instead of the plain one.
        manifest: of an exported model, which runs as a static program; None for weights.
        processes: the processes that share the model, each with a part of every layer.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    template: ChatTemplate
    dtype: str
    lora: LoraAdapter | None = None
    prefix: Path | None = None
    inference_model: bool = False
    manifest: Manifest | None = None
    processes: ProcessGroup = field(default_factory=ProcessGroup)

    @property
    def parts(self) -> Parts | None:
        """What this process has of the model; None for all of it."""
        layout, checkpoint = self.processes.layout, self.checkpoint
        if layout.tensor == 1:
            return None
        _, _, _, tensor = layout.coordinates(layout.rank)
        return Parts(checkpoint.family, checkpoint.config, layout.tensor, tensor)

    @property
    def positions(self) -> int | None:
        """Most tokens of prompt and answer together; None without a limit."""
        return self.checkpoint.family.shape(self.checkpoint.config).positions

    def encode(
        self, messages: Sequence[Message], src_length: int, tools: Tools | None = None
    ) -> tuple[list[int], bool]:
        """(prompt ids of a conversation that ends with a question, whether it was cut to src_length)."""
        return encode_source(messages, self.tokenizer, self.template, src_length, tools)


def prepare(
    name: str,
    *,
    device: str,
    dtype: str | None = None,
    chat_template: str | None = None,
    special_tokens_in_text: bool = False,
    lora_path: str | None = None,
    prefix_path: str | None = None,
    mode: str = "dynamic",
    inference_model: bool = False,
    processes: ProcessGroup | None = None,
) -> Prepared:
    """Finds and checks a model and its adapter; reads no weights and loads no Paddle.

    An adapter's folder may hold the chat template that it was trained with; that one is used then.

    Args:
        name: folder, hub id or the embedded model's name.
        device: "cpu" or "gpu", already checked.
        dtype: None takes the checkpoint's own.
        chat_template: a template file of the user's.
        special_tokens_in_text: see `ChatTemplate`.
        mode: "static" expects the folder of an exported model as `name`.
        inference_model: whether the fused decoder computes instead of the plain one.
        processes: the processes that share the model, if there are several.

    Raises:
        UserError: no such model, or one that so many processes cannot share, no tokenizer, an adapter of another
            model, and so on.
    """
    processes = processes or ProcessGroup()
    manifest = None
    if mode == "static":
        checkpoint, manifest = read_export(name, processes.layout)
        check_same_kind(checkpoint, manifest, inference_model)
    else:
        if is_export(Path(name).expanduser()):
            raise UserError(f"{name}: holds an exported model; only predictor.py runs it, with --mode static")
        with processes.one_after_first():  # which may download
            checkpoint = locate(name)
        processes.layout.check_model(checkpoint.family.shape(checkpoint.config))
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config)
    lora = None if lora_path is None else read_lora(lora_path, checkpoint)
    if prefix_path is not None:
        read_prefix_settings(Path(prefix_path), checkpoint)
    template: ChatTemplate | None = None
    if chat_template is None:
        template = _template_of_adapter(lora_path or prefix_path, special_tokens_in_text)
    if template is None:  # else that of the base, which may be a broken one, is not used
        template = ChatTemplate.load(
            checkpoint.folder,
            default=checkpoint.family.chat_template,
            override=Path(chat_template) if chat_template else None,
            special_tokens_in_text=special_tokens_in_text,
        )
    stored = checkpoint.dtype if manifest is None else manifest.dtype
    computed = runtime.resolve_dtype(dtype or stored, device)
    if manifest is not None and computed != manifest.dtype:
        raise UserError(
            f"{name}: was exported in {manifest.dtype}; leave --dtype out, or export it again in {computed}"
        )
    prepared = Prepared(
        checkpoint,
        tokenizer,
        template,
        computed,
        lora,
        Path(prefix_path) if prefix_path else None,
        inference_model,
        manifest,
        processes,
    )
    if prepared.parts is not None:
        prepared.parts.check(checkpoint.family.architecture(checkpoint.config).matrices())
    return prepared


def prepare_beside(
    base: Prepared,
    adapters: Sequence[tuple[str, str]],
    *,
    chat_template: str | None = None,
    special_tokens_in_text: bool = False,
) -> dict[str, Prepared]:
    """LoRA adapters of a model without one, ours or PEFT's, to be loaded with it by `load_all`.

    Args:
        base: not an exported model.
        adapters: (name of one's choice, folder) of each.
        chat_template, special_tokens_in_text: as in `prepare`.

    Raises:
        UserError: folders that hold no adapter of this model, all of them together.
    """
    found: dict[str, Prepared] = {}
    faults: list[str] = []
    for name, folder in adapters:
        try:
            template = None if chat_template else _template_of_adapter(folder, special_tokens_in_text)
            lora = read_lora(folder, base.checkpoint)
            found[name] = replace(base, lora=lora, template=template or base.template)
        except UserError as error:
            faults += error.faults
    raise_if(faults)
    return found


def _template_of_adapter(folder: str | None, special_tokens_in_text: bool) -> ChatTemplate | None:
    """The template that an adapter was trained with, if its folder holds one."""
    if folder is None:
        return None
    template = ChatTemplate.load(Path(folder), default=None, special_tokens_in_text=special_tokens_in_text)
    return None if template.source == "plain" else template


def check_model_type(run: Any, checkpoint: Checkpoint) -> None:
    """`model_type` among the arguments may only confirm what the checkpoint says.

    Raises:
        UserError: it says something else.
    """
    family = checkpoint.family
    if run.model_type is not None and run.model_type not in {family.name, *family.model_types}:
        raise UserError(
            f"{run.where('model_type')}: {checkpoint.folder} holds a {family.title} model; "
            f"leave model_type out, or write {family.name}"
        )


def fitting_src_length(run: Any, prepared: Prepared) -> int:
    """`src_length`, lowered where it is a default that would fill all positions of the model.

    Raises:
        UserError: a max_length that the model has no positions for.
    """
    positions = prepared.positions
    if positions is None:
        return run.src_length
    if "max_length" in run.provided and run.max_length > positions:
        raise UserError(
            f"{run.where('max_length')}: {prepared.checkpoint.name} has {positions} positions for prompt and answer "
            f"together; set it to {positions} or less"
        )
    if "src_length" in run.provided or run.src_length < positions:
        return run.src_length
    notice(f"the model has {positions} positions; src_length is {positions // 2}, half of them")
    return positions // 2


def load(prepared: Prepared, device: str, *, warm_up: bool = False) -> Generator:
    """Reads the weights and returns a generator over the engine that was asked for.

    Args:
        warm_up: generate a few tokens first, so that figures of speed hold no one-time costs.

    Raises:
        UserError: weights that do not fit the model or the adapter.
    """
    return load_all({"": prepared}, device, warm_up=warm_up)[""]


def load_all(models: Mapping[str, Prepared], device: str, *, warm_up: bool = False) -> dict[str, Generator]:
    """A generator over each of several models: one, and adapters of it, see `prepare_beside`.

    The weights are in memory once, but for those that an adapter changes (and in the inference model those that are
    joined with them).

    Args:
        models: by names of one's choice.
        warm_up: as in `load`.

    Raises:
        UserError: as `load`.
    """
    started = time.perf_counter()
    runtime.use_device(device)
    from utils.inference.constraint import Constrainer
    from utils.inference.generator import Generator, Speed

    runtime.give_back_freed_memory()  # of the tokenizer's file
    engines = make_engines(list(models.values()), device)
    runtime.give_back_freed_memory()
    found = {}
    constrainer = cache(Constrainer)  # adapters share the tokenizer
    for engine, (name, prepared) in zip(engines, models.items(), strict=True):
        prepared.processes.barrier("waiting for the weights of all processes")
        end_ids = prepared.template.stop_ids(prepared.tokenizer)
        forms = constrainer(prepared.tokenizer, engine.vocabulary, end_ids)
        if warm_up:
            forms.warm_up()
        found[name] = Generator(engine, prepared.tokenizer, end_ids, forms.start)
    seconds = time.perf_counter() - started
    for name, generator in found.items():
        if warm_up:
            prompt = [models[name].tokenizer.eos_id] * 8
            generator.generate([prompt] * 2, SamplingOptions(max_new_tokens=4))
        generator.speed = Speed(load_seconds=seconds)
    return found


def make_engine(prepared: Prepared, device: str) -> Engine:
    """Reads the weights and returns the engine that was asked for.

    Raises:
        UserError: as `load`.
    """
    return make_engines([prepared], device)[0]


def make_engines(models: Sequence[Prepared], device: str) -> list[Engine]:
    """The same for several models, as in `load_all`."""
    if models[0].manifest is not None:
        return [_exported_engine(prepared, prepared.manifest, device) for prepared in models if prepared.manifest]
    engines: list[Engine] = []
    first: Any = None
    for prepared in models:
        layer, prefix = load_program(prepared, device, beside=first)
        engines.append(engine_of(prepared, layer, prefix))
        first = first or layer
    return engines


def _exported_engine(prepared: Prepared, manifest: Manifest, device: str) -> Engine:
    from utils.inference.cached import CachedEngine
    from utils.inference.static import StaticProgram

    checkpoint = prepared.checkpoint
    folder = checkpoint.files[0].parent
    if manifest.degree > 1:
        from utils.parallel.groups import open_ring

        open_ring(prepared.processes.groups.tensor, manifest.ring)
    return CachedEngine(
        checkpoint.family,
        checkpoint.config,
        StaticProgram(folder, manifest, device),
        dtype=manifest.dtype,
        prefix=prefix_cache(folder, manifest),
    )


def engine_of(prepared: Prepared, layer: Any, prefix: NDArray[np.float32] | None) -> Engine:
    """An engine that runs what `load_program` returned, operator by operator."""
    from utils.inference.cached import CachedEngine, DynamicProgram

    checkpoint = prepared.checkpoint
    return CachedEngine(
        checkpoint.family, checkpoint.config, DynamicProgram(layer), dtype=prepared.dtype, prefix=prefix
    )


def load_program(
    prepared: Prepared, device: str, *, beside: Any = None, merged: bool = False
) -> tuple[Any, NDArray[np.float32] | None]:
    """One step of a model as a layer, fused or plain, and the keys and values of its prefix (see `CachedEngine`), or
    None.

    Args:
        beside: the same of the same model without an adapter, whose weights this one shares, or None.
        merged: whether LoRA is merged into the weights of a plain one too.

    Raises:
        UserError: weights that do not fit the model or the adapter.
    """
    runtime.use_device(device)
    checkpoint, parts, layer = prepared.checkpoint, prepared.parts, None
    order = None  # of the dimensions of a head
    if prepared.inference_model:
        layer = _fused(prepared, beside)
        rotary = layer.architecture.rotary
        order = None if rotary is None else rotary.order
    else:
        from utils.model.plain import PlainDecoder

        model = _merged_model(prepared) if merged else _model(prepared, None if beside is None else beside.model)
        group = prepared.processes.groups.tensor
        layer = PlainDecoder(model, parts=parts, group=group)
    prefix = None
    if prepared.prefix is not None:
        from utils.adapters.prefix import read_prefix

        tuned = read_prefix(checkpoint.family, prepared.prefix, checkpoint, "float32")
        prefix = tuned.array(order)[:, slice(None) if parts is None else parts.read_heads]
    return layer, prefix


def _fused(prepared: Prepared, beside: Any) -> Any:
    """The fused decoder, with LoRA merged into its weights; see `load_program`."""
    from utils.checkpoints.merge import changed_parameters, parameters
    from utils.model.fused import FusedDecoder

    checkpoint, lora = prepared.checkpoint, prepared.lora
    known = parameters(checkpoint, lora, "float32")
    return FusedDecoder(
        checkpoint.family.architecture(checkpoint.config),
        known,
        lambda name: known[name].read(),
        prepared.dtype,
        parts=prepared.parts,
        group=prepared.processes.groups.tensor,
        beside=beside,
        changed=changed_parameters(checkpoint, lora) if lora else (),
    )


def _merged_model(prepared: Prepared) -> Any:
    """The trainable model with LoRA merged into its weights."""
    from utils.checkpoints.load import load_model
    from utils.checkpoints.merge import parameters

    known = parameters(prepared.checkpoint, prepared.lora, "float32")
    return load_model(prepared.checkpoint, prepared.dtype, shard_plan=_shard_plan(prepared), sources=known)


def _model(prepared: Prepared, beside: Any) -> Any:
    """The trainable model with the layers of LoRA in it.

    Args:
        beside: the same model without an adapter, whose weights this one shares, or None.
    """
    from utils.checkpoints.load import load_beside, load_model

    checkpoint, lora, shard_plan = prepared.checkpoint, prepared.lora, _shard_plan(prepared)
    sources, changed = None, set[str]()
    if lora is not None and lora.head is not None:  # which is no layer that LoRA can take the place of
        from utils.checkpoints.merge import changed_parameters, parameters

        head = lora.of_layers([lora.head])
        sources, changed = parameters(checkpoint, head, "float32"), changed_parameters(checkpoint, head)
        lora = lora.of_layers([layer for layer in lora.pairs if layer != lora.head])
    if beside is None:
        model = load_model(checkpoint, prepared.dtype, shard_plan=shard_plan, sources=sources)
    else:
        own = {name: tensor for name, tensor in (sources or {}).items() if name in changed}
        model = load_beside(beside, checkpoint, prepared.dtype, own, shard_plan=shard_plan)
    if lora is not None:
        from utils.adapters.lora import load_lora

        load_lora(model, lora, shard_plan=shard_plan)
        model.eval()
    return model


def _shard_plan(prepared: Prepared) -> ShardPlan | None:
    """What this process has of the trainable model, if not all."""
    from utils.partition.tensor import ShardPlan

    checkpoint = prepared.checkpoint
    return (
        ShardPlan.of(checkpoint.family, checkpoint.config, prepared.processes) if prepared.processes.several else None
    )
