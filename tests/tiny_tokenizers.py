"""Small real tokenizers for tests: byte-level BPE with ChatML tokens, and a sentencepiece model."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are helpful.<|im_end|>\n"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system here') }}"
    "{% elif message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
TEXT = [
    'Define the noun "river". a large natural stream of water',
    "What is the capital of France? The capital of France is Paris.",
    "one two three four five six seven eight nine ten",
    "我喜欢吃苹果，也喜欢喝茶。你好，世界！",
]


def write_bpe(folder: Path, *, chat_template: str | None = CHATML, **settings: Any) -> dict[str, Any]:
    """Writes tokenizer.json and tokenizer_config.json; returns a config.json that fits."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    chosen: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        **settings,
    }
    if chat_template is not None:
        chosen["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(chosen), "utf-8")
    return {"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": 2}


def write_sentencepiece(folder: Path, name: str = "tokenizer.model", **settings: Any) -> dict[str, Any]:
    """Writes a sentencepiece model as LLaMA 2 has it; returns a config.json that fits."""
    folder.mkdir(parents=True, exist_ok=True)
    model = train_sentencepiece(folder / name, unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return {"vocab_size": model.vocab_size(), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": -1}


def train_sentencepiece(path: Path, **options: Any) -> Any:
    """Writes a sentencepiece model of TEXT, with these options of its trainer; returns the model."""
    import sentencepiece

    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 8),
        model_writer=content,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    path.write_bytes(content.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())
