"""Where a run starts and whether there is anything to do; decided before any weights load, without Paddle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.adapters.check import PREFIX_CONFIG, adapter_weights
from utils.adapters.lora_files import read_lora
from utils.arguments.fields import show
from utils.checkpoints.files import check_replaceable, remove, remove_leftovers, write_json
from utils.checkpoints.fingerprint import fingerprint, same_base, tensors_digest
from utils.checkpoints.locate import Checkpoint
from utils.checkpoints.tensors import open_tensors
from utils.errors import UserError, notice, raise_if
from utils.parallel.topology import Layout
from utils.training import record, resume
from utils.training.record import ALL_RESULTS, ARGUMENTS, FINISHED, PROGRESS, RECORD, RESULTS

GLOBAL_BATCH = "global batch (per_device_train_batch_size x gradient_accumulation_steps x processes)"
ADAPTER = "start_adapter"  # of lora_path or prefix_path
EVALUATED_BY = (  # what the results of an evaluation depend on, beside weights and data
    "per_device_eval_batch_size",
    "eval_iters",
    "max_seq_length",
    "src_length",
    "max_length",
    "intokens",
    "eval_with_do_generation",
    "save_generation_output",
    "eval_max_new_tokens",
    "top_k",
    "top_p",
    "temperature",
)

if TYPE_CHECKING:
    from utils.arguments import FinetuneArguments, RunArguments
MEASURE_THE_SAME = ("per_device_eval_batch_size", "save_generation_output")  # whatever their values
UNTRAINED = {  # options that change nothing in the course of a training, or are part of what `describe` compares
    *EVALUATED_BY,
    *("model_name_or_path", "tokenizer_name_or_path", "chat_template", "dataset_name_or_path", "task_name"),
    *("max_train_samples", "max_eval_samples", "input_dir", "split", "lora_path", "prefix_path"),
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dry_run", "do_train", "do_eval", "do_predict"),
    *("device", "dataloader_num_workers", "disable_tqdm", "skip_memory_metrics", "report_to", "run_name"),
    *("logging_dir", "logging_strategy", "logging_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("tensor_parallel_degree", "pipeline_parallel_degree", "virtual_pp_degree", "sharding"),
    *("sharding_parallel_degree", "sequence_parallel", "unified_checkpoint", "async_save", "eval_accumulation_steps"),
}


@dataclass(frozen=True)
class Plan:
    """What a training run has to do.

    Attributes:
        steps: optimizer steps of the whole run, those done before included.
        run: what must stay the same when the run is continued, see `describe`.
        start: the checkpoint to continue from, or None to start anew.
        progress: what `start` says about its run.
        finished: output_dir holds the result of this very run; nothing is left to train.
        finished_steps: the optimizer steps of that result.
        result_step: the step after which its weights were what they are.
        differs: options that were others then, as text; "" without any.
        evaluation: of `describe_evaluation`; None without evaluations.
        comparable: whether the evaluations until `start` were of the same rows and settings.
    """

    steps: int
    run: dict[str, Any]
    start: Path | None = None
    progress: dict[str, Any] | None = None
    finished: bool = False
    finished_steps: int = 0
    result_step: int = 0
    differs: str = ""
    evaluation: dict[str, Any] | None = None
    comparable: bool = True

    def __str__(self) -> str:
        if self.finished:
            return "nothing, the training in output_dir is finished"
        return f"from {self.start}" if self.start else "anew"


def method(args: FinetuneArguments) -> str:
    """ "lora", "prefix" or "sft"."""
    return "lora" if args.lora else "prefix" if args.prefix_tuning else "sft"


def start_adapter(args: FinetuneArguments, checkpoint: Checkpoint) -> str | None:
    """The identity of the adapter that a run starts from: sha256 (hexadecimal) of its values; None without one."""
    if args.lora_path:
        return tensors_digest(read_lora(args.lora_path, checkpoint).tensors())
    if args.prefix_path:
        return tensors_digest(open_tensors(adapter_weights(Path(args.prefix_path), PREFIX_CONFIG)))
    return None


def describe(
    args: FinetuneArguments, layout: Layout, checkpoint: Checkpoint, dataset: Any, tokenizer: Any, template: Any
) -> dict[str, Any]:
    """What must not change between a run and its continuation, as JSON values.

    A stream has no fingerprint of its tokens: it is described by what makes them and by its files.
    """
    names = ["seed", "intokens", "lazy", "dropout"]
    names += {
        "lora": ["lora_rank", "lora_alpha", "lora_dropout", "rslora", "lora_target_modules"],
        "prefix": ["num_prefix_tokens", "prefix_projection", "prefix_projection_hidden_size"],
        "sft": [],
    }[method(args)]
    if args.lazy or args.intokens:
        names.append("max_length")
    if args.lazy:
        names += ["src_length", "max_train_samples"]
        data: Any = [tokenizer.fingerprint(), template.fingerprint(), dataset.fingerprint()]
    else:
        data = dataset.fingerprint()
    return {
        "model": fingerprint(checkpoint),
        "method": method(args),
        "data": data,
        ADAPTER: start_adapter(args, checkpoint),
        GLOBAL_BATCH: layout.global_batch(args),
        **{name: getattr(args, name) for name in names},
    }


def _is_same(key: str, saved: Any, value: Any) -> bool:
    if key == "model":
        return same_base(saved, value)
    if key == "data" and isinstance(value, list) and isinstance(saved, list) and len(saved) == 2:
        return saved == value[:2]  # a stream of an earlier version, which did not note its files
    return bool(saved == value)


def check_same_run(place: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuses to continue a run whose data or whose meaning of a step has changed.

    Args:
        place: what holds the earlier run, for the message.

    Raises:
        UserError: names each thing that differs, with both values where a person can read them.
    """
    faults = []
    for key, value in current.items():
        if key not in saved or _is_same(key, saved[key], value):
            continue
        if key == "model":
            what = "was trained from another model than model_name_or_path"
        elif key == ADAPTER:
            now = "the adapter of lora_path or prefix_path as it is now" if value else "a new adapter"
            what = f"began with {'another adapter' if saved[key] else 'a new adapter'}, not with {now}"
        elif key == "data":
            what = "was trained on other data (files, tokenizer, chat template or lengths have changed)"
        else:
            what = f"was trained with {key} = {saved[key]!r}, now it is {value!r}"
        faults.append(
            f"{place} {what}; restore it to continue, or start anew with another output_dir or --overwrite_output_dir"
        )
    raise_if(faults)


