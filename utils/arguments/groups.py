"""The options by topic, as mix-ins: what several scripts share is declared once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from utils.arguments.fields import Arguments, arg

DTYPES = ("float32", "float16", "bfloat16")
DEVICE_HELP = "cpu, gpu or gpu:N; without a GPU the default is cpu"
SPECIAL_HELP = (
    "take special tokens written in texts for what they are, for texts that were rendered beforehand; by default "
    "they are text"
)
GENERATING = ["eval_with_do_generation"]


@dataclass
class ModelArguments(Arguments):
    """Which model."""

    group: ClassVar[str] = "Model"

    model_name_or_path: str | None = arg(
        None, "model: a folder, a hub name, or smollm2-135m-instruct (comes with the installation)", path=True
    )
    tokenizer_name_or_path: str | None = arg(None, "tokenizer, if it is not the model's own", path=True)
    use_flash_attention: bool = arg(False, "use the fused attention of the GPU build")


@dataclass
class AdapterArguments(Arguments):
    """What finetuning trains of a model, and how conversations become text."""

    group: ClassVar[str] = "Model"

    chat_template: str | None = arg(None, "a .jinja file that replaces the model's chat template", path=True)
    lora: bool = arg(False, "train low-rank adapters (LoRA) instead of all weights")
    lora_path: str | None = arg(
        None, "folder of an adapter to start from (PEFT folders too)", needs=["lora"], path=True
    )
    lora_rank: int = arg(8, "rank of the adapters", minimum=1, needs=["lora"])
    lora_alpha: float | None = arg(
        None, "scale of the adapters, divided by the rank; 2 * lora_rank by default", above=0, needs=["lora"]
    )
    lora_dropout: float = arg(
        0.0, "share of the adapters' inputs dropped in training", minimum=0, below=1, needs=["lora"]
    )
    lora_target_modules: list[str] | None = arg(  # noqa: RUF009
        None,
        "names of the Linear layers to adapt, such as q_proj,v_proj; all Linear layers by default",
        needs=["lora"],
    )
    rslora: bool = arg(False, "scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA)", needs=["lora"])
    lora_plus_scale: float = arg(
        1.0,
        "learning rate of the B matrices relative to that of the A matrices (LoRA+)",
        above=0,
        needs=["lora"],
    )
    prefix_tuning: bool = arg(False, "train a prefix of keys and values instead of the weights")
    prefix_path: str | None = arg(None, "folder of a prefix to start from", needs=["prefix_tuning"], path=True)
    num_prefix_tokens: int = arg(128, "length of the prefix", minimum=1, unit="tokens", needs=["prefix_tuning"])
    prefix_projection: bool = arg(
        False, "compute the prefix by a small network while training", needs=["prefix_tuning"]
    )
    prefix_projection_hidden_size: int | None = arg(
        None, "width of that network; the model's own by default", minimum=1, needs=["prefix_projection"]
    )
    neftune: bool = arg(False, "add noise to the embeddings in training (NEFTune)")
    neftune_noise_alpha: float = arg(5.0, "strength of that noise", minimum=0, needs=["neftune"])


@dataclass
class DataArguments(Arguments):
    """Which rows, and how long they may be."""

    group: ClassVar[str] = "Data"

    dataset_name_or_path: str | None = arg(
        None,
        "folder with train.json or train/*.json, and dev likewise; or the name of a built-in dataset",
        path=True,
    )
    task_name: str | None = arg(None, "task within a built-in dataset", needs=["dataset_name_or_path"])
    intokens: bool = arg(False, "pack rows up to max_length instead of padding them (InTokens)")
    lazy: bool = arg(False, "read the rows while training, in constant memory; needs max_steps")
    src_length: int = arg(1024, "longest prompt; longer ones are cut", minimum=1, unit="tokens")
    max_length: int = arg(2048, "longest prompt and answer together", minimum=2, unit="tokens")
    max_train_samples: int | None = arg(None, "use only that many rows for training", minimum=1, unit="rows")
    max_eval_samples: int | None = arg(None, "use only that many rows for evaluation", minimum=1, unit="rows")
    special_tokens_in_text: bool = arg(False, SPECIAL_HELP)


@dataclass
class PretrainDataArguments(Arguments):
    """Which text is pretrained on, and where training starts and ends."""

    group: ClassVar[str] = "Pretraining"

    input_dir: str | None = arg(
        None,
        "folder of token files PREFIX.bin and PREFIX.idx, one such PREFIX, or several with weights, as in "
        "w1 prefix1 w2 prefix2",
        path=True,
    )
    split: str = arg("949,50,1", "shares of the documents for training, validation and test")
    max_seq_length: int = arg(1024, "tokens of a sample", minimum=1, unit="tokens")
    continue_training: bool = arg(False, "start from the model's weights instead of new random ones")
    min_learning_rate: float = arg(0.0, "where the learning rate ends; linear, cosine and polynomial", minimum=0)
    eval_iters: int | None = arg(
        100, "batches of an evaluation, spread over its part of the text; none is all of it", minimum=1, unit="batches"
    )


@dataclass
class GenerateArguments(Arguments):
    """Generation during evaluation."""

    group: ClassVar[str] = "Generation during evaluation"

    eval_with_do_generation: bool = arg(
        False, "evaluate generated answers (BLEU-4 and Rouge) instead of perplexity and accuracy"
    )
    save_generation_output: bool = arg(False, "keep them in generated_output.json in output_dir", needs=GENERATING)
    eval_max_new_tokens: int | None = arg(
        None,
        "longest generated answer; max_length - src_length, at most 512, by default",
        minimum=1,
        unit="tokens",
        needs=GENERATING,
    )
    top_k: int = arg(1, "sample from the k likeliest tokens; 1 is greedy, 0 is all", minimum=0, needs=GENERATING)
    top_p: float = arg(1.0, "sample from the likeliest tokens of this total", above=0, maximum=1, needs=GENERATING)
    temperature: float = arg(1.0, "divides the logits; 0 is greedy", minimum=0, needs=GENERATING)


@dataclass
class QuantArguments(Arguments):
    """Quantization after training."""

    group: ClassVar[str] = "Quantization (not part of this version yet)"

    quant_type: str = arg(
        "A8W8",
        "bits of activations and weights",
        choices=("A8W8", "WINT4", "WINT8"),
        needs=["do_ptq", "do_gptq"],
    )
    do_ptq: bool = arg(False, "quantize after training (PTQ)")
    ptq_step: int = arg(32, "calibration batches", minimum=1, unit="batches", needs=["do_ptq"])
    shift: bool = arg(False, "shift activations before PTQ; needs do_ptq")
    shift_all_linear: bool = arg(False, "shift before every Linear, at the cost of two operators", needs=["shift"])
    shift_sampler: str = arg(
        "none",
        "zero points from minimum and maximum, or their moving average",
        choices=("none", "ema"),
        needs=["shift"],
    )
    shift_step: int = arg(32, "batches that shift looks at", minimum=1, unit="batches", needs=["shift"])
    smooth: bool = arg(False, "smooth activations before PTQ (SmoothQuant); needs do_ptq")
    smooth_all_linears: bool = arg(False, "smooth before every Linear, at the cost of two operators", needs=["smooth"])
    smooth_sampler: str = arg(
        "none",
        "multi_step keeps several batches, in more memory",
        choices=("none", "multi_step"),
        needs=["smooth"],
    )
    smooth_step: int = arg(32, "batches that smooth looks at", minimum=1, unit="batches", needs=["smooth"])
    smooth_piecewise_search: bool = arg(
        False, "search the strength piece by piece of the activations", needs=["smooth"]
    )
    smooth_k_piece: int = arg(
        3, "number of pieces; 3 suits 10B models, 6 suits 100B", minimum=1, needs=["smooth_piecewise_search"]
    )
    smooth_search_piece: bool = arg(
        False, "search the number of pieces too, which takes long", needs=["smooth_piecewise_search"]
    )
    do_gptq: bool = arg(False, "quantize weights to 4 bits by GPTQ: slower, more exact")
    gptq_step: int = arg(8, "calibration batches", minimum=1, unit="batches", needs=["do_gptq"])


@dataclass
class TrainingArguments(Arguments):
    """The training loop: what it does, how it learns, when it saves, on which devices."""

    group: ClassVar[str] = "Training"

    output_dir: str | None = arg(None, "folder for weights, checkpoints and results", path=True)
    overwrite_output_dir: bool = arg(
        False, "start anew: checkpoints and results of an earlier training in output_dir go, and nothing else"
    )
    do_train: bool = arg(False, "train")
    do_eval: bool = arg(False, "evaluate on the dev rows; in pretraining, on the validation part of split")
    do_predict: bool = arg(False, "evaluate on the rows of test.json; in pretraining, on the test part of split")
    dry_run: bool = arg(False, "show what would happen and stop before the weights load")
    per_device_train_batch_size: int = arg(8, "rows per device and forward", minimum=1, unit="rows")
    per_device_eval_batch_size: int = arg(8, "rows per device and forward in evaluation", minimum=1, unit="rows")
    gradient_accumulation_steps: int = arg(1, "forwards per update", minimum=1)
    eval_accumulation_steps: int | None = arg(
        None,
        "evaluation batches whose scores are kept on the device before they move to memory; all by default",
        minimum=1,
        unit="batches",
    )
    num_train_epochs: float = arg(3.0, "how often every row is seen", above=0, unit="epochs")
    max_steps: int = arg(-1, "updates; overrides num_train_epochs when positive", minimum=-1, unit="updates")
    learning_rate: float = arg(5e-5, "highest learning rate", minimum=0)
    lr_scheduler_type: str = arg(
        "linear",
        "course of the learning rate after warm-up",
        choices=("linear", "cosine", "constant", "constant_with_warmup", "polynomial"),
    )
    warmup_steps: int = arg(0, "updates of warm-up; overrides warmup_ratio when positive", minimum=0, unit="updates")
    warmup_ratio: float = arg(0.0, "share of all updates that warm up", minimum=0, maximum=1)
    weight_decay: float = arg(0.0, "AdamW's decay of matrices; vectors (norms, biases) do not decay", minimum=0)
    adam_beta1: float = arg(0.9, "AdamW's first moment", minimum=0, below=1)
    adam_beta2: float = arg(0.999, "AdamW's second moment", minimum=0, below=1)
    adam_epsilon: float = arg(1e-8, "AdamW's epsilon", above=0)
    max_grad_norm: float = arg(1.0, "gradients are scaled down to this norm; 0 leaves them", minimum=0)
    seed: int = arg(42, "seed of weights, order and dropout", minimum=0, maximum=2**32 - 1)
    dropout: float | None = arg(
        None,
        "share that training drops of attention, hidden states and embeddings, as far as the model's family drops "
        "any; those of its config.json by default",
        minimum=0,
        below=1,
        needs=["do_train"],
    )
    recompute: bool = arg(False, "compute activations twice to save memory")
    fp16: bool = arg(False, "compute in float16 where the device can")
    bf16: bool = arg(False, "compute in bfloat16 where the device can")
    fp16_opt_level: str = arg(
        "O1",
        "O1: chosen operators in half precision; O2: the weights too",
        choices=("O1", "O2"),
        needs=["fp16", "bf16"],
    )
    dataloader_num_workers: int = arg(
        0, "batches that a thread makes ahead of the training; 0 makes each when it is needed", minimum=0
    )
    device: str = arg("gpu", DEVICE_HELP)


@dataclass
class ReportArguments(Arguments):
    """What a training run says, keeps and resumes from."""

    group: ClassVar[str] = "Logging, evaluation and saving"

    logging_strategy: str = arg("steps", "when to log", choices=("no", "steps", "epoch"))
    logging_steps: int = arg(500, "updates between two log lines", minimum=1, unit="updates")
    logging_dir: str | None = arg(None, "folder of VisualDL's log; within output_dir by default", path=True)
    report_to: list[str] = arg(  # noqa: RUF009
        ["visualdl"],
        "trackers that get the figures, if installed",
        choices=("visualdl", "tensorboard", "wandb", "swanlab", "none"),
    )
    run_name: str | None = arg(None, "name of the run in the trackers")
    disable_tqdm: bool = arg(False, "show no progress bar")
    skip_memory_metrics: bool = arg(True, "leave train_memory_gib out of train_results.json")
    evaluation_strategy: str = arg("no", "when to evaluate in training", choices=("no", "steps", "epoch"))
    eval_steps: int | None = arg(
        None, "updates between evaluations; logging_steps by default", minimum=1, unit="updates"
    )
    eval_on_start: bool = arg(False, "evaluate before the first update too, to compare with")
    save_strategy: str = arg(
        "no",
        "when to save checkpoints; steps if save_steps alone is given; an interrupted training saves one anyway",
        choices=("no", "steps", "epoch"),
    )
    save_steps: int = arg(500, "updates between checkpoints", minimum=1, unit="updates")
    save_total_limit: int | None = arg(None, "checkpoints kept; older ones are deleted; all by default", minimum=1)
    load_best_model_at_end: bool = arg(False, "end with the best checkpoint instead of the last")
    metric_for_best_model: str | None = arg(
        None,
        "what best means: accuracy, ppl or loss; with eval_with_do_generation bleu4, rouge1, rouge2 or "
        "rougel; loss or bleu4 by default",
    )
    greater_is_better: bool | None = arg(None, "whether more of it is better; false for loss and ppl by default")
    resume_from_checkpoint: bool | str | None = arg(
        None, "a checkpoint folder, or true for the last one in output_dir", path=True
    )


@dataclass
class ParallelArguments(Arguments):
    """How the processes of a launch share the work; data parallelism takes what is left."""

    group: ClassVar[str] = "Parallel training"

    tensor_parallel_degree: int = arg(-1, "processes that share every layer; -1 is none", minimum=-1)
    pipeline_parallel_degree: int = arg(-1, "processes that share the layers in turn; -1 is none", minimum=-1)
    virtual_pp_degree: int = arg(
        1, "parts of the layers that each pipeline stage has: more of them wait less for each other", minimum=1
    )
    sharding: str = arg(
        "",
        "what data-parallel processes share: optimizer state, gradients, weights",
        choices=("", "stage1", "stage2", "stage3"),
        refused={
            f"{stage} offload": f"state on the CPU is not part of this version; use {stage}, with more processes"
            for stage in ("stage2", "stage3")
        },
    )
    sharding_parallel_degree: int = arg(
        -1, "processes that share by sharding; -1 is all that are left", minimum=-1, needs=["sharding"]
    )
    sequence_parallel: bool = arg(False, "split the sequence too; needs tensor_parallel_degree above 1")
    unified_checkpoint: bool = arg(
        False, "SFT: checkpoints of tensor-parallel runs hold whole weights, not a shard per process"
    )
    async_save: bool = arg(False, "train on while a checkpoint is written; needs memory for a copy of it")


@dataclass
class PredictorArguments(Arguments):
    """Batch inference."""

    group: ClassVar[str] = "Prediction"

    model_name_or_path: str | None = arg(
        None, "model: a folder, a hub name, or smollm2-135m-instruct (comes with the installation)", path=True
    )
    lora_path: str | None = arg(None, "folder of a LoRA adapter (PEFT folders too)", path=True)
    prefix_path: str | None = arg(None, "folder of a trained prefix", path=True)
    model_type: str | None = arg(None, "family that the checkpoint must be of, such as gpt-3; it says so itself")
    chat_template: str | None = arg(None, "a .jinja file that replaces the model's chat template", path=True)
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
    data_file: str | None = arg(None, "JSON Lines with src, and tgt if known", path=True)
    special_tokens_in_text: bool = arg(False, SPECIAL_HELP)
    output_file: str = arg("output.json", "JSON Lines with src, tgt and output, in the order of data_file", path=True)
    batch_size: int = arg(8, "prompts at a time; does not change greedy answers", minimum=1, unit="prompts")
    src_length: int = arg(1024, "longest prompt; longer ones are cut", minimum=1, unit="tokens")
    max_length: int = arg(2048, "longest prompt and answer together", minimum=2, unit="tokens")
    resume: bool = arg(True, "continue an interrupted run of the same inputs and arguments")
    interactive: bool = arg(False, "chat in the terminal instead of reading data_file")
    benchmark: bool = arg(False, "measure load time, time to first token and tokens per second")


@dataclass
class SamplingArguments(Arguments):
    """How the next token is chosen."""

    group: ClassVar[str] = "Sampling"

    decode_strategy: str | None = arg(
        None,
        "beam_search with num_beams, greedy_search when top_k is 1, else sampling, by default",
        choices=("greedy_search", "sampling", "beam_search"),
    )
    top_k: int = arg(1, "sample from the k likeliest tokens; 1 is greedy, 0 is all", minimum=0)
    top_p: float = arg(1.0, "sample from the likeliest tokens of this total", above=0, maximum=1)
    min_p: float = arg(0.0, "leave out tokens less likely than this share of the likeliest", minimum=0, maximum=1)
    temperature: float = arg(1.0, "divides the logits; 0 is greedy", minimum=0)
    repetition_penalty: float = arg(
        1.0, "divides the logits of tokens seen before; 1 is off", minimum=1e-6, maximum=1e6
    )
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


@dataclass
class ExportingArguments(Arguments):
    """Exporting a static program."""

    group: ClassVar[str] = "Export"

    model_name_or_path: str | None = arg(
        None, "model: a folder, a hub name, or smollm2-135m-instruct (comes with the installation)", path=True
    )
    output_path: str = arg("./inference", "folder for the exported model, which then needs nothing else", path=True)
    inference_model: bool = arg(False, "export the fused inference model instead of the library's model")
    lora_path: str | None = arg(None, "folder of a LoRA adapter, merged into the exported weights", path=True)
    prefix_path: str | None = arg(None, "folder of a trained prefix, exported as a cache", path=True)
    model_type: str | None = arg(None, "family that the checkpoint must be of, such as gpt-3; it says so itself")
    chat_template: str | None = arg(None, "a .jinja file that replaces the model's chat template", path=True)
    dtype: str | None = arg(None, "type of the weights; the checkpoint's own by default", choices=DTYPES)
    device: str = arg("gpu", DEVICE_HELP)


@dataclass
class MergeArguments(Arguments):
    """Merging a LoRA adapter into its base."""

    group: ClassVar[str] = "Merge"
    uses_device: ClassVar[bool] = False

    model_name_or_path: str | None = arg(None, "the base: a folder or a name", path=True)
    lora_path: str | None = arg(None, "folder of the adapter (PEFT folders too)", path=True)
    merge_model_path: str | None = arg(
        None, "folder for the merged model; by default that of the adapter with _merged behind its name", path=True
    )
    device: str = arg("gpu", "accepted for older commands; merging computes on the CPU")
    dtype: str | None = arg(None, "type of the merged weights; the base's own by default", choices=DTYPES)
    export_format: str = arg("paddle", "layout: PaddleNLP's or Hugging Face transformers'", choices=("paddle", "hf"))
    max_shard_size: str = arg("5GB", "largest weights file, such as 500MB or 5GB")


@dataclass
class MergeShardsArguments(Arguments):
    """Merging the shards of a tensor-parallel run."""

    group: ClassVar[str] = "Merge"
    uses_device: ClassVar[bool] = False

    model_name_or_path: str | None = arg(None, "folder with the shards model_state.tp00.pdparams, ...", path=True)
    merge_model_path: str | None = arg(
        None, "folder for the merged model; by default it is written beside the shards", path=True
    )
    device: str = arg("gpu", "accepted for older commands; merging computes on the CPU")
    dtype: str | None = arg(None, "type of the merged weights; that of the shards by default", choices=DTYPES)
    export_format: str = arg("paddle", "layout: PaddleNLP's or Hugging Face transformers'", choices=("paddle", "hf"))
    max_shard_size: str = arg("5GB", "largest weights file, such as 500MB or 5GB")


@dataclass
class WorkArguments(Arguments):
    """How a data tool works."""

    group: ClassVar[str] = "Work"

    workers: int = arg(1, "processes that work at the same time", minimum=1)
    log_interval: int = arg(10_000, "documents between two lines of progress", minimum=1, unit="documents")


@dataclass
class TextArguments(WorkArguments):
    """Plain text to JSON Lines."""

    group: ClassVar[str] = "Text"

    input_path: str | None = arg(None, "a text file, or a folder whose files are all read", path=True)
    output_path: str | None = arg(None, "written is OUTPUT_PATH.jsonl; with no-merge files in OUTPUT_PATH/", path=True)
    json_key: str = arg("text", "key of the document in a line")
    doc_spliter: str = arg("", "the line that stands between documents; an empty one by default")
    min_doc_length: int = arg(10, "shorter documents are left out", minimum=0, unit="characters")
    no_merge: bool = arg(False, "write one file per input file (also --no-merge)")
    no_shuffle: bool = arg(False, "keep the order of the documents (also --no-shuffle)")
    seed: int = arg(42, "seed of the order", minimum=0, maximum=2**32 - 1)


@dataclass
class TokenFileArguments(WorkArguments):
    """JSON Lines to token files."""

    group: ClassVar[str] = "Token files"

    model_name: str | None = arg(None, "the model: a folder, a hub name, or smollm2-135m-instruct", path=True)
    tokenizer_name: str | None = arg(
        None,
        "tokenizer, if it is not the model's own: a folder or a name; the name of a class is not needed",
        path=True,
    )
    input_path: str | None = arg(None, "a JSON Lines file, or a folder of *.jsonl and *.json", path=True)
    output_prefix: str | None = arg(None, "written are OUTPUT_PREFIX.bin and OUTPUT_PREFIX.idx", path=True)
    data_format: str = arg("JSON", "format of the input", choices=("JSON",))
    json_key: str = arg("text", "key of the document in a line")
    split_sentences: bool = arg(False, "index the sentences of a document one by one")
    append_eos: bool = arg(False, "end every document with the end token")
    special_tokens_in_text: bool = arg(False, SPECIAL_HELP)
    data_impl: str = arg("mmap", "format of the output", choices=("mmap",))
