"""The single source of argument names, types, defaults and help, and the strict parser of all scripts.

Imports no Paddle, so that faults and --help answer at once.
"""

from utils.arguments.parser import parse
from utils.arguments.scripts import ExportArguments, FinetuneArguments, MergeLoraArguments, PredictArguments

__all__ = ["ExportArguments", "FinetuneArguments", "MergeLoraArguments", "PredictArguments", "parse"]
