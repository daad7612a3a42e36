"""Checks across options: what contradicts itself, and what is missing among the options themselves.

Each check is a generator over the arguments of a run that yields one message per fault. It reads a
value before it says anything about it, so that the parser can stop it where a value is unreadable.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from utils.parallel.topology import world_size
from utils.paths import NO_FILE, PARTIAL, READ_ONLY, is_read_only, is_stream
from utils.runtime import gpu_present
from utils.splits import looks_like_path, split_files

ANSWER_METRICS = ("bleu4", "rouge1", "rouge2", "rougel")
TOKEN_METRICS = ("accuracy", "ppl", "loss")
TASKS = ("do_train", "do_eval", "do_predict", "do_ptq", "do_gptq")
SIZE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


# --- finetuning ----------------------------------------------------------------------------------


def finetune_required(run: Any) -> Iterator[str]:
    tasks = [name for name in TASKS if getattr(run, name)]
    if not tasks:
        yield f"nothing to do: set one of {', '.join(TASKS)}"
    else:
        if run.output_dir is None:
            yield f"output_dir is missing; {tasks[0]} writes its results there"
        if run.dataset_name_or_path is None:
            yield f"dataset_name_or_path is missing; {tasks[0]} needs rows, such as those in ./data"


def one_method(run: Any) -> Iterator[str]:
    if run.lora and run.prefix_tuning:
        yield f"{run.where('lora')} and {run.where('prefix_tuning')} exclude each other; turn one off"


def starting_points(run: Any) -> Iterator[str]:
    if run.lora_path is not None and not run.lora:
        yield f"{run.where('lora_path')} needs lora; add --lora true"
    if run.prefix_path is not None and not run.prefix_tuning:
        yield f"{run.where('prefix_path')} needs prefix_tuning; add --prefix_tuning true"


def lengths(run: Any) -> Iterator[str]:
    if run.src_length >= run.max_length:
        yield (
            f"{run.where('src_length')} must be below {run.where('max_length')}, which counts prompt "
            "and answer together; lower src_length or raise max_length"
        )


def generation_in_evaluation(run: Any) -> Iterator[str]:
    if not run.eval_with_do_generation:
        return
    if run.intokens:
        yield (
            f"{run.where('eval_with_do_generation')} and {run.where('intokens')} exclude each other: "
            "packed rows cannot be answered one by one; turn one off"
        )
    if run.eval_max_new_tokens > run.max_length - run.src_length and run.src_length < run.max_length:
        yield (
            f"{run.where('eval_max_new_tokens')} is more than max_length - src_length = "
            f"{run.max_length - run.src_length} leaves room for"
        )


def lazy_reading(run: Any) -> Iterator[str]:
    if not run.lazy:
        return
    if run.do_train and run.max_steps < 1:
        yield f"{run.where('lazy')} needs max_steps: rows read while training have no known number"
    for name in ("evaluation_strategy", "save_strategy"):
        if run.do_train and getattr(run, name) == "epoch":
            yield f"{run.where('lazy')} and {run.where(name)}: streamed rows have no epochs; use steps"


def best_model(run: Any) -> Iterator[str]:
    if run.evaluation_strategy != "no" and not run.do_eval:
        strategy = run.where("evaluation_strategy")
        yield f"{strategy} and {run.where('do_eval')} contradict; add --evaluation_strategy no"
    metric, generated = run.metric_for_best_model, getattr(run, "eval_with_do_generation", False)
    known = ANSWER_METRICS if generated else TOKEN_METRICS
    if metric is not None and metric not in known:
        asked = hasattr(run, "eval_with_do_generation")
        reason = f"with eval_with_do_generation {str(generated).lower()} " if asked else ""
        yield f"{run.where('metric_for_best_model')}: {reason}it is one of {', '.join(known)}"
    if not (run.load_best_model_at_end and run.do_train):
        return
    if run.evaluation_strategy == "no" or run.evaluation_strategy != run.save_strategy:
        found = f"{run.where('evaluation_strategy')} and {run.where('save_strategy')}"
        yield (
            f"{run.where('load_best_model_at_end')} needs evaluation_strategy and save_strategy to be both "
            f"steps or both epoch; they are {found}"
        )
    elif run.save_strategy == "steps" and run.save_steps % run.eval_steps:
        yield (
            f"{run.where('load_best_model_at_end')} needs every checkpoint evaluated: "
            f"{run.where('save_steps')} must be a multiple of {run.where('eval_steps')}"
        )


def steps(run: Any) -> Iterator[str]:
    if run.max_steps == 0:
        yield f"{run.where('max_steps')}: expected -1 (as many as num_train_epochs take) or at least 1"


def precision(run: Any) -> Iterator[str]:
    if run.fp16 and run.bf16:
        yield f"{run.where('fp16')} and {run.where('bf16')} exclude each other; turn one off"


def quantization(run: Any) -> Iterator[str]:
    if run.do_ptq and run.do_gptq:
        yield f"{run.where('do_ptq')} and {run.where('do_gptq')} exclude each other; turn one off"
    for name in ("shift", "smooth"):
        if getattr(run, name) and not run.do_ptq:
            yield f"{run.where(name)} needs do_ptq; add --do_ptq true"


# --- several processes ---------------------------------------------------------------------------


def parallel_degrees(run: Any) -> Iterator[str]:
    """The degrees must divide the number of processes that the launcher started."""
    degrees = {
        name: max(1, getattr(run, name))
        for name in ("tensor_parallel_degree", "pipeline_parallel_degree", "sharding_parallel_degree")
        if name != "sharding_parallel_degree" or run.sharding
    }
    for name in degrees:
        if getattr(run, name) == 0:
            yield f"{run.where(name)}: expected -1 (none) or at least 1"
    if run.sequence_parallel and degrees["tensor_parallel_degree"] == 1:
        yield f"{run.where('sequence_parallel')} needs tensor_parallel_degree above 1"
    if run.virtual_pp_degree > 1:
        stages, steps = degrees["pipeline_parallel_degree"], run.gradient_accumulation_steps
        if stages == 1:
            yield f"{run.where('virtual_pp_degree')} needs pipeline_parallel_degree above 1"
        elif steps < 2 * stages:
            yield (
                f"{run.where('virtual_pp_degree')} needs at least {2 * stages} micro-batches a step, twice as many as "
                f"pipeline stages: set gradient_accumulation_steps to {2 * stages} or more"
            )
    wanted = 1
    for degree in degrees.values():
        wanted *= degree
    running = world_size()
    if running % wanted:
        named = [name for name, degree in degrees.items() if degree > 1]
        product = " times ".join(run.where(name) for name in named)
        alone = " ".join(f"--{name} 1" for name in named)
        cards = ",".join(map(str, range(wanted)))
        # on a machine without GPUs the launcher answers --gpus with a traceback, "substring not found"
        number = f'--gpus "{cards}"' if gpu_present() else f"--nproc_per_node {wanted}"
        yield (
            f"{product} needs {wanted} processes or a multiple of it, and {running} "
            f"{'is' if running == 1 else 'are'} running; either start {wanted}: python -u -m "
            f"paddle.distributed.launch {number} {run.command}, or add {alone}"
        )


# --- files and folders ---------------------------------------------------------------------------


def dataset(run: Any) -> Iterator[str]:
    """A dataset folder must hold the splits that the run reads."""
    folder = run.dataset_name_or_path
    if folder is None or not looks_like_path(folder):
        return
    if not os.path.isdir(folder):
        found = "is a file" if os.path.exists(folder) else "does not exist"
        named = run.where("dataset_name_or_path")
        yield f"{named} {found}; expected a folder with train.json or train/*.json"
        return
    splits = []
    if run.do_train:
        splits.append("train")
    if run.do_eval:
        splits.append("dev")
    if run.do_predict:
        splits.append("test")
    if (run.do_ptq or run.do_gptq) and "train" not in splits and not split_files(folder, "quant"):
        splits.append("train")
    for split in splits:
        if not split_files(folder, split):
            yield f"{run.where('dataset_name_or_path')} has neither {split}.json nor {split}/*.json (nor .jsonl)"


def output_folder(run: Any) -> Iterator[str]:
    for name in ("output_dir", "logging_dir"):
        if getattr(run, name) is not None:
            yield from unwritable(run, name)


def named_files(run: Any) -> Iterator[str]:
    """What is named as a path must be there: model, tokenizer, chat template, adapters."""
    for name in ("model_name_or_path", "tokenizer_name_or_path"):
        if getattr(run, "mode", "dynamic") == "static":
            continue  # `static_folder` says more
        value = getattr(run, name, None)
        if value is not None and looks_like_path(value) and not os.path.isdir(value):
            yield f"{run.where(name)}: no such folder"
    for name in ("chat_template", "data_file"):
        value = getattr(run, name, None)
        if value is None or os.path.isfile(value):
            continue
        if os.path.isdir(value):
            yield f"{run.where(name)}: is a folder; expected a file"
        elif is_stream(value):
            yield f"{run.where(name)}: {NO_FILE}"
        else:
            yield f"{run.where(name)}: no such file"
    yield from adapter(run, "lora_path", "lora")
    yield from adapter(run, "prefix_path", "prefix")
    resume = getattr(run, "resume_from_checkpoint", None)
    if isinstance(resume, str) and not os.path.isdir(resume):
        named = run.where("resume_from_checkpoint")
        yield f"{named}: no such folder; true means the last checkpoint in output_dir"


def adapter(run: Any, name: str, kind: str) -> Iterator[str]:
    """The folder of an adapter or prefix must hold its settings and its weights; LoRA may be in PEFT's layout."""
    folder = getattr(run, name, None)
    if folder is not None:
        yield from adapter_folder(run.where(name), folder, kind)


