"""Two versions side by side, on a toolchain of a few lines: what differs is found and told, what is equal is not."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

# Writes what a training leaves; goes on from a checkpoint if there is one. LOSS is that of the first step.
TRAINING = """
import json, os, sys
from pathlib import Path
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if os.environ.get("PADDLE_TRAINER_ID", "0") != "0":
    sys.exit()
output = Path(options["--output_dir"])
LOSS = 2.0
REFUSED = False
if REFUSED and "--lora" in options:
    print("error: lora is not for you")
    sys.exit(2)
saved, steps = int(options["--save_steps"]), int(options["--max_steps"])
done = (output / f"checkpoint-{saved}").is_dir()
(output / f"checkpoint-{saved}").mkdir(parents=True, exist_ok=True)
ranks = int(os.environ.get("PADDLE_TRAINERS_NUM", 1))
logs = [{"step": n, "loss": LOSS / n / ranks, "tokens_per_second": os.getpid()} for n in range(1, steps + 1)]
(output / "trainer_state.json").write_text(json.dumps({"log_history": logs[saved:] if done else logs}))
"""
RUNTIME = "def prepare(**_): ...\ndef load_paddle(): ...\n"


def git(folder: Path) -> list[str]:
    return ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@example.org"]


@pytest.fixture
def tool(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "tools"))
    import compare_versions

    return compare_versions


@pytest.fixture
def repository(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A committed toolchain whose scripts need no time, with one family."""
    folder, model = tmp_path / "toolchain", tmp_path / "model"
    (folder / "utils").mkdir(parents=True)
    model.mkdir()
    (folder / "utils" / "__init__.py").write_text("")
    (folder / "utils" / "runtime.py").write_text(RUNTIME)
    (folder / "finetune_generation.py").write_text(TRAINING)
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git(folder), *words], check=True)
    monkeypatch.setattr(tool, "ROOT", folder)
    monkeypatch.setattr(tool, "families_of", lambda before: {"llama": model})
    return folder


Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run(tool: ModuleType, repository: Path, tmp_path: Path) -> Run:
    """(exit code, results) of a comparison with the commit."""

    def compare(*words: str) -> tuple[int, dict[str, Any]]:
        results = tmp_path / "results.json"
        with pytest.raises(SystemExit) as ended:
            tool.main(["--before", "HEAD", "--results", str(results), "--jobs", "2", *words])
        return int(ended.value.code or 0), json.loads(results.read_text("utf-8"))

    return compare


def edit(repository: Path, old: str, new: str) -> None:
    script = repository / "finetune_generation.py"
    script.write_text(script.read_text().replace(old, new))


def test_a_version_equals_itself(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    code, results = run("--methods", "sft", "--layouts", "DP2")
    assert code == 0
    assert [(cell["check"], cell["worst"], cell["failed"]) for cell in results["cells"]] == [
        ("sft", 0.0, False),
        ("sft goes on", 0.0, False),
        ("DP2 sft", 0.0, False),
    ]
    assert [cell["compared"] for cell in results["cells"]] == [6, 3, 4 + 2]
    said = capsys.readouterr().out
    assert "[1/3] llama, sft: = (" in said and "min left)" in said


def test_what_differs_is_found_and_named(run: Run, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(repository, "LOSS = 2.0", "LOSS = 2.0 * (1 + 1e-4)")
    code, results = run("--methods", "sft")
    assert code == 1
    assert [cell["worst"] for cell in results["cells"]] == pytest.approx([1e-4, 1e-4], rel=1e-3)
    said = capsys.readouterr().out
    assert "| sft | **1e-04** |" in said and "0 of 2 checks agree" in said
    assert re.search(r"llama, sft goes on: continued: step [456] loss: 0\.\d+ is now 0\.\d+", said)
    assert run("--methods", "sft", "--tolerance", "1e-3")[0] == 0


def test_what_both_refuse_is_no_difference_and_what_one_refuses_is(run: Run, repository: Path) -> None:
    edit(repository, "REFUSED = False", "REFUSED = True")
    code, results = run("--methods", "lora")
    assert code == 1 and results["cells"][0]["failed"]
    assert "exit code 2\nerror: lora is not for you" in results["cells"][0]["note"]
    subprocess.run([*git(repository), "commit", "-qam", "second"], check=True)
    code, results = run("--methods", "lora")
    assert code == 0 and [(cell["worst"], cell["failed"]) for cell in results["cells"]] == [(None, False)] * 2
    assert results["cells"][0]["note"] == "both refuse it: error: lora is not for you"


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (1.0, 1.0, 0.0),
        (math.nan, math.nan, 0.0),
        (4.0, 3.0, 0.25),
        (0.0, 1e-30, 1.0),
        (math.inf, 1.0, math.inf),
        ("yes", "yes", 0.0),
        ("yes", "no", math.inf),
        (np.array([1.0, 8.0]), np.array([1.5, 8.0]), 0.0625),
        (np.zeros(2, np.float32), np.zeros(2, np.float32), 0.0),
        (np.zeros(2, np.float32), np.zeros(3, np.float32), math.inf),
        (np.zeros(2, np.float32), np.zeros(2, np.float16), math.inf),
    ],
)
def test_how_far_two_values_lie_apart(tool: ModuleType, before: Any, after: Any, expected: float) -> None:
    from versions.difference import apart

    assert apart(before, after) == expected


def test_what_is_missing_differs_and_what_is_new_does_not(tool: ModuleType) -> None:
    from versions.difference import compare

    assert compare({"a": 1.0}, {"a": 1.0, "b": 2.0}).worst == 0
    found = compare({"a": 1.0, "b": 2.0}, {"a": 1.0})
    assert found.worst == math.inf and found.where == "b is missing" and found.compared == 2