# --- before the data is read ----------------------------------------------------------------------


def check_output(args: RunArguments) -> None:
    """Refuses an output folder whose use would destroy what the run starts from, or what is of another origin.

    Raises:
        UserError: names each argument that lies there, the weights, or the model that is evaluated into it.
    """
    output = args.output.resolve()
    if not args.do_train:
        _check_evaluated(args, output)
        return
    faults = []
    if output.is_dir():
        if (output / PROGRESS).is_file():
            faults.append(f"output_dir {args.output_dir} is a checkpoint of a training; give another folder")
        elif found := record.foreign(output, filter(resume.is_checkpoint, sorted(output.iterdir()))):
            shown = ", ".join(found[: record.SHOWN]) + (", ..." if len(found) > record.SHOWN else "")
            faults.append(
                f"output_dir {args.output_dir} holds {shown}, which no training of this toolchain has left there and "
                "which this one would overwrite; give another folder"
            )
    for name in ("model_name_or_path", "tokenizer_name_or_path", "lora_path", "prefix_path", "resume_from_checkpoint"):
        value = getattr(args, name, None)
        if not isinstance(value, str) or not os.path.isdir(value):
            continue
        folder = Path(value).resolve()
        if folder == output or (args.overwrite_output_dir and output in folder.parents):
            faults.append(f"output_dir {args.output_dir}: training would overwrite {name} {value}; give another folder")
    raise_if(faults)