def adapter_folder(named: str, folder: str, kind: str) -> Iterator[str]:
    """What is wrong with the folder of an adapter or prefix, which messages call `named`."""
    if not os.path.isdir(folder):
        yield f"{named}: no such folder"
        return
    files = os.listdir(folder)
    if f"{kind}_config.json" in files:
        weights = f"{kind}_model_state"
    elif kind == "lora" and "adapter_config.json" in files:
        weights = "adapter_model"
    else:
        yield f"{named} has no {kind}_config.json; name the output folder of {kind} training"
        return
    if not any(file.startswith(weights) for file in files):
        yield f"{named} has no {weights}.safetensors; its training did not finish"


def unwritable(run: Any, name: str) -> Iterator[str]:
    """Whether a folder could be made, or written into, at a path; finds out without leaving a trace."""
    path = os.path.abspath(getattr(run, name))
    if is_read_only(path):
        yield f"{run.where(name)} cannot be written: it is read-only (chmod u+w would allow it)"
        return
    while True:
        try:
            os.lstat(path)
            break
        except (FileNotFoundError, NotADirectoryError):
            path = os.path.dirname(path)
        except OSError as error:
            yield f"{run.where(name)} cannot be written: {path}: {error.strerror}"
            return
    if not os.path.isdir(path):
        yield f"{run.where(name)} cannot be written: {path} is not a folder"
    elif not _accepts_files(path):
        yield f"{run.where(name)} cannot be written: no permission to write in {path}"


