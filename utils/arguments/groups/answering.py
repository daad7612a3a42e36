"""Answering prompts: which model, how long, how the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from utils.arguments.fields import Arguments, arg
from utils.arguments.groups.common import DEVICE_HELP, DTYPES, MODEL_HELP, SPECIAL_HELP


@dataclass
class AnsweringArguments(Arguments):
    """Which model answers, and how long prompt and answer may be."""

    group: ClassVar[str] = "Model"

    model_name_or_path: str | None = arg(None, MODEL_HELP, path=True)
    lora_path: str | None = arg(None, "folder of a LoRA adapter (PEFT folders too)", path=True)
    prefix_path: str | None = arg(None, "folder of a trained prefix", path=True)
    model_type: str | None = arg(None, "family that the checkpoint must be of, such as gpt-3; it says so itself")
    chat_template: str | None = arg(None, "a .jinja file that replaces the model's chat template", path=True)
    special_tokens_in_text: bool = arg(False, SPECIAL_HELP)
    mode: str = arg("dynamic", "run the model itself or an exported one", choices=("dynamic", "static"))
    inference_model: bool = arg(False, "use the fused inference model")
    quant_type: str = arg(
        "none",
        "low-bit format of the inference model",
        choices=("none", "weight_only_int8", "weight_only_int4", "a8w8"),
        needs=["inference_model"],
    )
    dtype: str | None = arg(None, "type of the weights; the checkpoint's own by default", choices=DTYPES)
    device: str = arg("gpu", DEVICE_HELP)
    src_length: int = arg(1024, "longest prompt; longer ones are cut", minimum=1, unit="tokens")
    max_length: int = arg(2048, "longest prompt and answer together", minimum=2, unit="tokens")


@dataclass
class PredictorArguments(AnsweringArguments):
    """Batch inference."""

    group: ClassVar[str] = "Prediction"

    data_file: str | None = arg(None, "JSON Lines with src, and tgt if known", path=True)
    output_file: str = arg("output.json", "JSON Lines with src, tgt and output, in the order of data_file", path=True)
    batch_size: int = arg(8, "prompts at a time; does not change greedy answers", minimum=1, unit="prompts")
    resume: bool = arg(True, "continue an interrupted run of the same inputs and arguments")
    interactive: bool = arg(False, "chat in the terminal instead of reading data_file")
    benchmark: bool = arg(False, "measure load time, time to first token and tokens per second")


@dataclass
class BasicSamplingArguments(Arguments):
    """How the next token is chosen: what every request may say of it too."""

    group: ClassVar[str] = "Sampling"

    top_k: int = arg(1, "sample from the k likeliest tokens; 1 is greedy, 0 is all", minimum=0)
    top_p: float = arg(1.0, "sample from the likeliest tokens of this total", above=0, maximum=1)
    temperature: float = arg(1.0, "divides the logits; 0 is greedy", minimum=0)
    repetition_penalty: float = arg(
        1.0, "divides the logits of tokens seen before; 1 is off", minimum=1e-6, maximum=1e6
    )


@dataclass
class SamplingArguments(BasicSamplingArguments):
    """How the next token is chosen, searched for or guessed."""

    group: ClassVar[str] = "Sampling"

    decode_strategy: str | None = arg(
        None,
        "beam_search with num_beams, greedy_search when top_k is 1, else sampling, by default",
        choices=("greedy_search", "sampling", "beam_search"),
    )
    min_p: float = arg(0.0, "leave out tokens less likely than this share of the likeliest", minimum=0, maximum=1)
    presence_penalty: float = arg(
        0.0, "subtracted from the logits of tokens of the answer so far", minimum=-1e6, maximum=1e6
    )
    frequency_penalty: float = arg(0.0, "the same, per occurrence", minimum=-1e6, maximum=1e6)
    no_repeat_ngram_size: int = arg(0, "no n-gram of this size occurs twice; 0 is off", minimum=0)
    num_beams: int = arg(
        1,
        "texts that grow together in beam search; each takes a place of batch_size",
        minimum=1,
        maximum=1024,
        unit="beams",
    )
    length_penalty: float = arg(
        1.0, "beam search: a score is the sum of log-probabilities / length ** this", minimum=-50, maximum=50
    )
    early_stopping: bool = arg(False, "beam search: end as soon as num_beams answers are complete")
    prompt_lookup_num_tokens: int = arg(
        0,
        "guess up to that many tokens from earlier text and verify them at once: faster, same answers; 0 is off",
        minimum=0,
        unit="tokens",
    )
    min_length: int = arg(0, "shortest answer", minimum=0, unit="tokens")
    max_new_tokens: int | None = arg(
        None, "longest answer; max_length - src_length by default", minimum=1, unit="tokens"
    )
    stop: list[str] = arg(  # noqa: RUF009
        [], "texts that end an answer, separated by commas or as a JSON list"
    )
    seed: int | None = arg(None, "seed of sampling; another each time by default", minimum=0, maximum=2**32 - 1)
