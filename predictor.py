"""Answers the prompts of a file, or chats, with a model: python predictor.py --model_name_or_path NAME ...

`--help` lists the arguments. `--data_file` holds JSON Lines with "src" (and "tgt", if known); the
answers go to `--output_file` in the same order. Several processes (`python -m paddle.distributed.launch`) share the
model, each with a part of every layer.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from utils import runtime, signals

if __name__ == "__main__":
    signals.take()  # before the slow imports

from utils.arguments import PredictArguments, parse
from utils.errors import run_script
from utils.inference.batch import answer_file
from utils.inference.benchmark import QUESTIONS_FILE, answer_examples, table
from utils.inference.chat import Chat, chat_in_terminal
from utils.inference.loading import check_model_type, fitting_src_length, load, prepare
from utils.inference.sampling import SamplingOptions
from utils.parallel.process_group import start
from utils.parallel.topology import Layout
from utils.paths import is_stream

if TYPE_CHECKING:
    from utils.inference.generator import Speed


def main() -> None:
    """Parses, checks, loads, answers."""
    runtime.prepare(answering=True)
    run = parse(PredictArguments, script="predictor.py")
    layout = Layout.of_prediction()
    layout.check_device(run)
    processes = start(layout, run.device)
    prepared = prepare(
        str(run.model_name_or_path),
        device=run.device,
        dtype=run.dtype,
        chat_template=run.chat_template,
        special_tokens_in_text=run.special_tokens_in_text,
        lora_path=run.lora_path,
        prefix_path=run.prefix_path,
        mode=run.mode,
        inference_model=run.inference_model,
        processes=processes,
    )
    check_model_type(run, prepared.checkpoint)
    src_length = fitting_src_length(run, prepared)
    options = sampling_options(run)
    load_now = partial(load, prepared, run.device, warm_up=run.benchmark)
    if run.interactive:
        generator = load_now()
        chat_in_terminal(Chat(prepared, generator, options, src_length), processes)
        speed: Speed | None = generator.speed
    elif run.data_file is None and run.benchmark:
        speed = answer_examples(prepared, load_now(), options, run.batch_size)
    else:
        speed = answer_file(
            Path(run.data_file) if run.data_file else QUESTIONS_FILE,
            Path(run.output_file),
            prepared,
            load_now,
            options,
            src_length=src_length,
            batch_size=run.batch_size,
            resume=run.resume,
        )
        if not is_stream(run.output_file):  # where these words would stand among the answers
            print(f"answers are in {run.output_file}")
    if run.benchmark:
        print(table(speed, run.device))


def sampling_options(run: PredictArguments) -> SamplingOptions:
    """The arguments as options of the generator."""
    return SamplingOptions(
        max_new_tokens=run.max_new_tokens or run.max_length - run.src_length,
        min_new_tokens=run.min_length,
        temperature=run.temperature,
        top_k=run.top_k if run.decode_strategy == "sampling" else 1,
        top_p=run.top_p,
        min_p=run.min_p,
        repetition_penalty=run.repetition_penalty,
        presence_penalty=run.presence_penalty,
        frequency_penalty=run.frequency_penalty,
        no_repeat_ngram_size=run.no_repeat_ngram_size,
        seed=run.seed,
        stop=tuple(run.stop),
        num_beams=run.num_beams,
        length_penalty=run.length_penalty,
        early_stopping=run.early_stopping,
        prompt_lookup_num_tokens=run.prompt_lookup_num_tokens,
    )


if __name__ == "__main__":
    run_script(main)
