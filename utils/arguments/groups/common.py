"""Words that options of several topics share."""

from __future__ import annotations

DTYPES = ("float32", "float16", "bfloat16")
DEVICE_HELP = "cpu, gpu or gpu:N; without a GPU the default is cpu"
SPECIAL_HELP = (
    "take special tokens written in texts for what they are, for texts that were rendered beforehand; by default "
    "they are text"
)
MODEL_HELP = "model: a folder, a hub name, or smollm2-135m-instruct (comes with the installation)"