def _check_evaluated(args: RunArguments, output: Path) -> None:
    """Refuses to put an evaluation in the place of those of a training, unless it is of the result of that training."""
    if not (args.do_eval or args.do_predict) or not output.is_dir():
        return
    adapters = ("lora_path", "prefix_path")
    name = next((name for name in adapters if getattr(args, name, None)), "model_name_or_path")
    value = getattr(args, name)
    ours = (path for path in output.iterdir() if resume.is_checkpoint(path) and record.is_ours(path))
    trained = (output / FINISHED).is_file() or record.known_weights(output) or any(ours)
    if trained and Path(value).expanduser().resolve() != output:
        raise UserError(
            f"output_dir {args.output_dir} holds a training and is for evaluations of its result alone, which {name} "
            f"{value} is not; give another output_dir"
        )


def checkpoint_to_resume(args: RunArguments) -> Path | None:
    """The checkpoint that this run continues from: the one asked for, else the last good one.

    Raises:
        UserError: the one asked for is no complete checkpoint, there is none, or output_dir holds
            checkpoints that the run would have to destroy.
    """
    output, asked = args.output, args.resume_from_checkpoint
    good = resume.checkpoints(output) if output.is_dir() and not args.overwrite_output_dir else []
    if isinstance(asked, str):
        start: Path | None = Path(asked)
        resume.load_progress(Path(asked))
    elif asked is False:
        start = None
    else:
        start = good[-1] if good else None
    if asked is True and start is None:
        raise UserError(
            f"resume_from_checkpoint true: {output} holds no complete checkpoint"
            + (" that overwrite_output_dir would leave" if args.overwrite_output_dir else "; leave the option out")
        )
    done = resume.step_of(start) if start is not None else 0
    later = [folder.name for folder in good if resume.step_of(folder) > done]
    if later:
        raise UserError(
            f"output_dir {output} holds {', '.join(later)}, which a run {f'from {start}' if start else 'from step 0'} "
            "would overwrite; move them away, give another output_dir, or leave resume_from_checkpoint out"
        )
    for folder in resume.incomplete(output):
        notice(f"{folder} is incomplete and is ignored")
    return start


# --- once the data is known -----------------------------------------------------------------------


def make_plan(
    args: RunArguments, run: dict[str, Any], dataset: Any, steps: int, start: Path | None, dev: Any = None
) -> Plan:
    """Decides what a training run does.

    Args:
        run: of `describe`.
        dataset: the training data; a stream is put to the place of the checkpoint.
        steps: optimizer steps of the whole run.
        start: of `checkpoint_to_resume`.
        dev: the evaluation data, if there is any.

    Raises:
        UserError: data or settings differ from those of the checkpoint or of the finished run, or a training would
            replace what is read-only.
    """
    output = args.output
    marker = output / FINISHED
    if marker.is_file() and not args.overwrite_output_dir:
        advice = "remove it to train on from the last checkpoint, or give another output_dir"
        earlier = record.read_object(marker, advice)
        if faults := record.wrong(earlier, record.FINISHED_TYPES):
            raise UserError(f"{marker}: is damaged, {', '.join(faults)}; {advice}")
        check_same_run(f"output_dir {output}", earlier["run"], run)
        if earlier["global_step"] < steps and start is None:
            raise UserError(
                f"output_dir {output} holds a finished run of {earlier['global_step']} steps without checkpoints, so "
                f"it cannot be continued to {steps}; give another output_dir, or --overwrite_output_dir to start anew"
            )
        if earlier["global_step"] >= steps:
            gone = record.lost(output)
            if not gone:
                differs = differing(args, output)
                return Plan(
                    steps,
                    run,
                    finished=True,
                    finished_steps=earlier["global_step"],
                    result_step=earlier["result_step"],
                    differs=differs,
                )
            notice(f"{output} holds a finished training, but {', '.join(gone[: record.SHOWN])} is not there any more")
    old = filter(resume.is_checkpoint, sorted(output.glob("*"))) if args.overwrite_output_dir else ()
    check_replaceable([*record.replaced(output), *old])
    evaluation = None if dev is None else describe_evaluation(args, dev)
    if start is None:
        return Plan(steps, run, evaluation=evaluation)
    progress = resume.load_progress(start)
    check_same_run(str(start), progress["run"], run)
    if "stream" in progress:
        dataset.restore(progress["stream"])
    if progress["global_step"] > steps:
        raise UserError(
            f"{start} is at step {progress['global_step']}, behind the {steps} steps of this run; raise max_steps or "
            "num_train_epochs, or start anew with another output_dir or --overwrite_output_dir"
        )
    if differs := differing(args, start):
        notice(f"other options than those of {start}: {differs}; the new ones count from its step on")
    comparable = _comparable(progress.get("evaluation"), evaluation)
    if not comparable:
        notice(f"the evaluations until {start} were of other rows or settings: the best checkpoint is sought anew")
    return Plan(steps, run, start, progress, evaluation=evaluation, comparable=comparable)


