"""What pretraining does in its own way: where it starts, how long it is, what a dry run says."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.checkpoints.fingerprint import fingerprint, sizes
from utils.checkpoints.locate import Checkpoint
from utils.data.pretrain_build import check_tokenizer
from utils.data.pretrain_dataset import EvaluationText, PretrainData, PretrainDataset, TokenStream
from utils.data.template import ChatTemplate, JinjaTemplate
from utils.errors import UserError
from utils.families.tokenizers import Tokenizer
from utils.parallel.groups import seed_everything
from utils.parallel.process_group import ProcessGroup
from utils.parallel.topology import Layout
from utils.partition.picture import picture
from utils.training.dry_run import argument_lines, dropout_line, operators_line
from utils.training.memory import memory_bytes, memory_line
from utils.training.plan import GLOBAL_BATCH, Plan
from utils.training.start import model_settings

if TYPE_CHECKING:
    from utils.arguments import PretrainArguments
    from utils.training.model import TrainingModel
    from utils.training.trained import FullModel

SHOWN_TOKENS, SHOWN_SAMPLES, SHOWN_CHARACTERS = 60, 4, 60
# A model that has only read plain text continues a prompt as it stands; this is saved beside its weights.
PLAIN = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def choose_template(args: PretrainArguments, checkpoint: Checkpoint, source: Path) -> ChatTemplate:
    """The chat template of the result: the model's own where its weights go on, plain text for a new model."""
    if not args.continue_training:
        return JinjaTemplate(PLAIN, "pretraining")
    return ChatTemplate.load(source, default=checkpoint.family.chat_template)


# --- data ------------------------------------------------------------------------------------------


def check_length(args: PretrainArguments, checkpoint: Checkpoint) -> None:
    """Raises `UserError` if samples are longer than the model has positions for."""
    positions = checkpoint.family.shape(checkpoint.config).positions
    if positions and args.max_seq_length > positions:
        found = f"{checkpoint.name} has {positions} positions"
        raise UserError(f"{args.where('max_seq_length')}: {found}; set it to {positions} or less")


def load_text(
    args: PretrainArguments, layout: Layout, checkpoint: Checkpoint, tokenizer: Tokenizer, splits: Sequence[str]
) -> dict[str, Any]:
    """The data of each split: a `PretrainDataset` for "train" as long as the run, `EvaluationText` for others.

    Raises:
        UserError: broken files, ids that the model does not have, another tokenizer's ids, or too little text.
    """
    text = PretrainData(args.sources, args.shares, checkpoint.family.shape(checkpoint.config).vocabulary)
    for file in text.all_files:
        folder = os.path.join(os.path.dirname(file.prefix) or ".", checkpoint.family.name)
        name = args.tokenizer_name_or_path or args.model_name_or_path
        check_tokenizer(
            file.prefix,
            tokenizer,
            f"build others with python data/tools/create_pretraining_data.py --model_name {name} "
            f"--input_path FILE.jsonl --output_prefix {os.path.join(folder, 'text')} --append_eos, and add "
            f"--input_dir {folder}",
        )
    text.check_ids()
    data: dict[str, Any] = {}
    for split in splits:
        documents = text.documents(split)
        if split == "train":
            streams = [TokenStream(one, args.max_seq_length, args.seed) for one in documents]
            data[split] = PretrainDataset(streams, text.weights)
            data[split].samples = steps_of(args, layout, data[split]) * layout.global_batch(args)
        else:
            limit = None if args.eval_iters is None else args.eval_iters * args.per_device_eval_batch_size
            data[split] = EvaluationText(documents, args.max_seq_length, limit)
    return data


def steps_of(args: PretrainArguments, layout: Layout, dataset: PretrainDataset) -> int:
    """Updates of the run: max_steps, else what num_train_epochs take, at least one."""
    if args.max_steps > 0:
        return int(args.max_steps)
    per_epoch = dataset.tokens / (dataset.length * layout.global_batch(args))
    return max(1, math.floor(args.num_train_epochs * per_epoch + 1e-6))


