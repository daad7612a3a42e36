"""From arguments and a checkpoint to the model that trains."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.adapters.check import LORA_CONFIG, PREFIX_CONFIG, check_adapter
from utils.checkpoints.fingerprint import fingerprint
from utils.checkpoints.locate import Checkpoint
from utils.errors import UserError
from utils.training import resume

if TYPE_CHECKING:
    from utils.training.model import TrainingModel
    from utils.training.trained import Trained

PREFIX_INIT_TOKENS = 2048


def method(args: Any) -> str:
    """ "lora", "prefix" or "sft"."""
    return "lora" if args.lora else "prefix" if args.prefix_tuning else "sft"


def check_adapters(args: Any, checkpoint: Checkpoint) -> None:
    """Checks the adapters that a run starts from, before any weights load."""
    if args.lora_path:
        check_adapter(args.lora_path, LORA_CONFIG, checkpoint)
    if args.prefix_path:
        check_adapter(args.prefix_path, PREFIX_CONFIG, checkpoint)


def build(args: Any, checkpoint: Checkpoint, dtype: str, typical_ids: Sequence[int]) -> tuple[TrainingModel, Trained]:
    """Loads the base and puts the adapter of the run on it.

    Args:
        dtype: the type to compute in. Weights are kept in it with fp16_opt_level O2 and for frozen
            bases; otherwise training keeps float32 weights.
        typical_ids: tokens of the training data, from which a new prefix starts.
    """
    from paddlenlp.trainer import set_seed

    from utils.adapters.lora import add_lora, load_lora
    from utils.adapters.prefix import PrefixTuning, load_prefix
    from utils.checkpoints.load import load_model
    from utils.training.model import TrainingModel
    from utils.training.trained import FullModel, Lora, Prefix

    weights_dtype = dtype if args.fp16_opt_level == "O2" or method(args) != "sft" else "float32"
    overrides = {"use_flash_attention": args.use_flash_attention, "sequence_parallel": args.sequence_parallel}
    base = load_model(checkpoint, weights_dtype, family_overrides=overrides)
    set_seed(args.seed)
    family, prefix = checkpoint.family, None
    trained: Trained
    if args.lora:
        if args.lora_path:
            adapted = load_lora(base, family, args.lora_path, checkpoint)
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
            )
        trained = Lora(checkpoint, adapted)
    elif args.prefix_tuning:
        if args.prefix_path:
            prefix = load_prefix(base, family, args.prefix_path, checkpoint)
        else:
            prefix = PrefixTuning(
                family,
                family.shape(checkpoint.config),
                args.num_prefix_tokens,
                projection=args.prefix_projection,
                projection_hidden=args.prefix_projection_hidden_size,
                dtype=weights_dtype,
            )
            prefix.start_from_text(base, typical_ids)
        trained = Prefix(checkpoint, prefix)
    else:
        trained = FullModel(checkpoint, base)
    model = TrainingModel(
        family,
        base,
        prefix=prefix,
        neftune_alpha=args.neftune_noise_alpha if args.neftune else None,
        inputs_need_gradient=args.recompute,
    )
    return model, trained


def checkpoint_to_resume(args: Any) -> Path | None:
    """The checkpoint that this run continues from: the one asked for, else the last good one.

    Raises:
        UserError: the one asked for is no complete checkpoint, or there is none.
    """
    output = Path(args.output_dir)
    asked = args.resume_from_checkpoint
    if isinstance(asked, str):
        folder = Path(asked)
        if not folder.is_dir():
            raise UserError(f"resume_from_checkpoint {asked}: no such folder")
        resume.load_progress(folder)
        return folder
    good = resume.checkpoints(output) if output.is_dir() else []
    if asked is True and not good:
        raise UserError(f"resume_from_checkpoint: {output} holds no complete checkpoint; leave the option out")
    if asked is False or args.overwrite_output_dir or not good:
        return None
    return good[-1]


def check_world() -> None:
    """Refuses a launch of several processes: parallel training is not part of this version yet."""
    processes = int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))
    if processes > 1:
        raise UserError(
            f"started as {processes} processes: parallel training is not part of this version yet; "
            "run the script without paddle.distributed.launch and set the parallel degrees to 1"
        )


def describe(args: Any, checkpoint: Checkpoint, dataset: Any) -> dict[str, Any]:
    """What must not change between a run and its continuation."""
    names = ["seed", "per_device_train_batch_size", "gradient_accumulation_steps", "intokens", "lazy"]
    if args.lora:
        names += ["lora_rank", "lora_alpha", "lora_dropout", "rslora", "lora_target_modules"]
    elif args.prefix_tuning:
        names += ["num_prefix_tokens", "prefix_projection"]
    return {
        "model": fingerprint(checkpoint),
        "method": method(args),
        "data": dataset.fingerprint() if dataset is not None else None,
        **{name: getattr(args, name) for name in names},
    }


def typical_ids(dataset: Any) -> list[int]:
    """Tokens of the first examples of a dataset (none without one)."""
    found: list[int] = []
    for item in dataset or ():
        found.extend(int(i) for i in item["input_ids"])
        if len(found) >= PREFIX_INIT_TOKENS:
            break
    return found[:PREFIX_INIT_TOKENS]