def differing(args: RunArguments, folder: Path) -> str:
    """The options whose values were others when a folder was written, for a message."""
    try:
        earlier = record.read_object(folder / ARGUMENTS, "")
    except (OSError, UserError):  # only what is said depends on it
        return ""
    pairs = {name: (value, earlier.get(name, value)) for name, value in args.to_json().items() if name not in UNTRAINED}
    return ", ".join(f"{name} {show(new)} (was {show(old)})" for name, (new, old) in pairs.items() if new != old)


def _comparable(earlier: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> bool:
    """Whether two evaluations measure the same; of what is not known, it is taken for granted."""
    if earlier is None or now is None:
        return True
    return all(earlier.get(name, value) == value for name, value in now.items() if name not in MEASURE_THE_SAME)


def describe_evaluation(args: RunArguments, dataset: Any) -> dict[str, Any]:
    """What the results of an evaluation are made of, beside the weights, as JSON values."""
    return {"data": dataset.fingerprint(), **{name: getattr(args, name, None) for name in EVALUATED_BY}}


def clear_output(args: RunArguments) -> None:
    """Removes from output_dir what must not be taken for this run's: leftovers of killed saves, the
    finished mark and, with overwrite_output_dir, checkpoints and results of the run before. Its weights stay until
    there are new ones."""
    output = args.output
    if not output.is_dir():
        return
    remove_leftovers(output)
    old = {FINISHED, ALL_RESULTS, *RESULTS.values()}
    for path in output.iterdir():
        earlier = resume.is_checkpoint(path) and record.is_ours(path)
        if args.overwrite_output_dir and (earlier or path.name in old):
            remove(path)
    (output / FINISHED).unlink(missing_ok=True)
    if (output / RECORD).is_file():
        record.note_weights(output, record.known_weights(output))


def mark_finished(output: Path, plan: Plan, step: int, result_step: int) -> None:
    """Says in output_dir that its training has ended, and after which step its weights were chosen."""
    write_json(output / FINISHED, {"global_step": step, "result_step": result_step, "run": plan.run})


def check_positions(data: Mapping[str, Any], checkpoint: Checkpoint, max_length: int) -> None:
    """Refuses rows that are longer than the model has positions for.

    Args:
        data: datasets by split; a stream may bring rows of any length up to `max_length`.
    """
    positions = checkpoint.family.shape(checkpoint.config).positions
    faults = [
        f"max_length {max_length}: the {split} data has a row of {longest} tokens, {checkpoint.name} has {positions} "
        f"positions; set max_length to {positions} or less"
        for split, dataset in data.items()
        if positions and (longest := getattr(dataset, "longest", max_length)) > positions
    ]
    raise_if(faults)
