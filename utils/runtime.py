"""What must be decided before Paddle loads: threads, math library, device, log noise.

Call `prepare()` first in every script; only then may anything import Paddle.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import importlib.metadata
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from utils import signals
from utils.errors import UserError, notice

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of mallopt(3)

CPU_HALF_PRECISION_NOTICE = "this processor's Paddle build has no {asked} arithmetic; using float32 instead"


def cpu_flags() -> tuple[str, frozenset[str]]:
    """(vendor, instruction-set flags) of this processor; ("", empty) where /proc/cpuinfo is missing."""
    vendor, flags = "", frozenset[str]()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("vendor_id"):
                    vendor = line.split(":", 1)[1].strip()
                elif line.startswith("flags"):
                    flags = frozenset(line.split(":", 1)[1].split())
                    break
    except OSError:
        pass
    return vendor, flags


def prepare(*, answering: bool = False) -> None:
    """Sets the environment that Paddle reads once, when it loads. What the user has set wins.

    Args:
        answering: whether this process mostly decodes, instead of training.

    - OMP_NUM_THREADS: the processors that this process may use, its share of them under a launcher.
    - MKL_DEBUG_CPU_TYPE=5 on AMD processors with AVX2: the MKL inside the Paddle wheel otherwise
      takes a path there that is 3 to 4 times slower in float32 matrix products. With AVX-512, 7 if answering:
      it decodes one text a seventh faster, eight texts a twenty-fifth slower, and trains a twentieth slower.
    - FLAGS_use_stride_kernel=0 without a GPU: transposes are copied once, not in every product.
    - the C library's allocator keeps freed buffers, see `_keep_freed_memory`.
    - log levels: Paddle's and PaddleNLP's start-up noise is not for users.
    """
    if "paddle" in sys.modules:
        raise RuntimeError("runtime.prepare() must run before Paddle is imported")
    environment = os.environ
    neighbours = int(environment.get("PADDLE_LOCAL_SIZE") or 1)  # processes of the same run on this machine
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // neighbours)))
    _keep_freed_memory()
    vendor, flags = cpu_flags()
    if vendor == "AuthenticAMD" and "avx2" in flags:
        environment.setdefault("MKL_DEBUG_CPU_TYPE", "7" if answering and "avx512f" in flags else "5")
    if not gpu_present():  # views make matrix products of transposed tensors copy slowly on CPUs
        environment.setdefault("FLAGS_use_stride_kernel", "0")
    environment.setdefault("GLOG_minloglevel", "2")
    environment.setdefault("PADDLENLP_LOG_LEVEL", "ERROR")
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_DISABLE_PROGRESS_BARS"):
        environment.setdefault(name, "1")
    environment.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns in every forked data loader
    warnings.filterwarnings("ignore")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


def _keep_freed_memory() -> None:
    """Tells glibc to reuse freed buffers instead of returning them to the system.

    Paddle's CPU allocator asks the C library for every operator's output. By default each large one
    is mapped anew and its pages are cleared by the kernel at first touch, which costs 5 to 20 times
    the arithmetic of an elementwise operator. What the user set by MALLOC_... variables wins.
    """
    _set_allocator({_M_MMAP_THRESHOLD: 1 << 30, _M_TRIM_THRESHOLD: (1 << 31) - 1})


def share_heaps() -> None:
    """For a process of many threads that computes little: they share few heaps, and freed memory goes back.

    By default there are 8 heaps per processor, and each keeps the size of the largest that its threads ever held.
    """
    _set_allocator({_M_ARENA_MAX: 2, _M_MMAP_THRESHOLD: 1 << 20, _M_TRIM_THRESHOLD: 1 << 22})


def _set_allocator(settings: Mapping[int, int]) -> None:
    if any(name.startswith("MALLOC_") for name in os.environ) or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in every C library
    if mallopt is not None:
        for name, value in settings.items():
            mallopt(name, value)


def give_back_freed_memory() -> None:
    """Returns to the system what `_keep_freed_memory` holds. After loading: what is left of files that were read
    lies scattered, and what comes next does not fit into it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in every C library
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def new_threads_wait() -> Iterator[None]:
    """Threads that start meanwhile never interrupt another one: they run when it pauses, or when its time is over.

    Waking them after each operator, on the processor that computes the next one, cost a twentieth of the time.
    Linux only.
    """
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        yield
        return
    before = set(tasks.iterdir())
    yield
    for task in set(tasks.iterdir()) - before:
        with contextlib.suppress(OSError):  # it has ended, or the system does not allow it
            os.sched_setscheduler(int(task.name), os.SCHED_BATCH, os.sched_param(0))