def _accepts_files(folder: str) -> bool:
    if not os.access(folder, os.W_OK | os.X_OK):
        return False
    if os.path.realpath(folder).split("/")[1] in ("proc", "sys"):  # root may, but the kernel refuses
        return False
    if not hasattr(os, "O_TMPFILE"):
        return True
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY))  # a file without a name, gone when closed
    except PermissionError:
        return False
    except OSError:
        return True  # this file system cannot tell
    return True


# --- prediction and merging ----------------------------------------------------------------------


def model_required(run: Any) -> Iterator[str]:
    if run.model_name_or_path is None:
        yield "model_name_or_path is missing; name a model, such as smollm2-135m-instruct"


def predict_required(run: Any) -> Iterator[str]:
    # The documented commands of the inference model bring no data_file: they answer built-in prompts.
    if run.data_file is None and not (run.interactive or run.benchmark or run.inference_model):
        yield "data_file is missing; name a JSON Lines file with src, or use --interactive"


def one_adapter(run: Any) -> Iterator[str]:
    if run.lora_path is not None and run.prefix_path is not None:
        yield f"{run.where('lora_path')} and {run.where('prefix_path')} exclude each other; leave one out"
    for name in ("lora_path", "prefix_path"):
        if getattr(run, name) is not None and getattr(run, "mode", "dynamic") == "static":
            step = f"an exported model has its adapter inside: python export_model.py --{name} ..."
            yield f"{run.where(name)} and {run.where('mode')} exclude each other; {step}"


def new_tokens(run: Any) -> Iterator[str]:
    room = run.max_length - run.src_length
    if room > 0 and run.max_new_tokens > room:
        limits = f"{run.where('max_length')} minus {run.where('src_length')}"
        yield f"{run.where('max_new_tokens')} is more than {limits}"
    if room > 0 and run.min_length > run.max_new_tokens:
        yield f"{run.where('min_length')} is more than {run.where('max_new_tokens')}"


