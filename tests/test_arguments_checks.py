"""Checks across options, the shipped JSON files, and the documented commands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from utils.arguments import FinetuneArguments, MergeLoraArguments, PredictArguments, parse
from utils.arguments.fields import options_of
from utils.errors import UserError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    folder.mkdir()
    for split in ("train", "dev"):
        (folder / f"{split}.json").write_text('{"src": "a", "tgt": "b"}\n', encoding="utf-8")
    return folder


@pytest.fixture
def finetune(tmp_path: Path, data: Path) -> list[str]:
    words = ["--model_name_or_path", "m", "--dataset_name_or_path", str(data)]
    return [*words, "--output_dir", str(tmp_path / "out"), "--do_train"]


def faults(argv: list[str], cls: Any = FinetuneArguments) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse(cls, argv, "script.py")
    return list(caught.value.faults)


CONTRADICTIONS = [
    ("--lora --prefix_tuning", "lora true (--lora) and prefix_tuning true (--prefix_tuning) exclude each other"),
    ("--fp16 --bf16", "fp16 true (--fp16) and bf16 true (--bf16) exclude each other"),
    ("--intokens --eval_with_do_generation --do_eval", "intokens true (--intokens) exclude each other"),
    ("--src_length 2048", "src_length 2048 (--src_length) must be below max_length 2048 (default)"),
    ("--max_length 1024", "src_length 1024 (default) must be below max_length 1024 (--max_length)"),
    ("--lazy", "lazy true (--lazy) needs max_steps"),
    ("--lazy --max_steps 9 --save_strategy epoch", "save_strategy epoch (--save_strategy): streamed rows"),
    ("--max_steps 0", "max_steps 0 (--max_steps): expected -1"),
    ("--load_best_model_at_end", "they are evaluation_strategy no (default) and save_strategy no (default)"),
    (
        "--load_best_model_at_end --evaluation_strategy steps --eval_steps 30 --save_steps 50",
        "save_steps 50 (--save_steps) must be a multiple of eval_steps 30 (--eval_steps)",
    ),
    ("--metric_for_best_model bleu4", "it is one of accuracy, ppl, loss"),
    (
        "--metric_for_best_model accuracy --eval_with_do_generation --do_eval",
        "with eval_with_do_generation true it is one of bleu4, rouge1, rouge2, rougel",
    ),
    ("--do_eval false --evaluation_strategy epoch", "do_eval false (--do_eval) contradict"),
    ("--do_ptq --do_gptq", "do_ptq true (--do_ptq) and do_gptq true (--do_gptq) exclude each other"),
    ("--smooth", "smooth true (--smooth) needs do_ptq"),
    ("--shift", "shift true (--shift) needs do_ptq"),
    ("--sequence_parallel", "sequence_parallel true (--sequence_parallel) needs tensor_parallel_degree above 1"),
    (
        "--sharding=stage2@offload",
        '--sharding: "stage2 offload": state on the CPU is not part of this version',
    ),
    ("--logging_dir /proc/log", "logging_dir /proc/log (--logging_dir) cannot be written"),
    ("--pipeline_parallel_degree 0", "pipeline_parallel_degree 0 (--pipeline_parallel_degree): expected -1"),
    ("--eval_with_do_generation --eval_max_new_tokens 1025", "max_length - src_length = 1024"),
    ("--do_predict", "has neither test.json nor test/*.json"),
    ("--model_name_or_path ./absent", "model_name_or_path ./absent (--model_name_or_path): no such folder"),
    ("--tokenizer_name_or_path ./absent", "tokenizer_name_or_path ./absent"),
    ("--chat_template absent.jinja", "chat_template absent.jinja (--chat_template): no such file"),
    ("--lora --lora_path ./absent", "lora_path ./absent (--lora_path): no such folder"),
    ("--resume_from_checkpoint ./absent", "resume_from_checkpoint ./absent (--resume_from_checkpoint): no such"),
    ("--device gpu", "no GPU can be used here"),
    ("--device tpu", "--device tpu: expected cpu, gpu or gpu:N"),
]


@pytest.mark.parametrize("words, message", CONTRADICTIONS)
def test_contradictions(finetune: list[str], words: str, message: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("utils.runtime.gpu_present", lambda: False)
    added = [word.replace("@", " ") for word in words.split()]
    kept = finetune
    if "--model_name_or_path" in added:
        kept = finetune[2:]
    [fault] = faults([*kept, *added])
    assert message in fault


def test_an_absent_gpu_is_named_with_its_line_and_a_default_gives_way(
    finetune: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("utils.runtime.gpu_present", lambda: False)
    path = tmp_path / "run.json"
    path.write_text('{\n"device": "gpu:1"}', encoding="utf-8")
    [fault] = faults([*finetune, str(path)])
    assert fault.startswith(f"{path} line 2: --device gpu:1: no GPU can be used here")
    assert parse(FinetuneArguments, finetune, "x.py").device == "cpu"
    assert "running on the CPU" in capsys.readouterr().err


def test_what_a_run_needs(data: Path, tmp_path: Path) -> None:
    found = faults([])
    assert any(fault.startswith("model_name_or_path is missing") for fault in found)
    assert any(fault.startswith("nothing to do: set one of do_train, do_eval") for fault in found)
    found = faults(["--model_name_or_path", "m", "--do_train"])
    assert [fault.split(";")[0] for fault in found] == [
        "output_dir is missing",
        "dataset_name_or_path is missing",
    ]


def test_dataset_folders(finetune: list[str], data: Path, tmp_path: Path) -> None:
    (data / "dev.json").unlink()
    parse(FinetuneArguments, finetune, "x.py")  # training alone needs no dev rows
    [fault] = faults([*finetune, "--evaluation_strategy", "steps"])
    assert "has neither dev.json nor dev/*.json" in fault
    (data / "dev").mkdir()
    (data / "dev" / "part-0.json").touch()
    assert parse(FinetuneArguments, [*finetune, "--evaluation_strategy", "steps"], "x.py").do_eval
    (data / "dev" / "part-0.json").rename(data / "dev" / "part-0.jsonl")
    (data / "train.json").rename(data / "train.jsonl")
    assert parse(FinetuneArguments, [*finetune, "--evaluation_strategy", "steps"], "x.py").do_eval

    words = [word if word != str(data) else str(data / "train.jsonl") for word in finetune]
    assert "is a file; expected a folder" in faults(words)[0]
    words = [word if word != str(data) else str(tmp_path / "absent") for word in finetune]
    assert "does not exist; expected a folder" in faults(words)[0]
    words = [word if word != str(data) else "advertise_gen" for word in finetune]
    assert parse(FinetuneArguments, words, "x.py").dataset_name_or_path == "advertise_gen"


def test_calibration_rows_are_quant_or_train(finetune: list[str], data: Path) -> None:
    words = [*(word for word in finetune if word != "--do_train"), "--do_gptq"]
    (data / "train.json").rename(data / "quant.json")
    assert parse(FinetuneArguments, words, "x.py").do_gptq
    (data / "quant.json").unlink()
    assert "has neither train.json nor train/*.json" in faults(words)[0]


def test_output_folder_must_be_writable_and_is_not_made(finetune: list[str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    bad = [str(file / "out"), str(file), str(dangling), "/proc/out", "x" * 300]
    if os.geteuid():
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o555)
        bad.append(str(closed / "out"))
    before = sorted(tmp_path.iterdir())
    for path in bad:
        words = [word if word != str(tmp_path / "out") else path for word in finetune]
        [fault] = faults(words)
        assert fault.startswith(f"output_dir {path} (--output_dir) cannot be written: ")
    parse(FinetuneArguments, finetune, "x.py")
    assert sorted(tmp_path.iterdir()) == before


def test_adapters_must_be_adapters(finetune: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    words = [*finetune, "--lora", "--lora_path", str(folder)]
    assert "has no lora_config.json; name the output folder of lora training" in faults(words)[0]
    (folder / "adapter_config.json").touch()
    assert "has no adapter_model.safetensors" in faults(words)[0]
    (folder / "adapter_model.safetensors").touch()
    assert parse(FinetuneArguments, words, "x.py").lora_path == str(folder)
    (folder / "lora_config.json").touch()
    assert "has no lora_model_state.safetensors" in faults(words)[0]
    (folder / "lora_model_state.pdparams").touch()
    assert parse(FinetuneArguments, words, "x.py").lora_path == str(folder)
    [fault] = faults([*finetune, "--lora_path", str(folder)])
    assert fault == f"lora_path {folder} (--lora_path) needs lora; add --lora true"


def test_home_folder_and_resume_values(finetune: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    words = [word if word != str(tmp_path / "out") else "~/out" for word in finetune]
    assert parse(FinetuneArguments, words, "x.py").output_dir == str(tmp_path / "out")
    for added, value in ([], None), (["true"], True), (["false"], False), ([str(tmp_path)], str(tmp_path)):
        words = [*finetune, "--resume_from_checkpoint", *added] if added else finetune
        assert parse(FinetuneArguments, words, "x.py").resume_from_checkpoint == value
    assert parse(FinetuneArguments, [*finetune, "--resume_from_checkpoint"], "x.py").resume_from_checkpoint is True


def test_derived_defaults(finetune: list[str]) -> None:
    best = ["--load_best_model_at_end", "--evaluation_strategy", "epoch", "--save_strategy", "epoch"]
    run = parse(FinetuneArguments, [*finetune, *best, "--lora", "--lora_rank", "4", "--logging_steps", "3"], "x.py")
    assert (run.lora_alpha, run.eval_steps, run.eval_max_new_tokens, run.do_eval) == (8.0, 3, 512, True)
    assert (run.metric_for_best_model, run.greater_is_better) == ("loss", False)
    words = [*finetune, *best, "--eval_with_do_generation", "--src_length", "100", "--max_length", "150"]
    run = parse(FinetuneArguments, words, "x.py")
    assert (run.eval_max_new_tokens, run.metric_for_best_model, run.greater_is_better) == (50, "bleu4", True)
    run = parse(FinetuneArguments, [*finetune, "--metric_for_best_model", "eval_ppl"], "x.py")
    assert (run.metric_for_best_model, run.greater_is_better) == ("ppl", False)


@pytest.mark.parametrize(
    "words, running, wanted",
    [
        ("--tensor_parallel_degree 4", 1, 4),
        ("--tensor_parallel_degree 4", 4, None),
        ("--tensor_parallel_degree 4", 6, 4),
        ("--tensor_parallel_degree 2 --pipeline_parallel_degree 2", 2, 4),
        ("--tensor_parallel_degree 2 --pipeline_parallel_degree 2", 8, None),
        ("--tensor_parallel_degree 2 --sharding stage2 --sharding_parallel_degree 2", 2, 4),
        ("--tensor_parallel_degree 2 --sharding stage2", 2, None),
        ("--tensor_parallel_degree -1 --pipeline_parallel_degree 1", 3, None),
    ],
)
def test_degrees_divide_the_processes(
    finetune: list[str], words: str, running: int, wanted: int | None, monkeypatch: Any
) -> None:
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", str(running))
    if wanted is None:
        parse(FinetuneArguments, [*finetune, *words.split()], "x.py")
        return
    [fault] = faults([*finetune, *words.split()])
    assert f"needs {wanted} processes or a multiple of it, and {running} " in fault
    assert f"--nproc_per_node {wanted}" in fault and "--tensor_parallel_degree 1" in fault


def test_a_single_process_is_shown_the_launch_line(root: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("utils.arguments.checks.gpu_present", lambda: False)
    monkeypatch.chdir(root)
    monkeypatch.delenv("PADDLE_TRAINERS_NUM", raising=False)
    found = [fault for fault in faults(["./llama/sft_argument.json"]) if "parallel" in fault]
    assert len(found) == 1 and found[0].startswith("tensor_parallel_degree 4 (llama/sft_argument.json line ")
    launch = "python -u -m paddle.distributed.launch {} script.py ./llama/sft_argument.json"
    assert launch.format("--nproc_per_node 4") in found[0] and "--gpus" not in found[0]
    monkeypatch.setattr("utils.arguments.checks.gpu_present", lambda: True)
    found = [fault for fault in faults(["./llama/sft_argument.json"]) if "parallel" in fault]
    assert launch.format('--gpus "0,1,2,3"') in found[0] and "--nproc_per_node" not in found[0]


# --- prediction and merging ------------------------------------------------------------------------


@pytest.fixture
def predict(data: Path, tmp_path: Path) -> list[str]:
    words = ["--model_name_or_path", "m", "--data_file", str(data / "dev.json")]
    return [*words, "--output_file", str(tmp_path / "output.json")]


def test_predictor_defaults(predict: list[str]) -> None:
    run = parse(PredictArguments, predict, "predictor.py")
    assert (run.batch_size, run.src_length, run.max_length, run.max_new_tokens) == (8, 1024, 2048, 1024)
    assert (run.top_k, run.top_p, run.temperature, run.repetition_penalty) == (1, 1.0, 1.0, 1.0)
    assert (run.decode_strategy, run.dtype, run.mode, run.inference_model) == (
        "greedy_search",
        None,
        "dynamic",
        False,
    )
    assert parse(PredictArguments, [*predict, "--top_k", "5"], "x.py").decode_strategy == "sampling"
    assert options_of(PredictArguments)["output_file"].default == "output.json"


@pytest.mark.parametrize(
    "words, messages",
    [
        (
            "--num_beams 4 --top_k 5 --top_p 0.5 --min_p 0.1 --temperature 0.7 --prompt_lookup_num_tokens 3",
            [
                "top_k 5 (--top_k) is of sampling and has no place in beam search",
                "top_p 0.5 (--top_p) is of sampling and has no place in beam search",
                "min_p 0.1 (--min_p) is of sampling and has no place in beam search",
                "temperature 0.7 (--temperature) is of sampling and has no place in beam search",
                "prompt_lookup_num_tokens 3 (--prompt_lookup_num_tokens) does not work with beam search",
            ],
        ),
        ("--decode_strategy beam_search", ["needs num_beams above 1; add --num_beams 4"]),
        ("--decode_strategy sampling --num_beams 2", ["num_beams 2 (--num_beams) needs decode_strategy beam_search"]),
        (
            "--length_penalty 2 --early_stopping",
            ["length_penalty 2.0 (--length_penalty) has no effect", "early_stopping true (--early_stopping) has no"],
        ),
        ("--decode_strategy greedy_search --top_k 5", ["top_k 5 (--top_k) is of sampling; leave it out"]),
        (
            "--top_p 2 --top_k -1 --num_beams 0",
            ["--top_p: expected a number above 0", "--top_k: expected", "--num_beams: expected a whole number"],
        ),
    ],
)
def test_strategies_exclude_each_other(predict: list[str], words: str, messages: list[str]) -> None:
    found = faults([*predict, *words.split()], PredictArguments)
    assert len(found) == len(messages)
    for fault, message in zip(found, messages, strict=True):
        assert message in fault


def test_sampling_options_without_sampling_are_told(predict: list[str], capsys: Any) -> None:
    parse(PredictArguments, [*predict, "--top_p", "0.9", "--temperature", "0.7"], "x.py")
    said = capsys.readouterr().err
    assert "top_p 0.9 (--top_p) has no effect while top_k is 1, which is greedy" in said
    assert "temperature 0.7 (--temperature) has no effect" in said
    words = ["--num_beams", "3", "--length_penalty", "0.5", "--early_stopping", "--temperature", "0"]
    run = parse(PredictArguments, [*predict, *words], "x.py")
    assert (run.decode_strategy, run.num_beams, run.early_stopping) == ("beam_search", 3, True)
    assert "no effect" not in capsys.readouterr().err


def test_a_defaulted_prompt_length_gives_way(predict: list[str], capsys: Any) -> None:
    run = parse(PredictArguments, [*predict, "--max_length", "1024"], "predictor.py")
    assert (run.src_length, run.max_new_tokens) == (512, 512)
    assert "src_length is 512, half of max_length 1024 (--max_length)" in capsys.readouterr().err
    assert "must be below" in faults([*predict, "--max_length", "8", "--src_length", "8"], PredictArguments)[0]


@pytest.mark.parametrize(
    "words, message",
    [
        ("--lora_path LORA --prefix_path PREFIX", "exclude each other; leave one out"),
        ("--inference_model --quant_type a8w8", "low-bit inference is not part of this version yet"),
        ("--max_new_tokens 2000", "is more than max_length 2048 (default) minus src_length 1024 (default)"),
        ("--min_length 2000", "min_length 2000 (--min_length) is more than max_new_tokens 1024"),
    ],
)
def test_predictor_contradictions(predict: list[str], tmp_path: Path, words: str, message: str) -> None:
    for kind in ("lora", "prefix"):
        (tmp_path / kind).mkdir()
        for name in (f"{kind}_config.json", f"{kind}_model_state.safetensors"):
            (tmp_path / kind / name).touch()
    words = words.replace("LORA", str(tmp_path / "lora")).replace("PREFIX", str(tmp_path / "prefix"))
    [fault] = faults([*predict, *words.split()], PredictArguments)
    assert message in fault


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_static_programs_have_their_adapter_inside(predict: list[str], tmp_path: Path, kind: str) -> None:
    """Both faults are told: there is no exported model of that name, and an adapter is not given beside one."""
    for name in (f"{kind}_config.json", f"{kind}_model_state.safetensors"):
        (tmp_path / name).touch()
    found = faults([*predict, "--mode", "static", f"--{kind}_path", str(tmp_path)], PredictArguments)
    assert len(found) == 2
    assert any(
        "no such folder; --mode static runs an exported model: python export_model.py --model_name_or_path m "
        "--output_path ./inference" in one
        for one in found
    )
    assert any(
        f"an exported model has its adapter inside: python export_model.py --{kind}_path" in one for one in found
    )


def test_predictor_files(data: Path, tmp_path: Path) -> None:
    rows, model = str(data / "dev.json"), ["--model_name_or_path", "m"]
    assert "data_file is missing" in faults(model, PredictArguments)[0]
    absent = str(data / "absent.json")
    assert f"data_file {absent} (--data_file): no such file" in faults(
        [*model, "--data_file", absent], PredictArguments
    )
    for output, message in (
        (rows, "would overwrite data_file"),
        (str(data), "is a folder"),
        (str(data / "x" / "y.json"), "there is no folder"),
        ("/proc/output.json", "no permission"),
    ):
        words = [*model, "--data_file", rows, "--output_file", output]
        assert message in faults(words, PredictArguments)[0]


def test_merge_checks(tmp_path: Path) -> None:
    found = faults([], MergeLoraArguments)
    assert [fault.split()[0] for fault in found] == ["model_name_or_path", "lora_path"]
    lora = tmp_path / "lora"
    lora.mkdir()
    for name in ("lora_config.json", "lora_model_state.safetensors"):
        (lora / name).touch()
    words = ["--model_name_or_path", str(tmp_path), "--lora_path"]
    assert parse(MergeLoraArguments, [*words, f"{lora}/"], "x.py").merge_model_path == f"{lora}_merged"
    words += [str(lora), "--merge_model_path"]
    assert "would overwrite lora_path" in faults([*words, str(lora)], MergeLoraArguments)[0]
    assert "would overwrite model_name_or_path" in faults([*words, str(tmp_path)], MergeLoraArguments)[0]
    for size in ("5 GB", "GB", "0", "5XB", "-1GB"):
        words_of_size = [*words, str(tmp_path / "new"), f"--max_shard_size={size}"]
        assert "expected a size such as 500MB" in faults(words_of_size, MergeLoraArguments)[0]
    for size, count in (("1.5KB", 1500), ("20MB", 20 * 10**6), ("700", 700), ("8B", 8)):
        run = parse(MergeLoraArguments, [*words, str(tmp_path / "new"), "--max_shard_size", size], "x.py")
        assert run.max_shard_bytes == count


# --- the shipped files -----------------------------------------------------------------------------

SFT = {
    "dataset_name_or_path": "./data",
    "output_dir": "./checkpoints/llama_sft_ckpts",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "per_device_eval_batch_size": 8,
    "eval_accumulation_steps": 16,
    "num_train_epochs": 3,
    "learning_rate": 3e-05,
    "warmup_steps": 30,
    "logging_steps": 1,
    "evaluation_strategy": "epoch",
    "save_strategy": "epoch",
    "src_length": 1024,
    "max_length": 2048,
    "fp16": True,
    "fp16_opt_level": "O2",
    "do_train": True,
    "do_eval": True,
    "load_best_model_at_end": True,
    "eval_with_do_generation": False,
    "metric_for_best_model": "accuracy",
    "recompute": True,
    "save_total_limit": 1,
    "tensor_parallel_degree": 4,
    "pipeline_parallel_degree": 1,
}
CPU = {"src_length": 256, "max_length": 512, "num_train_epochs": 1, "recompute": False, "tensor_parallel_degree": 1}
SMOOTH = {
    "smooth": True,
    "smooth_step": 16,
    "smooth_all_linears": True,
    "smooth_piecewise_search": True,
    "smooth_search_piece": True,
}
SHIPPED: dict[str, dict[str, Any]] = {
    "sft": SFT,
    "sft_pp": SFT
    | {
        "output_dir": "./checkpoints/llama_sft_pp_ckpts",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "src_length": 256,
        "max_length": 512,
        "tensor_parallel_degree": 2,
        "pipeline_parallel_degree": 2,
    },
    "smollm2_sft": SFT | CPU | {"output_dir": "./checkpoints/smollm2_sft_ckpts"},
    "lora": SFT | CPU | {"output_dir": "./checkpoints/llama_lora_ckpts", "learning_rate": 3e-4, "lora": True},
    "pt": SFT | CPU | {"output_dir": "./checkpoints/llama_pt_ckpts", "learning_rate": 3e-2, "prefix_tuning": True},
    "ptq": SMOOTH | {"output_dir": "./checkpoints/llama_ptq_ckpts", "do_eval": True, "do_ptq": True, "ptq_step": 16},
    "gptq": {"output_dir": "./checkpoints/llama_gptq_ckpts", "do_eval": True, "do_gptq": True, "gptq_step": 8},
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_file(root: Path, data: Path, name: str, monkeypatch: Any, capsys: Any) -> None:
    processes = 4 if name in ("sft", "sft_pp") else 1
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", str(processes))
    monkeypatch.chdir(data.parent)
    data.rename(data.parent / "data")
    path = root / "llama" / f"{name}_argument.json"
    run = parse(FinetuneArguments, [str(path), "--device", "cpu"], "finetune_generation.py")
    values = run.to_json()
    assert {key: values[key] for key in SHIPPED[name]} == SHIPPED[name]
    small = processes == 1
    assert run.model_name_or_path == ("smollm2-135m-instruct" if small else "meta-llama/Llama-2-7b")
    assert capsys.readouterr().err == ""  # nothing in it is renamed or without effect


def test_save_steps_alone_mean_that_steps_save(finetune: list[str]) -> None:
    for added, wanted in (([], "no"), (["--save_steps", "9"], "steps")):
        assert parse(FinetuneArguments, [*finetune, *added], "x.py").save_strategy == wanted
    added = ["--save_steps", "9", "--save_strategy", "epoch"]
    assert parse(FinetuneArguments, [*finetune, *added], "x.py").save_strategy == "epoch"


def test_documented_defaults() -> None:
    documented = {
        **{"lora": False, "lora_path": None, "lora_rank": 8, "prefix_tuning": False, "num_prefix_tokens": 128},
        **{"dataset_name_or_path": None, "task_name": None, "eval_with_do_generation": False, "lazy": False},
        **{"save_generation_output": False, "intokens": False, "src_length": 1024, "max_length": 2048},
        **{"top_k": 1, "top_p": 1.0, "output_dir": None, "per_device_train_batch_size": 8, "max_steps": -1},
        **{"gradient_accumulation_steps": 1, "per_device_eval_batch_size": 8, "eval_accumulation_steps": None},
        **{"num_train_epochs": 3.0, "learning_rate": 5e-5, "warmup_steps": 0, "logging_steps": 500},
        **{"evaluation_strategy": "no", "save_strategy": "no", "save_steps": 500, "seed": 42, "device": "gpu"},
        **{"fp16": False, "bf16": False, "fp16_opt_level": "O1", "do_train": False, "do_eval": False},
        **{"disable_tqdm": False, "load_best_model_at_end": False, "metric_for_best_model": None},
        **{"recompute": False, "save_total_limit": None, "tensor_parallel_degree": -1, "sharding": ""},
        **{"pipeline_parallel_degree": -1, "sharding_parallel_degree": -1, "lr_scheduler_type": "linear"},
        **{"quant_type": "A8W8", "do_ptq": False, "ptq_step": 32, "shift": False, "shift_all_linear": False},
        **{"shift_sampler": "none", "shift_step": 32, "smooth": False, "smooth_all_linears": False},
        **{"smooth_sampler": "none", "smooth_step": 32, "smooth_piecewise_search": False, "smooth_k_piece": 3},
        **{"smooth_search_piece": False, "do_gptq": False, "gptq_step": 8, "use_flash_attention": False},
    }
    options = options_of(FinetuneArguments)
    assert {key: options[key].default for key in documented} == documented


@pytest.mark.parametrize(
    "command",
    [
        "--model_name_or_path meta-llama/Llama-2-7b-chat --batch_size 1 --data_file D --dtype float16 --mode dynamic",
        "--model_name_or_path meta-llama/Llama-2-7b-chat --dtype float16 --max_length 1024 --mode dynamic "
        "--inference_model",
        "--model_name_or_path ./inference --dtype float16 --max_length 1024 --output_file infer.json --mode static "
        "--inference_model",
    ],
)
def test_documented_predictor_commands(data: Path, command: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(data.parent)
    (data.parent / "inference").mkdir()
    words = command.replace(" D ", f" {data / 'dev.json'} ").split()
    assert parse(PredictArguments, words, "predictor.py").dtype == "float16"
