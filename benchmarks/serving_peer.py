"""llama.cpp's server for benchmarks/serving.py: built from the llama-cpp-python source package, on the same weights.

All of it lies in benchmarks/built, which git ignores; what is there is not made again.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.checkpoints.embedded import packaged_file
from utils.errors import UserError, notice

BUILT = Path(__file__).resolve().parent / "built"
VERSION = "0.3.36"
SOURCES = f"llama_cpp_python-{VERSION}"
SERVER = BUILT / "llama-server" / "bin" / "llama-server"
WEIGHTS = BUILT / "smollm2-135m-instruct-f16.gguf"
# As for this processor, one program, without what the benchmark does not use or what would be fetched.
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
}


def server() -> Path:
    """The program llama-server, built now if it is not there (about 10 minutes on two cores).

    Raises:
        UserError: no CMake or compiler, or a step failed.
    """
    if SERVER.is_file():
        return SERVER
    if shutil.which("cmake") is None:
        raise UserError("llama.cpp's server is built with CMake and a C++ compiler: apt-get install cmake g++")
    BUILT.mkdir(exist_ok=True)
    notice(f"building llama.cpp's server in {BUILT} (once; about 10 minutes, 1 GB)")
    package, folder = BUILT / f"{SOURCES}.tar.gz", BUILT / SOURCES
    if not package.is_file():
        source = ["--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(BUILT), f"llama-cpp-python=={VERSION}"]
        _run([sys.executable, "-m", "pip", "download", "--quiet", *source])
    if not folder.is_dir():
        with tarfile.open(package) as archive:
            archive.extractall(BUILT, filter="data")
    build = SERVER.parent.parent
    chosen = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    _run(["cmake", "-S", str(folder / "vendor" / "llama.cpp"), "-B", str(build), *chosen])
    _run(["nice", "-n", "10", "cmake", "--build", str(build), "--target", "llama-server", "--parallel"])
    return SERVER


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        said = "\n".join(done.stdout.splitlines()[-20:])
        raise UserError(f"{' '.join(command)}\nended with exit code {done.returncode}; it said:\n{said}")


def weights() -> Path:
    """The embedded model as GGUF with matrices in float16, written now if it is not there.

    The package's own file has 4 bits a weight; these are its values, which the toolchain uses too.
    """
    if WEIGHTS.is_file():
        return WEIGHTS
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, dequantize

    BUILT.mkdir(exist_ok=True)
    reader = GGUFReader(packaged_file())
    unfinished = WEIGHTS.with_suffix(".tmp")
    writer = GGUFWriter(unfinished, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue  # which the writer adds
        kind, *inner = field.types
        writer.add_key_value(key, field.contents(), kind, inner[-1] if kind == GGUFValueType.ARRAY else None)
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
        matrix = values.ndim > 1
        kind = GGMLQuantizationType.F16 if matrix else GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, values.astype(np.float16 if matrix else np.float32), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(WEIGHTS)
    return WEIGHTS


def command(port: int, threads: int, slots: int, context: int) -> list[str]:
    """What starts the server: as many slots as our answers at a time, each with `context` tokens; else its defaults."""
    options = {
        "--model": weights(),
        "--host": "127.0.0.1",
        "--port": port,
        "--threads": threads,
        "--parallel": slots,
        "--ctx-size": slots * context,
    }
    return [str(server()), *(str(word) for pair in options.items() for word in pair)]
