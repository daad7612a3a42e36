"""The single source of argument names, types, defaults and help, and the strict parser of all scripts.

Imports no Paddle, so that faults and --help answer at once.
"""

from utils.arguments.parser import parse
from utils.arguments.scripts import (
    CreatePretrainingDataArguments,
    ExportArguments,
    FinetuneArguments,
    MergeLoraArguments,
    MergeTpArguments,
    PredictArguments,
    PretrainArguments,
    RunArguments,
    ServeArguments,
    TransToJsonArguments,
)

__all__ = [
    "CreatePretrainingDataArguments",
    "ExportArguments",
    "FinetuneArguments",
    "MergeLoraArguments",
    "MergeTpArguments",
    "PredictArguments",
    "PretrainArguments",
    "RunArguments",
    "ServeArguments",
    "TransToJsonArguments",
    "parse",
]
