"""From arguments and a checkpoint to the model that trains."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import runtime
from utils.adapters.lora_files import read_lora
from utils.adapters.prefix_files import read_prefix_settings
from utils.adapters.targets import adapted_shapes, checkpoint_patterns, left_out, linear_names
from utils.checkpoints.locate import Checkpoint
from utils.checkpoints.match import match, some
from utils.errors import UserError, notice, raise_if
from utils.model.settings import Settings
from utils.parallel.groups import seed_everything
from utils.parallel.process_group import ProcessGroup
from utils.training.plan import method

if TYPE_CHECKING:
    from utils.training.model import TrainingModel
    from utils.training.trained import Trained

PREFIX_INIT_TOKENS = 2048


def check_adapters(args: Any, checkpoint: Checkpoint) -> None:
    """Checks the adapter that a run starts from, or the layers of a new one, before any weights load.

    What the adapter's files fix is taken over into `args`, so that the rest of the run has one truth.

    Raises:
        UserError: an adapter that does not fit, options that contradict it, unknown layers, or sizes out of reach.
    """
    if args.lora_path:
        raise_if(_start_from_lora(args, checkpoint))
    elif args.lora:
        _check_targets(args, checkpoint)
    if args.prefix_path:
        prefix = read_prefix_settings(Path(args.prefix_path), checkpoint)
        taken = {"num_prefix_tokens": prefix.length, "prefix_projection": prefix.projection}
        if prefix.projection_hidden is not None:
            taken["prefix_projection_hidden_size"] = prefix.projection_hidden
        raise_if(_take_over(args, "prefix_path", taken))
    elif args.prefix_tuning and not args.do_train:
        raise UserError("prefix_tuning without do_train evaluates a trained prefix: name its folder as prefix_path")
    elif args.prefix_tuning:
        _, weights = trained_parameters(args, checkpoint)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if 4 * weights > memory:
            names = ["num_prefix_tokens"] + ["prefix_projection_hidden_size"] * args.prefix_projection
            raise UserError(
                f"{' and '.join(args.where(name) for name in names)}: a prefix of {weights:,} weights is larger than "
                f"the {memory / 2**30:.0f} GiB of this machine; lower it"
            )


def _start_from_lora(args: Any, checkpoint: Checkpoint) -> list[str]:
    """Takes over what the adapter of lora_path fixes; returns what contradicts it."""
    adapter = read_lora(args.lora_path, checkpoint)
    found, faults = adapter.settings, []
    if adapter.head is not None:
        faults.append(
            f"{args.where('lora_path')}: adapts the head ({adapter.head}), which is not trained on here; merge it into "
            "its base with merge_lora_params.py, and train the merged model"
        )
    if "lora_target_modules" in args.provided:
        faults.append("lora_target_modules and lora_path exclude each other: the adapter has its layers already")
    taken = {"lora_rank": found.rank, "lora_alpha": found.alpha, "rslora": found.rslora}
    return faults + _take_over(args, "lora_path", taken)


def _check_targets(args: Any, checkpoint: Checkpoint) -> None:
    """
    Raises:
        UserError: targets that match no Linear layer, or a rank that no layer can use.
    """
    shapes = adapted_shapes(checkpoint, args.lora_target_modules)
    most = max(min(sizes) for sizes in shapes.values())
    if args.lora_rank > most:
        raise UserError(
            f"{args.where('lora_rank')}: no adapted layer of {checkpoint.name} has more than {most} inputs and "
            f"outputs, and a higher rank can express no more; set it to {most} or less"
        )
    others = left_out(checkpoint, args.lora_target_modules)
    if others:
        notice(
            f"lora_target_modules: {', '.join(args.lora_target_modules)} match {some(others)} too, which LoRA does not "
            "adapt; they are left out"
        )


def _take_over(args: Any, path: str, settings: Mapping[str, Any]) -> list[str]:
    """Sets arguments to what an adapter's file says; returns a fault for each that the user gave otherwise."""
    faults = []
    for name, value in settings.items():
        if name in args.provided and getattr(args, name) != value:
            faults.append(f"{args.where(name)}: the adapter of {path} has {value}; leave {name} out")
        setattr(args, name, value)
    return faults


def model_settings(args: Any, checkpoint: Checkpoint) -> Settings:
    """What the run chooses about its model."""
    rates = checkpoint.family.dropout_rates(checkpoint.config)
    if args.dropout is not None:
        rates = dict.fromkeys(rates, args.dropout)
    return Settings(use_flash_attention=args.use_flash_attention, dropouts=rates)


def check_dropout(args: Any, checkpoint: Checkpoint) -> None:
    """
    Raises:
        UserError: a dropout for a model that has none.
    """
    if args.dropout and not checkpoint.family.dropouts:
        raise UserError(f"{args.where('dropout')}: a {checkpoint.family.title} model has no dropout; leave it out")


