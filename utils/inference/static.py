"""An exported program, run by Paddle's own inference library."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import paddle
from paddle import Tensor

from utils import runtime
from utils.inference.manifest import PROGRAM, WEIGHTS, Manifest
from utils.kernels.arrays import copied
from utils.model.cache import DeviceCache

# New tokens that choose a way through a program, and on a CPU the MiB of memory that come together on that way before
# a thread of the executor is woken to give them back. Each time costs a few microseconds: after every operator of a
# decoding step a twentieth of it, after every large output of a prompt a fiftieth. What is not full yet stays, for each
# group of layers. A program without ways, as plain exports once were, has what comes first.
_PORTIONS = {2: 1.0, 1: 0.25}


class StaticProgram:
    """What a `CachedEngine` runs of an exported folder. Logits are all that it computes."""

    embeds = False

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
        self._logits = self._predictor.get_output_handle(self._predictor.get_output_names()[0])
        self._names = manifest.inputs
        self.heads_first, self.cache_shape = manifest.heads_first, manifest.cache
        self._held: Sequence[Tensor] = []  # what the program reads must outlive its run
        runtime.give_back_freed_memory()
        with runtime.new_threads_wait():  # the executor gives memory back in threads that have nothing urgent to do
            self._first_runs(manifest, on_cpu=not device.startswith("gpu"))

    def _first_runs(self, manifest: Manifest, *, on_cpu: bool) -> None:
        """Runs both ways through the program, so that no answer waits for what their first runs prepare."""
        layers, kv_heads, head_dim = self.cache_shape
        cache = DeviceCache(1, kv_heads, head_dim, manifest.dtype, heads_first=self.heads_first)
        cache.reserve(1, max(_PORTIONS))
        for length, portion in _PORTIONS.items():
            if on_cpu:  # read when a way is run for the first time
                paddle.set_flags({"FLAGS_eager_delete_tensor_gb": portion / 1024})
            self(
                {
                    "ids": paddle.zeros([1, length], dtype="int64"),
                    "positions": paddle.zeros([manifest.position_parts, 1, length], dtype="int64"),
                    "keys": paddle.zeros([1, cache.capacity if length == 1 else length], dtype="int64"),
                    "visible": paddle.ones([1, 1, length, cache.capacity if length == 1 else length], dtype="bool"),
                    "targets": paddle.arange(length, dtype="int64").unsqueeze(0),
                    "stretch": paddle.ones([1], dtype="float32"),
                    "chosen": paddle.zeros([1], dtype="int64"),
                },
                cache.tensors(1) * layers,
            )

    def __call__(self, inputs: Mapping[str, Tensor], cache: Sequence[Tensor]) -> Tensor:
        held, self._held = self._held, []  # an interrupted call has shared some
        for name in self._names:
            self._inputs[name].share_external_data(inputs[name])
        if cache is not held:
            for number, tensor in enumerate(cache):
                self._inputs[f"cache_{number}"].share_external_data(tensor)
        self._held = cache
        self._predictor.run()
        return copied(self._logits.copy_to_cpu())

    def states(self, inputs: Mapping[str, Tensor], cache: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError
