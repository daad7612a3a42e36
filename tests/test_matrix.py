"""The support table says what happened when it was run, no more."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from utils.families import FAMILIES


@pytest.fixture
def matrix(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("matrix", root / "tools" / "matrix.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["matrix"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_readme_has_a_row_of_results_per_family(root: Path, matrix: ModuleType) -> None:
    found = matrix.TABLE.search((root / "README.md").read_text("utf-8"))
    assert found is not None
    header, _, *rows = found[0].strip().splitlines()
    assert header == f"| Model | {' | '.join(matrix.COLUMNS)} |"
    assert len(rows) == len(FAMILIES)
    for row, family in zip(rows, FAMILIES.values(), strict=True):
        name, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert name == f"[{family.title}]({family.name}/README.md)"
        for cell, check in zip(cells, matrix.COLUMNS.values(), strict=True):
            assert cell in ((matrix.DONE,) if check else (matrix.OPEN,))


def test_a_cell_that_fails_is_shown_and_told(
    matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def only_llama(bench: object) -> None:
        assert bench.model.is_dir() and (bench.home / "data" / "train.json").is_file()  # type: ignore[attr-defined]
        if bench.family.name != "llama":  # type: ignore[attr-defined]
            raise matrix.CellError("it broke")

    monkeypatch.setattr(matrix, "COLUMNS", {"SFT": only_llama, "Quantization": None})
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- matrix -->\nold\n<!-- /matrix -->\nafter\n", "utf-8")
    monkeypatch.setattr("sys.argv", ["matrix.py", "--only", "llama"])
    with pytest.raises(SystemExit) as ended:
        matrix.main()
    assert not ended.value.code and "old" in readme.read_text("utf-8")
    monkeypatch.setattr("sys.argv", ["matrix.py"])
    with pytest.raises(SystemExit) as ended:
        matrix.main()
    assert ended.value.code == 1 and "it broke" in capsys.readouterr().err
    lines = readme.read_text("utf-8").splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    rows = [line for line in lines if line.startswith("| [")]
    assert f"| [{FAMILIES['llama'].title}](llama/README.md) | ✅ | 🚧 |" in rows
    assert len(rows) == len(FAMILIES) == 1 + sum(row.endswith("| ❌ | 🚧 |") for row in rows)


def test_a_script_that_fails_fails_its_cell(matrix: ModuleType, tmp_path: Path) -> None:
    bench = matrix.Bench(FAMILIES["llama"], tmp_path / "nowhere", tmp_path)
    with pytest.raises(matrix.CellError, match=r"(?s)exit code 2.*data_file"):
        bench.answers(tmp_path / "nowhere")