def trained_parameters(args: Any, checkpoint: Checkpoint) -> tuple[int, int]:
    """(number of weights of the base, number of weights that the run trains); reads no weights."""
    tensors = [tensor for tensor, _ in match(checkpoint).values()]
    whole = sum(math.prod(tensor.shape) for tensor in tensors)
    shape = checkpoint.family.shape(checkpoint.config)
    if args.lora:
        return whole, adapter_size(args, checkpoint)
    if args.prefix_tuning:
        width = shape.head_dim * shape.kv_heads
        size = 2 * shape.layers * width
        if not args.prefix_projection:
            return whole, args.num_prefix_tokens * size
        hidden = args.prefix_projection_hidden_size or shape.hidden
        return whole, args.num_prefix_tokens * width + (width + 1) * hidden + (hidden + 1) * size
    return whole, whole


def adapter_size(args: Any, checkpoint: Checkpoint) -> int:
    """Number of weights of the run's LoRA layers, those of lora_path or of lora_target_modules."""
    if args.lora_path:
        adapter = read_lora(args.lora_path, checkpoint)
        return sum(math.prod(tensor.shape) for tensor in adapter.tensors().values())
    return sum(args.lora_rank * sum(sizes) for sizes in adapted_shapes(checkpoint, args.lora_target_modules).values())


def build(
    args: Any, checkpoint: Checkpoint, dtype: str, train_data: Any, processes: ProcessGroup
) -> tuple[TrainingModel, Trained]:
    """Loads the base, or what this rank holds of it, and puts the adapter of the run on it.

    Args:
        dtype: the type to compute in. Weights are kept in it with fp16_opt_level O2 and for frozen
            bases; otherwise training keeps float32 weights, those of adapters too.
        train_data: the training data, from whose tokens a new prefix starts; None without one.
    """
    runtime.load_paddle()
    from utils.adapters.lora import add_lora, load_lora
    from utils.adapters.prefix import PrefixTuning, load_prefix
    from utils.checkpoints.load import load_model
    from utils.partition.tensor import ShardPlan
    from utils.training.answers import engine_over
    from utils.training.model import TrainingModel
    from utils.training.trained import FullModel, Lora, Prefix

    trained_dtype = dtype if args.fp16_opt_level == "O2" else "float32"
    weights_dtype = trained_dtype if method(args) == "sft" else dtype
    shard_plan = ShardPlan.of(checkpoint.family, checkpoint.config, processes)
    base = load_model(checkpoint, weights_dtype, settings=model_settings(args, checkpoint), shard_plan=shard_plan)
    seed_everything(args.seed, processes.layout)
    family, prefix, layout = checkpoint.family, None, processes.layout
    stages: Any = None
    if layout.pipeline > 1:
        from utils.partition.pipeline import Stages

        stages = Stages(layout, family.shape(checkpoint.config).layers)
    trained: Trained
    if args.lora:
        if args.lora_path:
            adapted = load_lora(
                base,
                read_lora(args.lora_path, checkpoint),
                dropout=args.lora_dropout,
                lora_plus_scale=args.lora_plus_scale,
                dtype=trained_dtype,
                shard_plan=shard_plan,
            )
        else:
            adapted = add_lora(
                base,
                rank=args.lora_rank,
                alpha=args.lora_alpha,
                dropout=args.lora_dropout,
                targets=checkpoint_patterns(checkpoint, args.lora_target_modules),
                rslora=args.rslora,
                lora_plus_scale=args.lora_plus_scale,
                linears=linear_names(checkpoint),
                seed=args.seed,
                dtype=trained_dtype,
                shard_plan=shard_plan,
            )
        trained = Lora(checkpoint, shard_plan, adapted)
    elif args.prefix_tuning:
        if args.prefix_path:
            prefix = load_prefix(base, family, args.prefix_path, checkpoint, shard_plan, dtype=trained_dtype)
        else:
            prefix = PrefixTuning(
                family,
                family.shape(checkpoint.config),
                args.num_prefix_tokens,
                projection=args.prefix_projection,
                projection_hidden=args.prefix_projection_hidden_size,
                dtype=trained_dtype,
                computed=weights_dtype,
                shard_plan=shard_plan,
            )
            ids = typical_ids(train_data)
            engine = engine_over(family, base, checkpoint.config, processes, stages=stages)
            if stages is None:
                prefix.start_from_text(engine, ids)
            else:
                processes.barrier("waiting for the model on other ranks")
                prefix.start_from_text(engine, ids, stages.complete)
                processes.copy_from_first(list(prefix.encoder.parameters()), processes.groups.pipeline)
        trained = Prefix(checkpoint, shard_plan, prefix)
    else:
        trained = FullModel(checkpoint, shard_plan, base, in_shards=not args.unified_checkpoint)
    model = TrainingModel(
        family,
        base,
        prefix=prefix,
        neftune_alpha=args.neftune_noise_alpha if args.neftune else None,
        inputs_need_gradient=args.recompute,
        vocabulary_group=shard_plan.vocabulary_group,
        sequence=shard_plan.sequence(family, checkpoint.config, base) if args.sequence_parallel else None,
        stages=stages,
    )
    return model, trained


def typical_ids(dataset: Any) -> list[int]:
    """Tokens of the first examples of a dataset (none without one)."""
    found: list[int] = []
    for item in () if dataset is None else dataset:
        found.extend(int(i) for i in item["input_ids"])
        if len(found) >= PREFIX_INIT_TOKENS:
            break
    return found[:PREFIX_INIT_TOKENS]
