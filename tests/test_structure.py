"""The rules of the architecture: who may import whom, and what stays free of Paddle."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = ("finetune_generation", "run_pretrain", "predictor", "merge_lora_params", "merge_tp_params", "export_model")
# package -> packages that it must never import
FORBIDDEN = {
    "arguments": {"adapters", "checkpoints", "data", "families", "inference", "kernels", "training"},
    "families": {"adapters", "checkpoints", "data", "inference", "training", "arguments"},
    "kernels": {"adapters", "arguments", "checkpoints", "data", "families", "inference", "training"},
    "checkpoints": {"arguments", "inference", "training"},
    "data": {"adapters", "arguments", "inference", "training"},
    "adapters": {"arguments", "data", "inference", "training"},
    "inference": {"training"},
    "partition": {"adapters", "arguments", "data", "inference", "training"},
    "parallel": {
        "adapters",
        "arguments",
        "checkpoints",
        "data",
        "families",
        "inference",
        "kernels",
        "partition",
        "training",
    },
}


def imported(path: Path) -> set[str]:
    """Names of the modules that a file imports anywhere, also inside functions; not for types only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = [ast.Pass()]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_packages_import_only_what_they_may(root: Path) -> None:
    faults = []
    for package, forbidden in FORBIDDEN.items():
        for path in (root / "utils" / package).rglob("*.py"):
            place = path.relative_to(root / "utils").as_posix()
            for name in imported(path):
                parts = name.split(".")
                if parts[0] == "utils" and len(parts) > 1 and parts[1] in forbidden:
                    faults.append(f"{place} imports {name}")
    assert not faults


def test_nothing_imports_a_script(root: Path) -> None:
    for path in (root / "utils").rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & set(SCRIPTS), path


@pytest.mark.parametrize(
    "modules",
    [
        "utils.arguments, utils.families, utils.errors, utils.runtime",
        "utils.checkpoints.locate, utils.checkpoints.fingerprint, utils.checkpoints.merge",
        "utils.data.dataset, utils.data.template, utils.families.tokenizers, utils.adapters.check",
        "finetune_generation, run_pretrain, predictor, merge_lora_params, merge_tp_params, export_model",
        "utils.data.pretrain_build, utils.data.pretrain_dataset, utils.training.pretraining, utils.training.finish",
    ],
)
def test_what_checks_arguments_and_files_loads_no_paddle(root: Path, modules: str) -> None:
    code = f"import sys, {modules}; sys.exit('paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_no_file_asks_to_be_split(root: Path) -> None:
    for path in [*(root / "utils").rglob("*.py"), *root.glob("*.py")]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path
