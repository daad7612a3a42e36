"""Which rows or texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from utils.arguments.fields import Arguments, arg
from utils.arguments.groups.common import SPECIAL_HELP


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
