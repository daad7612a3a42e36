"""Token files and runs of the real run_pretrain.py for tests."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tiny_runs import WORDS, Result, run_main

from utils.data.pretrain_build import BuildOptions, build
from utils.data.pretrain_files import META, index_bytes


def write_text(path: Path, documents: int, *, seed: int = 0, longest: int = 9) -> Path:
    """JSON Lines of documents that repeat one word 3 to `longest` times."""
    chosen = random.Random(seed)
    texts = [" ".join([chosen.choice(WORDS)] * chosen.randint(3, longest)) for _ in range(documents)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def tokenize_text(model: Path, folder: Path, *, documents: int = 60, seed: int = 0) -> Path:
    """Token files of `write_text` by a model's tokenizer, in a folder of their own."""
    source = write_text(folder.parent / f"{folder.name}.jsonl", documents, seed=seed)
    config = json.loads((model / "config.json").read_text("utf-8"))
    build(str(source), str(folder / "text"), model.name, model, config, BuildOptions(append_eos=True))
    return folder


def write_tokens(prefix: Path, documents: Sequence[Sequence[int]], kind: str = "uint16") -> str:
    """A token file of given ids, each document one sequence; returns the prefix."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    ids = [np.asarray(document, dtype=kind) for document in documents]
    Path(f"{prefix}.bin").write_bytes(b"".join(part.tobytes() for part in ids))
    sizes = np.array([len(part) for part in ids], dtype=np.int32)
    parts = index_bytes(kind, sizes, np.arange(len(ids) + 1, dtype=np.int64))
    Path(f"{prefix}.idx").write_bytes(b"".join(parts))
    return str(prefix)


def by_hand(prefix: Path) -> str:
    """Three documents of four sequences, every byte of the files written here."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.bin").write_bytes(struct.pack("<7H", 5, 6, 7, 8, 9, 10, 300))
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + bytes([8]) + struct.pack("<QQ", 4, 4)
    index += struct.pack("<4i", 2, 1, 3, 1) + struct.pack("<4q", 0, 4, 6, 12) + struct.pack("<4q", 0, 2, 3, 4)
    Path(f"{prefix}.idx").write_bytes(index)
    return str(prefix)


def pretrain_words(model: Path, data: object, output: Path, *options: object) -> list[str]:
    """The command line of run_pretrain.py; of an option that is given twice the last value counts."""
    chosen: dict[str, list[str]] = {
        "--model_name_or_path": [str(model)],
        "--input_dir": [str(data)],
        "--output_dir": [str(output)],
        "--split": ["8,1,1"],
        "--max_seq_length": ["16"],
        "--per_device_train_batch_size": ["4"],
        "--max_steps": ["8"],
        "--learning_rate": ["1e-2"],
        "--logging_steps": ["1"],
        "--device": ["cpu"],
        "--disable_tqdm": ["true"],
        "--report_to": ["none"],
    }
    name = ""
    for option in map(str, options):
        if option.startswith("--"):
            name = option
            chosen[name] = []
        else:
            chosen[name].append(option)
    return [part for key, given in chosen.items() for part in (key, *given)]


def pretrain(model: Path, data: object, output: Path, *options: object, expect: int = 0) -> Result:
    """run_pretrain.main in this process."""
    return run_main("run_pretrain", pretrain_words(model, data, output, *options), {}, output, expect)


def no_meta(folder: Path) -> Path:
    """The same files as another tool would have written them."""
    for file in folder.glob(f"*{META}"):
        file.unlink()
    return folder