class SampleNames:
    """Says by the beginning of their text which samples some ids are."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: Sequence[Sequence[int]]) -> str:
        shown = [self.tokenizer.decode(list(ids))[:SHOWN_CHARACTERS] for ids in rows[:SHOWN_SAMPLES]]
        more = f" and {len(rows) - SHOWN_SAMPLES} more" if len(rows) > SHOWN_SAMPLES else ""
        return "; ".join(f"a sample that begins with {text!r}" for text in shown) + more


# --- the run ---------------------------------------------------------------------------------------


def describe(
    args: PretrainArguments, layout: Layout, checkpoint: Checkpoint, dataset: PretrainDataset
) -> dict[str, Any]:
    """What must not change between a run and its continuation, see `plan.describe`."""
    return {
        "model": fingerprint(checkpoint) if args.continue_training else sizes(checkpoint),
        "method": "continued pretraining" if args.continue_training else "pretraining",
        "data": dataset.fingerprint(),
        GLOBAL_BATCH: layout.global_batch(args),
        "seed": args.seed,
        "dropout": args.dropout,
        "max_seq_length": args.max_seq_length,
    }


def build(
    args: PretrainArguments, checkpoint: Checkpoint, dtype: str, processes: ProcessGroup
) -> tuple[TrainingModel, FullModel]:
    """The model to train: with the weights of the checkpoint, or with new ones that the seed decides.

    Args:
        dtype: the type to compute in; weights are kept in it with fp16_opt_level O2, in float32 otherwise.
    """
    import paddle

    from utils.checkpoints.load import load_model, new_model
    from utils.partition.tensor import ShardPlan
    from utils.training.model import TrainingModel
    from utils.training.trained import FullModel

    weights_dtype = dtype if args.fp16_opt_level == "O2" else "float32"
    settings = model_settings(args, checkpoint)
    shard_plan = ShardPlan.of(checkpoint.family, checkpoint.config, processes)
    if args.continue_training:
        base = load_model(checkpoint, weights_dtype, settings=settings, shard_plan=shard_plan)
    else:
        seed_everything(args.seed, processes.layout)
        paddle.seed(args.seed)  # pipeline stages have another one each; all draw the same model
        base = new_model(checkpoint.family, checkpoint.config, weights_dtype, settings=settings, shard_plan=shard_plan)
    stages: Any = None
    if processes.layout.pipeline > 1:
        from utils.partition.pipeline import Stages

        stages = Stages(processes.layout, checkpoint.family.shape(checkpoint.config).layers)
    model = TrainingModel(
        checkpoint.family,
        base,
        inputs_need_gradient=args.recompute,
        vocabulary_group=shard_plan.vocabulary_group,
        sequence=shard_plan.sequence(checkpoint.family, checkpoint.config, base) if args.sequence_parallel else None,
        stages=stages,
    )
    return model, FullModel(checkpoint, shard_plan, base, in_shards=not args.unified_checkpoint)


def report(
    args: PretrainArguments,
    layout: Layout,
    checkpoint: Checkpoint,
    dtype: str,
    device: str,
    data: Mapping[str, Any],
    tokenizer: Tokenizer,
    plan: Plan | None,
) -> str:
    """What `--dry_run` prints: arguments, model, data, steps, memory and what would be written.

    Loads Paddle, to count the parameters of a model that is built without its weights.
    """
    from utils.checkpoints.load import build as build_empty

    whole = sum(math.prod(parameter.shape) for parameter in build_empty(checkpoint, "float32").parameters())
    start = f"the weights of {checkpoint.name}" if args.continue_training else f"new random weights, seed {args.seed}"
    lines = [
        "arguments:",
        *argument_lines(args),
        f"device: {device}, computing in {dtype}",
        operators_line(args, checkpoint, dtype, device),
        *picture(layout, args, checkpoint.family.shape(checkpoint.config).layers),
        f"model: {checkpoint.family.title}, {whole:,} parameters, all of them trained, from {start}",
    ]
    for split, dataset in data.items():
        lines += [f"{split} data: {line}" for line in dataset.summary().splitlines()]
    written = "results"
    if plan is not None:
        dataset = data["train"]
        step = layout.global_batch(args)
        first = tokenizer.decode([int(i) for i in dataset[0]["input_ids"][:SHOWN_TOKENS]], skip_special=False)
        memory = memory_bytes(
            args, layout, checkpoint.family.shape(checkpoint.config), args.max_seq_length, whole, whole, dtype
        )
        lines += [
            f"steps: {plan.steps:,} of {step * args.max_seq_length:,} tokens each ({step:,} samples), "
            f"{plan.steps * step * args.max_seq_length:,} tokens in all",
            f"first sample begins: {first}",
            dropout_line(args, checkpoint),
            memory_line(memory, "full samples"),
            f"starts: {plan}",
        ]
        written = "weights, config.json, tokenizer, checkpoints, results, loss curve"
    lines.append(f"would write: {args.output_dir}/ ({written})")
    return "\n".join(lines)