def strategy(run: Any) -> Iterator[str]:
    """Greedy search, sampling and beam search have options of their own that exclude each other."""
    chosen = run.decode_strategy
    samples = {
        "top_k": run.top_k != 1,
        "top_p": run.top_p != 1,
        "min_p": run.min_p != 0,
        "temperature": run.temperature not in (0, 1),
    }
    if chosen == "beam_search":
        if run.num_beams == 1:
            yield f"{run.where('decode_strategy')} needs num_beams above 1; add --num_beams 4"
        for name in [name for name, given in samples.items() if given]:
            yield f"{run.where(name)} is of sampling and has no place in beam search; leave out one of them"
        if run.prompt_lookup_num_tokens:
            yield f"{run.where('prompt_lookup_num_tokens')} does not work with beam search; leave one out"
        return
    if run.num_beams > 1:
        yield f"{run.where('num_beams')} needs decode_strategy beam_search, and it is {run.where('decode_strategy')}"
    elif run.length_penalty != 1:
        yield f"{run.where('length_penalty')} has no effect without num_beams above 1"
    if run.num_beams == 1 and run.early_stopping:
        yield f"{run.where('early_stopping')} has no effect without num_beams above 1"
    if chosen == "greedy_search" and samples["top_k"]:
        yield f"{run.where('top_k')} is of sampling; leave it out, or set decode_strategy sampling"


def prediction_files(run: Any) -> Iterator[str]:
    """The answers, and those of an unfinished run beside them, must have a place."""
    named = run.where("output_file")
    if os.path.isdir(run.output_file):
        yield f"{named} is a folder; expected the name of a file"
        return
    if is_stream(run.output_file):
        if not os.access(run.output_file, os.W_OK):
            yield f"{named} cannot be written: no permission"
        return
    target = os.path.realpath(run.output_file)
    if run.data_file is not None and os.path.realpath(run.data_file) in (target, target + PARTIAL):
        yield f"{named} would overwrite {run.where('data_file')}"
    folder, unfinished = os.path.dirname(target), target + PARTIAL
    if not os.path.isdir(folder):
        yield f"{named}: there is no folder {folder}"
    elif not _accepts_files(folder):
        yield f"{named} cannot be written: no permission to write in {folder}"
    elif is_read_only(target):
        yield f"{named} {READ_ONLY}, or name another file"
    elif os.path.lexists(unfinished) and (not os.path.isfile(unfinished) or is_read_only(unfinished)):
        kind = "read-only" if os.path.isfile(unfinished) else "no file"
        yield f"{named}: answers are kept in {unfinished} until all are there, but it is {kind}; move it away"


def static_folder(run: Any) -> Iterator[str]:
    """A static program comes from a folder."""
    name = run.model_name_or_path
    if run.mode == "static" and name is not None and not os.path.isdir(name):
        model, output = ("MODEL", name) if looks_like_path(name) else (name, "./inference")
        yield (
            f"{run.where('model_name_or_path')}: no such folder; --mode static runs an exported model: python "
            f"export_model.py --model_name_or_path {model} --output_path {output}"
        )


def low_bit_inference(run: Any) -> Iterator[str]:
    if run.inference_model and run.quant_type != "none":
        yield f"{run.where('quant_type')}: low-bit inference is not part of this version yet; leave it out"


def export_required(run: Any) -> Iterator[str]:
    if run.model_name_or_path is None:
        yield "model_name_or_path is missing; name the model to export"
    yield from unwritable(run, "output_path")


def merge_required(run: Any) -> Iterator[str]:
    for name, step in (("model_name_or_path", "base of the adapter"), ("lora_path", "folder of the adapter")):
        if getattr(run, name) is None:
            yield f"{name} is missing; name the {step}"


def merge_folders(run: Any) -> Iterator[str]:
    target = run.merge_model_path
    if target is None:
        return
    yield from unwritable(run, "merge_model_path")
    for name in ("lora_path", "model_name_or_path"):
        source = getattr(run, name)
        if source is not None and os.path.realpath(source) == os.path.realpath(target):
            yield f"{run.where('merge_model_path')} would overwrite {run.where(name)}; name another folder"


def shard_folder(run: Any) -> Iterator[str]:
    """Shards are in a folder; the result goes into another, or beside them."""
    source = run.model_name_or_path
    if source is None:
        yield "model_name_or_path is missing; name the folder with the shards model_state.tp00.pdparams, ..."
    elif not os.path.isdir(source):
        yield f"{run.where('model_name_or_path')}: no such folder; expected one with shards model_state.tp00.pdparams"
    elif run.merge_model_path is None:
        yield from unwritable(run, "model_name_or_path")
    if run.merge_model_path is not None:
        yield from unwritable(run, "merge_model_path")


def shard_size(run: Any) -> Iterator[str]:
    size = run.max_shard_size
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?([KMGT]?B)?", size) or not bytes_of(size):
        yield f"{run.where('max_shard_size')}: expected a size such as 500MB or 5GB"


def bytes_of(size: str) -> int:
    """A size such as "5GB" in bytes; units of 1000."""
    number = size.rstrip("BKMGT")
    return int(float(number) * SIZE_UNITS[size[len(number) :] or "B"])
