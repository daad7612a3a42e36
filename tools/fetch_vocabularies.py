"""Fetches the published vocabulary of LLaMA 1 and 2 with its test vectors; the tests read it, nothing else does.

    python tools/fetch_vocabularies.py

The files are in the source distribution of llama-cpp-python (MIT) on the package index. pip downloads it from
whichever index it is configured for; three files are kept, under share/vocabularies of this environment, and nothing
of the package is built, run or installed. What is there already is not fetched again.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.checkpoints.files import atomic_write  # noqa: E402
from utils.errors import UserError, run_script  # noqa: E402

PACKAGE, VERSION = "llama-cpp-python", "0.3.16"
FOLDER = Path(sys.prefix) / "share" / "vocabularies"
LLAMA = "ggml-vocab-llama-spm.gguf"  # texts are in .inp, their ids in .out
DIGESTS = {  # sha256
    LLAMA: "16c3724582d59aa8bf84711894e833f916ee46a31d80e21312759c48bf8d0e69",
    f"{LLAMA}.inp": "be0a11f7071f0c67d3053a2d377d8f35f0dbcb77ff11a60300fb57d36b477cf0",
    f"{LLAMA}.out": "ad6905c925c49c022974fe67e030382e8a4f56eb4489a0b9481dcedb1ec73b29",
}

# pip asks a source distribution's build backend for name and version before it keeps the file. The package's own
# backend would first fetch build tools; this one, found in its place, only answers the question (PEP 517).
BACKEND = f'''
from pathlib import Path

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = Path(metadata_directory, "{PACKAGE.replace("-", "_")}-{VERSION}.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {PACKAGE}\\nVersion: {VERSION}\\n")
    return folder.name
'''


def is_intact(file: Path, digest: str) -> bool:
    """Whether `file` is there and has this sha256."""
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == digest


def download(folder: Path) -> Path:
    """Downloads the source distribution into `folder`; returns its path.

    Raises:
        UserError: pip could not.
    """
    backend = folder / "backend" / "scikit_build_core" / "build.py"  # the module that the package names
    backend.parent.mkdir(parents=True)
    backend.write_text(BACKEND, encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--no-binary", PACKAGE, "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    environment = {**os.environ, "PYTHONPATH": str(folder / "backend")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode or len(archives) != 1:
        said = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise UserError(
            f"pip could not download the source of {PACKAGE} {VERSION}; mend the connection to the package index "
            f"and run this again. pip said:\n{said}"
        )
    return archives[0]


def extract(archive: Path, folder: Path, digests: Mapping[str, str]) -> None:
    """Writes the files named in `digests` from llama.cpp's vocabularies in `archive` into `folder`.

    Raises:
        UserError: a file is missing or has another content; `folder` is then as it was.
    """
    wanted = {}
    with tarfile.open(archive) as opened:
        for member in opened:
            path = Path(member.name)
            if path.name in digests and path.parts[1:-1] == ("vendor", "llama.cpp", "models"):
                file = opened.extractfile(member)
                wanted[path.name] = file.read() if file else b""
    faults = []
    for name, digest in digests.items():
        if name not in wanted:
            faults.append(f"{archive.name}: vendor/llama.cpp/models/{name} is missing")
        elif hashlib.sha256(wanted[name]).hexdigest() != digest:
            faults.append(f"{archive.name}: vendor/llama.cpp/models/{name} is another file than expected")
    if faults:
        raise UserError(faults)
    for name, content in wanted.items():
        atomic_write(folder / name, content)


def main() -> None:
    if all(is_intact(FOLDER / name, digest) for name, digest in DIGESTS.items()):
        print(f"==> LLaMA's vocabulary is in {FOLDER}")
        return
    print(
        f"==> LLaMA's vocabulary for the tests: from the source of {PACKAGE} {VERSION} (51 MB) to {FOLDER}", flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        extract(download(Path(folder)), FOLDER, DIGESTS)


if __name__ == "__main__":
    run_script(main)
