"""From arguments and a checkpoint to the model that trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from utils import runtime
from utils.adapters.check import LORA_CONFIG, PREFIX_CONFIG, check_adapter
from utils.adapters.targets import adapted_shapes, linear_names
from utils.checkpoints.locate import Checkpoint
from utils.checkpoints.match import match
from utils.errors import UserError, raise_if
from utils.parallel.peers import Alone
from utils.training.plan import method

if TYPE_CHECKING:
    from utils.training.model import TrainingModel
    from utils.training.trained import Trained

PREFIX_INIT_TOKENS = 2048


def check_adapters(args: Any, checkpoint: Checkpoint) -> None:
    """Checks the adapter that a run starts from, or the layers of a new one, before any weights load.

    What the adapter's files fix is taken over into `args`, so that the rest of the run has one truth.

    Raises:
        UserError: an adapter of another base, options that contradict it, or unknown layers.
    """
    if args.lora_path:
        saved = check_adapter(args.lora_path, LORA_CONFIG, checkpoint)
        names = {"lora_rank": "r", "lora_alpha": "lora_alpha", "rslora": "rslora"}
        _take_over(args, "lora_path", {ours: saved[theirs] for ours, theirs in names.items() if theirs in saved})
        if "lora_target_modules" in args.provided:
            raise UserError("lora_target_modules and lora_path exclude each other: the adapter has its layers already")
    elif args.lora:
        adapted_shapes(checkpoint, args.lora_target_modules)
    if args.prefix_path:
        saved = check_adapter(args.prefix_path, PREFIX_CONFIG, checkpoint)
        same = ("num_prefix_tokens", "prefix_projection", "prefix_projection_hidden_size")
        _take_over(args, "prefix_path", {name: saved[name] for name in same if name in saved})
    elif args.prefix_tuning and not args.do_train:
        raise UserError("prefix_tuning without do_train evaluates a trained prefix: name its folder as prefix_path")


def _take_over(args: Any, path: str, settings: Mapping[str, Any]) -> None:
    """Sets arguments to what an adapter's file says.

    Raises:
        UserError: the user gave another value.
    """
    faults = []
    for name, value in settings.items():
        if name in args.provided and getattr(args, name) != value:
            faults.append(f"{args.where(name)}: the adapter of {path} has {value}; leave {name} out")
        setattr(args, name, value)
    raise_if(faults)


def model_overrides(args: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings of the model's configuration that the arguments replace."""
    dropouts = checkpoint.family.dropouts if args.dropout is not None else ()
    return {
        **{dropout.name: args.dropout for dropout in dropouts},
        "use_flash_attention": args.use_flash_attention,
        "recompute_use_reentrant": True,  # the other kind loses gradients of operators written in Python
    }


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
        return whole, sum(args.lora_rank * sum(sizes) for sizes in adapted_layers(args, checkpoint).values())
    if args.prefix_tuning:
        width = shape.head_dim * shape.kv_heads
        size = 2 * shape.layers * width
        if not args.prefix_projection:
            return whole, args.num_prefix_tokens * size
        hidden = args.prefix_projection_hidden_size or shape.hidden
        return whole, args.num_prefix_tokens * width + (width + 1) * hidden + (hidden + 1) * size
    return whole, whole


def adapted_layers(args: Any, checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """[in, out] of the layers that the run's LoRA adapts, those of lora_path or of lora_target_modules."""
    if args.lora_path:
        saved = check_adapter(args.lora_path, LORA_CONFIG, checkpoint)
        return adapted_shapes(checkpoint, saved["target_modules"])
    return adapted_shapes(checkpoint, args.lora_target_modules)


def build(
    args: Any, checkpoint: Checkpoint, dtype: str, train_data: Any, peers: Alone
) -> tuple[TrainingModel, Trained]:
    """Loads the base, or what this rank holds of it, and puts the adapter of the run on it.

    Args:
        dtype: the type to compute in. Weights are kept in it with fp16_opt_level O2 and for frozen
            bases; otherwise training keeps float32 weights, those of adapters too.
        train_data: the training data, from whose tokens a new prefix starts; None without one.
    """
    runtime.load_library()
    from paddlenlp.trainer import set_seed

    from utils.adapters.lora import add_lora, load_lora
    from utils.adapters.prefix import PrefixTuning, load_prefix
    from utils.checkpoints.load import load_model
    from utils.partition.tensor import Held
    from utils.training.model import TrainingModel
    from utils.training.trained import FullModel, Lora, Prefix

    trained_dtype = dtype if args.fp16_opt_level == "O2" else "float32"
    weights_dtype = trained_dtype if method(args) == "sft" else dtype
    overrides = model_overrides(args, checkpoint)
    held = Held.of(checkpoint.family, checkpoint.config, peers)
    base = load_model(checkpoint, weights_dtype, family_overrides=overrides, held=held)
    set_seed(args.seed)
    family, prefix, layout = checkpoint.family, None, peers.layout
    stages: Any = None
    if layout.pipeline > 1:
        from utils.partition.pipeline import InStages, Stages

        stages = Stages(layout, family.shape(checkpoint.config).layers)
    trained: Trained
    if args.lora:
        if args.lora_path:
            adapted = load_lora(
                base,
                family,
                args.lora_path,
                checkpoint,
                dropout=args.lora_dropout,
                lora_plus_scale=args.lora_plus_scale,
                dtype=trained_dtype,
                held=held,
            )
        else:
            adapted = add_lora(
                base,
                family,
                rank=args.lora_rank,
                alpha=args.lora_alpha,
                dropout=args.lora_dropout,
                targets=args.lora_target_modules,
                rslora=args.rslora,
                lora_plus_scale=args.lora_plus_scale,
                linears=linear_names(checkpoint),
                seed=args.seed,
                dtype=trained_dtype,
                held=held,
            )
        trained = Lora(checkpoint, held, adapted)
    elif args.prefix_tuning:
        if args.prefix_path:
            prefix = load_prefix(base, family, args.prefix_path, checkpoint, held, dtype=trained_dtype)
        else:
            prefix = PrefixTuning(
                family,
                family.shape(checkpoint.config),
                args.num_prefix_tokens,
                projection=args.prefix_projection,
                projection_hidden=args.prefix_projection_hidden_size,
                dtype=trained_dtype,
                computed=weights_dtype,
                held=held,
            )
            ids = typical_ids(train_data)
            if stages is None:
                prefix.start_from_text(base, ids)
            else:
                peers.gate("waiting for the model on other ranks")
                divided: Any = InStages(family, checkpoint.config, stages)
                prefix.start_from_text(base, ids, divided, stages.complete)
                peers.copy_from_first(list(prefix.encoder.parameters()), peers.groups.pipeline)
        trained = Prefix(checkpoint, held, prefix)
    else:
        trained = FullModel(checkpoint, held, base, in_shards=not args.unified_checkpoint)
    model = TrainingModel(
        family,
        base,
        prefix=prefix,
        neftune_alpha=args.neftune_noise_alpha if args.neftune else None,
        inputs_need_gradient=args.recompute,
        vocabulary_group=held.vocabulary_group,
        sequence=held.sequence(family, checkpoint.config, base) if args.sequence_parallel else None,
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
