"""What a `CachedEngine` runs: the inference model itself, or a program that was exported."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import paddle
from numpy.typing import NDArray
from paddle import Tensor

from utils import runtime
from utils.inference.cache import New
from utils.inference.decoder import Decoder
from utils.inference.export import PROGRAM, WEIGHTS, Manifest
from utils.inference.plain import LibraryProgram

# New tokens that choose a way through a program, and on a CPU the MiB of memory that come together on that way before
# a thread of the executor is woken to give them back. Each time costs a few microseconds: after every operator of a
# decoding step a twentieth of it, after every large output of a prompt a fiftieth. What is not full yet stays, for each
# group of layers. A program without ways has what comes first.
_PORTIONS = {2: 2.0, 1: 0.25}


class DynamicProgram:
    """The inference model, or the library's as `LibraryProgram`, operator by operator."""

    def __init__(self, decoder: Decoder | LibraryProgram) -> None:
        self._decoder = decoder

    def __call__(self, inputs: Mapping[str, Tensor], past: Sequence[Tensor]) -> tuple[Tensor, Iterable[New]]:
        return self._decoder([inputs[name] for name in self._decoder.inputs], past)


class StaticProgram:
    """An exported program, run by Paddle's own inference library. It always takes a cache, an empty one at first."""

    def __init__(self, folder: Path, manifest: Manifest, device: str) -> None:
        from paddle import inference

        config = inference.Config(str(folder / PROGRAM), str(folder / WEIGHTS))
        if device.startswith("gpu"):
            config.enable_use_gpu(256, int(device.partition(":")[2] or 0))
        else:
            config.disable_gpu()
            config.set_cpu_math_library_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
            config.disable_mkldnn()  # slower for these shapes
        config.enable_new_ir(True)
        config.enable_new_executor(True)
        config.disable_glog_info()
        self._predictor = inference.create_predictor(config)
        self._inputs = {name: self._predictor.get_input_handle(name) for name in self._predictor.get_input_names()}
        self._outputs = [self._predictor.get_output_handle(name) for name in self._predictor.get_output_names()]
        self._names = manifest.inputs
        self._cache, self._dtype = manifest.cache, manifest.dtype
        self._held: Sequence[Tensor] = []  # what the program reads must outlive its run
        self._nothing = paddle.zeros([1])
        runtime.give_back_freed_memory()
        with runtime.new_threads_wait():  # the executor gives memory back in threads that have nothing urgent to do
            self._first_runs(manifest.position_parts, on_cpu=not device.startswith("gpu"))

    def _first_runs(self, parts: int, *, on_cpu: bool) -> None:
        """Runs both ways through the program, so that no answer waits for what their first runs prepare."""
        for length, portion in _PORTIONS.items():
            if on_cpu:  # read when a way is run for the first time
                paddle.set_flags({"FLAGS_eager_delete_tensor_gb": portion / 1024})
            self(
                {
                    "ids": paddle.zeros([1, length], dtype="int64"),
                    "positions": paddle.zeros([parts, 1, length], dtype="int64"),
                    "keys": paddle.zeros([1, length], dtype="int64"),
                    "visible": paddle.ones([1, 1, length, length], dtype="bool"),
                    "stretch": paddle.ones([1], dtype="float32"),
                    "chosen": paddle.zeros([1], dtype="int64"),
                },
                [],
            )

    def __call__(self, inputs: Mapping[str, Tensor], past: Sequence[Tensor]) -> tuple[Tensor, Iterable[New]]:
        given = {name: inputs[name] for name in self._names}
        past = past or self._empty_cache(inputs["ids"].shape[0])
        held, self._held = self._held, []  # an interrupted call has shared some
        for name, tensor in given.items():
            self._inputs[name].share_external_data(tensor)
        if past is not held:
            for number, tensor in enumerate(past):
                self._inputs[f"past_{number}"].share_external_data(tensor)
        self._held = past
        self._predictor.run()
        values = map(self._taken, self._outputs)  # each only when the one before is stored
        return paddle.to_tensor(next(values)), values

    def _taken(self, output: Any) -> NDArray[Any]:
        """The values of an output, whose memory is given back: it would stay until the next run."""
        values: NDArray[Any] = output.copy_to_cpu()
        output.share_external_data(self._nothing)
        return values

    def _empty_cache(self, batch: int) -> list[Tensor]:
        layers, kv_heads, head_dim = self._cache
        return [paddle.zeros([batch, kv_heads, 0, head_dim], dtype=self._dtype)] * (2 * layers)
