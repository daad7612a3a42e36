"""Every command of README.md runs, in its order, on a tiny model instead of the named ones."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from serving_processes import ServerProcess, free_port, server
from tiny_models import write_tiny_llama

from utils.checkpoints import locate, shards
from utils.checkpoints.match import match
from utils.checkpoints.tensors import write_safetensors

NAMING = ("model_name_or_path", "tokenizer_name_or_path")
MODELS = ("smollm2-135m-instruct",)
SMALL = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "num_prefix_tokens": 4}
LINKED = ("utils", "data/tools", "finetune_generation.py", "run_pretrain.py", "predictor.py", "merge_lora_params.py")
LINKED += ("export_model.py", "merge_tp_params.py")
PARAGRAPHS = 60
SERVER, DOCUMENTED = "flask_server.py", "http://127.0.0.1:8010"
ASKED = (
    f"""curl {DOCUMENTED}/api/chat -H "Content-Type: application/json" -d '{{"context": "Hello", "max_length": 128}}'"""
)


def commands(readme: Path) -> list[str]:
    """The lines of all bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", readme.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.fixture(scope="module")
def workplace(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository, with a tiny model, few rows and few steps."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "model").mkdir()
    # as many heads as the embedded model, so that it takes as many processes
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}
    write_tiny_llama(folder / "model", max_position_embeddings=2048, **heads)
    (folder / "data" / "text").mkdir(parents=True)
    for name in LINKED:
        (folder / name).symlink_to(root / name)
    novel = (root / "data" / "text" / "northanger_abbey.txt").read_text(encoding="utf-8").split("\n\n")
    (folder / "data" / "text" / "novel.txt").write_text("\n\n".join(novel[:PARAGRAPHS]), encoding="utf-8")
    for split, count in (("train", 12), ("dev", 3)):
        lines = (root / "data" / f"{split}.json").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "data" / f"{split}.json").write_text("".join(lines[:count]), encoding="utf-8")
    (folder / "llama").mkdir()
    for path in (root / "llama").glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        small = {key: value for key, value in SMALL.items() if key != "num_prefix_tokens" or "prefix_tuning" in content}
        content.update({key: str(folder / "model") for key in content if key in NAMING}, **small)
        (folder / "llama" / path.name).write_text(json.dumps(content), encoding="utf-8")
    write_shards(folder / "model", folder / "checkpoints" / "llama_sft_ckpts" / "checkpoint-100")
    return folder


def write_shards(model: Path, folder: Path) -> None:
    """A checkpoint as a run of three tensor-parallel processes leaves it."""
    checkpoint = locate(model)
    shape = checkpoint.family.shape(checkpoint.config)
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    (folder / "config.json").write_text(json.dumps({**checkpoint.config, "tensor_parallel_degree": 3}))
    whole = {name: tensor.read() for name, (tensor, _) in match(checkpoint).items()}
    for rank in range(3):
        parts = [
            (weight.parameter, shards.split(whole[weight.parameter], weight.split, shape, 3, rank))
            for weight in checkpoint.family.weights(checkpoint.config)
        ]
        write_safetensors(folder / f"model.tp{rank:02d}.safetensors", parts, {"format": "np"})


def run(words: list[str], folder: Path) -> str:
    done = subprocess.run(words, cwd=folder, input="hello\n", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr
    return done.stdout


def serve(words: list[str], folder: Path, asked: list[str]) -> None:
    """Starts a server, on other ports than written; asks it what the commands behind it ask; ends it."""
    at = words.index(SERVER)
    given = dict(zip(words[at + 1 :], [*words[at + 2 :], ""], strict=True))
    options = ["--model_name_or_path", given["--model_name_or_path"]]
    options += ["--inference_model"] if "--inference_model" in given else []
    options += ["--port", str(free_port())] if "--port" in given else []  # else without a page, as written
    with server(folder, *options, launcher=words[:at]) as running:
        said = [curl(shlex.split(line), running) for line in asked or [ASKED]]
        assert all(answer.get("error_code") == 0 or answer["choices"] for answer in said)


def curl(words: list[str], running: ServerProcess) -> Any:
    """The answer to a command of README.md; nobody needs to have curl."""
    assert words[0] == "curl" and words[1].startswith(DOCUMENTED)
    assert words[2:4] == ["-H", "Content-Type: application/json"] and words[4] == "-d"
    status, answer = running.json("POST", words[1].removeprefix(DOCUMENTED), json.loads(words[5]))
    assert status == 200, answer
    return answer


def test_every_command_runs(root: Path, workplace: Path) -> None:
    found = commands(root / "README.md")
    assert len(found) >= 12
    for place, line in enumerate(found):
        words = shlex.split(line)
        if words[0] == "curl":
            continue  # asked where its server is started
        if words[0] == "make":
            # what it would do; the demo itself runs below, and the suite is what you are reading
            recipe = subprocess.run(["make", "-n", *words[1:]], cwd=root, capture_output=True, text=True, check=True)
            assert {"demo": "examples/demo.py", "test": "-m pytest"}[words[1]] in recipe.stdout
            continue
        assert words[0] == "python", line
        words = [str(workplace / "model") if word in MODELS else word for word in words[1:]]
        if SERVER in words:
            serve(words, workplace, list(takewhile(lambda line: line.startswith("curl "), found[place + 1 :])))
            continue
        run([sys.executable, *words], workplace)
    written = workplace / "checkpoints"
    assert (written / "llama_lora_2" / "lora_model_state.safetensors").is_file()
    assert (written / "llama_lora_merged" / "model.safetensors").is_file()
    assert (written / "llama_lora_hf" / "config.json").is_file()
    assert (written / "llama_sft_ckpts" / "checkpoint-100" / "model.safetensors").is_file()
    assert (written / "llama_sft_merged" / "tokenizer.json").is_file()
    assert (workplace / "inference" / "model.pdiparams").is_file()
    assert (written / "llama_pt_ckpts" / "prefix_model_state.safetensors").is_file()
    assert (written / "llama_lora_peft" / "adapter_model.safetensors").is_file()
    assert (written / "llama_pretrain_ckpts" / "model.safetensors").is_file()
    assert len((workplace / "output.json").read_text(encoding="utf-8").splitlines()) == 3


def test_demo_shows_before_and_after(root: Path, workplace: Path) -> None:
    said = run(
        [
            *(sys.executable, "examples/demo.py", "--model", str(workplace / "model"), "--max_steps", "2"),
            *("--rows", "2", "--eval_rows", "4", "--output_dir", str(workplace / "demo")),
        ],
        root,
    )
    assert re.search(r"\| perplexity \| [\d.]+ \| [\d.]+ \|", said)
    assert re.search(r"\| BLEU-4 \| [\d.]+ \| [\d.]+ \|", said)
    assert said.count("before:") == 2 and said.count("after:") == 2
    assert (workplace / "demo" / "lora" / "loss_curve.png").stat().st_size > 1000


def test_every_file_and_folder_that_the_readme_links_to_exists(root: Path) -> None:
    for page in [root / "README.md", *(root / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
