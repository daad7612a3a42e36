"""`--dry_run`: what a run would do, computed from the same code that does it. Loads no Paddle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from utils.checkpoints.locate import Checkpoint
from utils.data.encode import IGNORED
from utils.data.template import ChatTemplate
from utils.families.tokenizers import Tokenizer
from utils.kernels import ways
from utils.parallel.topology import Layout
from utils.partition.picture import picture
from utils.training.batches import epoch_steps
from utils.training.memory import memory_bytes, memory_line
from utils.training.plan import Plan, method
from utils.training.start import model_settings, trained_parameters

if TYPE_CHECKING:
    from utils.arguments import FinetuneArguments, RunArguments

SHOWN_TOKENS = 400


def argument_lines(args: RunArguments) -> list[str]:
    """Every argument with its value, marked where the user gave none."""
    lines = []
    for name, value in args.to_json().items():
        mark = "" if name in args.provided else "  (default)"
        lines.append(f"  {name} = {value!r}{mark}")
    return lines


def marked_example(item: Any, tokenizer: Tokenizer) -> str:
    """One example as text; what the loss sees stands between ⟦ and ⟧."""
    ids, labels = list(item["input_ids"])[:SHOWN_TOKENS], list(item["labels"])[:SHOWN_TOKENS]
    # labels are shifted: the label at t supervises the token at t + 1
    learned = [False, *(label != IGNORED for label in labels)]
    tokens = [*ids, int(labels[-1])] if labels[-1] != IGNORED else ids
    text, start = "", 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or learned[end] != learned[start]:
            part = tokenizer.decode([int(i) for i in tokens[start:end]], skip_special=False)
            text += f"⟦{part}⟧" if learned[start] else part
            start = end
    return text


def training_lines(
    args: FinetuneArguments, layout: Layout, dataset: Any, tokenizer: Tokenizer, plan: Plan
) -> list[str]:
    """Steps, tokens per step, and one example with its loss mask visible."""
    if args.lazy:
        per_epoch = "a stream has no epochs"
    else:
        steps = epoch_steps(len(dataset), layout.global_batch(args))
        per_epoch = f"{steps:,} per epoch, about {dataset.report.tokens / steps:,.0f} tokens each"
    return [
        f"steps: {plan.steps:,} ({per_epoch})",
        "first example (the loss sees what stands in ⟦⟧):",
        marked_example(next(iter(dataset)), tokenizer),
    ]


def dropout_line(args: RunArguments, checkpoint: Checkpoint) -> str:
    """What training drops, and what decides it."""
    rates = checkpoint.family.dropout_rates(checkpoint.config)
    if not rates:
        return f"dropout: none, a {checkpoint.family.title} model has no such layers"
    if args.dropout is not None:
        return f"dropout: {', '.join(rates)} {args.dropout} ({args.origin('dropout')})"
    found = ", ".join(f"{of} {rate}" for of, rate in rates.items())
    return f"dropout: {found}, by the model's config.json; --dropout replaces it"


def operators_line(args: Any, checkpoint: Checkpoint, dtype: str, device: str) -> str:
    """Which way computes what."""
    settings, facts = model_settings(args, checkpoint), checkpoint.family.architecture(checkpoint.config)
    flash = ways.flash_attention(device, wanted=settings.use_flash_attention, plain_scores=facts.plain_scores)
    return ways.described(device, dtype, flash=flash, dropout=settings.dropouts.get("attention", 0.0))


def report(
    args: FinetuneArguments,
    layout: Layout,
    checkpoint: Checkpoint,
    dtype: str,
    device: str,
    data: dict[str, Any],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    plan: Plan | None,
) -> str:
    """The whole report as text; `plan` is None where nothing would be trained."""
    whole, trained = trained_parameters(args, checkpoint)
    shape = checkpoint.family.shape(checkpoint.config)
    lines = [
        "arguments:",
        *argument_lines(args),
        f"device: {device}, computing in {dtype}",
        operators_line(args, checkpoint, dtype, device),
        *picture(layout, args, shape.layers),
        f"model: {whole:,} parameters, {trained:,} of them trained ({method(args)})"
        if method(args) == "sft"
        else f"model: {whole:,} parameters, {trained:,} trained beside them ({method(args)})",
        f"chat template: {template.source}",
    ]
    for split, dataset in data.items():
        lines += [f"{split} data: {line}" for line in dataset.summary().splitlines()]
    if plan is not None:
        lines += training_lines(args, layout, data["train"], tokenizer, plan)
        lines += [
            dropout_line(args, checkpoint),
            memory_line(
                memory_bytes(args, layout, shape, args.max_length, whole, trained, dtype), "rows of max_length"
            ),
            f"starts: {plan}",
        ]
        written = "weights, tokenizer, template, checkpoints, results, loss curve"
    else:
        written = "results"
    if args.do_ptq or args.do_gptq:
        kind = f"PTQ {args.quant_type}, {args.ptq_step}" if args.do_ptq else f"GPTQ WINT4, {args.gptq_step}"
        lines.append(f"quantization: {kind} calibration batches; not part of this version yet, a real run says so")
    lines.append(f"would write: {args.output_dir}/ ({written})")
    return "\n".join(lines)