def gpu_present() -> bool:
    """True where a GPU build of Paddle and a GPU device exist; asks no Paddle, so it is instant."""
    try:
        importlib.metadata.version("paddlepaddle-gpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return bool(glob.glob("/dev/nvidia[0-9]*") or os.path.exists("/dev/dxg"))


def check_device(device: str, *, explicit: bool) -> str:
    """The device to use, "gpu" or "cpu" (an index such as "gpu:1" is kept).

    Args:
        device: what the arguments say; the default of the scripts is "gpu".
        explicit: whether the user wrote it. Only then is a missing GPU an error.

    Raises:
        UserError: an explicit GPU where there is none, or an unknown device.
    """
    kind = device.split(":")[0]
    if kind not in ("cpu", "gpu"):
        raise UserError(f"--device {device}: expected cpu, gpu or gpu:N")
    if kind == "cpu" or gpu_present():
        return device
    if explicit:
        raise UserError(
            f"--device {device}: no GPU can be used here (it needs an NVIDIA device and the paddlepaddle-gpu "
            "package, see docs/install.md); use --device cpu, or leave --device out"
        )
    notice("no GPU found, running on the CPU")
    return "cpu"


def load_paddle() -> None:
    """Imports Paddle without its start-up noise (several threads on a CPU are meant), its warnings to developers, and
    its handler of SIGTERM."""
    with _without_noise(), _without_images(), signals.kept(signal.SIGTERM):
        import paddle  # noqa: F401
    warnings.filterwarnings("ignore")


def load_library() -> None:
    """Imports Paddle and PaddleNLP without their start-up noise. PaddleNLP takes seconds and 250 MB: only what
    reads its datasets calls this."""
    load_paddle()
    with _without_noise(), _without_images(), signals.kept(signal.SIGTERM):  # the system's own would be in force
        from paddlenlp.utils.log import logger
    logger.set_level("ERROR")


@contextlib.contextmanager
def _without_images() -> Iterator[None]:
    """Where OpenCV is installed, importing Paddle would load it too: 22 MB for images, of which there are none here."""
    if "cv2" in sys.modules:
        yield
        return
    sys.modules["cv2"] = None  # type: ignore[assignment]  # what Paddle finds where it is not installed
    try:
        yield
    finally:
        del sys.modules["cv2"]


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        yield
    for line in said.getvalue().splitlines():
        if "OMP_NUM_THREADS" not in line:
            print(line, file=sys.stderr)


def use_device(device: str) -> None:
    """Loads Paddle and selects the device."""
    load_paddle()
    import paddle

    paddle.set_device(device)


def resolve_dtype(asked: str, device: str) -> str:
    """The floating-point type to compute in: on a CPU, half precision resolves to float32, said once.

    With CPU_HALF_PRECISION=round in the environment it does not, and products are rounded to it: for tests and checks
    of what a GPU would do, see `utils.kernels.precision`.
    """
    if not device.startswith("cpu") or asked not in ("float16", "bfloat16"):
        return asked
    if os.environ.get("CPU_HALF_PRECISION") == "round":
        return asked
    notice(CPU_HALF_PRECISION_NOTICE.format(asked=asked))
    return "float32"
