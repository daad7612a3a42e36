"""The rules of the architecture: who may import whom, and what stays free of Paddle."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from utils.arguments import (
    CreatePretrainingDataArguments,
    ExportArguments,
    FinetuneArguments,
    MergeLoraArguments,
    MergeTpArguments,
    PredictArguments,
    PretrainArguments,
    ServeArguments,
    TransToJsonArguments,
)
from utils.arguments.fields import options_of

SCRIPTS = (
    "finetune_generation",
    "run_pretrain",
    "predictor",
    "flask_server",
    "merge_lora_params",
    "merge_tp_params",
    "export_model",
)
# package -> packages that it must never import
FORBIDDEN = {
    "arguments": {"adapters", "checkpoints", "data", "families", "inference", "kernels", "training"},
    "families": {"adapters", "checkpoints", "data", "inference", "training", "arguments"},
    "kernels": {"adapters", "arguments", "checkpoints", "data", "families", "inference", "training"},
    "checkpoints": {"arguments", "inference", "training"},
    "model": {"adapters", "arguments", "data", "inference", "serving", "training"},
    "data": {"adapters", "arguments", "inference", "training"},
    "adapters": {"arguments", "data", "inference", "training"},
    "inference": {"serving", "training"},
    "serving": {"training"},
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


@cache
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


def test_no_test_imports_from_another(root: Path) -> None:
    """What two share is in a module of its own: a test can be read, moved and run alone."""
    for path in (root / "tests").rglob("*.py"):
        assert not {name for name in imported(path) if name.split(".")[0].startswith("test_")}, path


# packages within and among which no module imports itself by way of others
WITHOUT_CIRCLES = ("inference", "kernels", "model", "partition", "serving", "training")


def test_no_imports_go_round_in_a_circle(root: Path) -> None:
    paths = [path for package in WITHOUT_CIRCLES for path in (root / "utils" / package).rglob("*.py")]
    modules = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    TopologicalSorter({name: imported(path) & modules.keys() for name, path in modules.items()}).prepare()


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
        "flask_server, utils.serving.app, utils.serving.worker, utils.inference.commands",
        "utils.serving.page.server, utils.serving.page.settings",
        "utils.data.pretrain_build, utils.data.pretrain_dataset, utils.training.pretraining, utils.training.finish",
    ],
)
def test_what_checks_arguments_and_files_loads_no_paddle(root: Path, modules: str) -> None:
    code = f"import sys, {modules}; sys.exit('paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


# --- messages ---------------------------------------------------------------------------------------

PARSED = {
    "finetune_generation.py": FinetuneArguments,
    "run_pretrain.py": PretrainArguments,
    "predictor.py": PredictArguments,
    "flask_server.py": ServeArguments,
    "export_model.py": ExportArguments,
    "merge_lora_params.py": MergeLoraArguments,
    "merge_tp_params.py": MergeTpArguments,
    "data/tools/trans_to_json.py": TransToJsonArguments,
    "data/tools/create_pretraining_data.py": CreatePretrainingDataArguments,
}
OF_OTHERS = {"nproc_per_node", "gpus", "no-deps"}  # options of Paddle's launcher and of pip
# Messages that other scripts, which import these modules for something else, cannot come to.
REACHED_BY_THEIR_OWN = {
    ("utils/checkpoints/merge_tp.py", "merge_model_path"),
    ("utils/data/pretrain_build.py", "json_key"),
    ("utils/data/pretrain_work.py", "workers"),
    ("utils/data/template.py", "chat_template"),
    ("utils/data/turns.py", "chat_template"),
}


def reached(root: Path, script: str) -> set[Path]:
    """The modules that a script imports, directly or through others, beside those of `utils.arguments`."""
    found, waiting = set(), [root / script]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for name in imported(path):
            place = root / name.replace(".", "/")
            if name.startswith("utils.") and not name.startswith("utils.arguments"):
                waiting += [file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]
    return found


@cache
def texts_of(path: Path) -> list[str]:
    """Texts in the code of a module, docstrings aside; those with values in them as they are written."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    parts -= {id(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)}
    parts |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if id(node) not in parts and isinstance(node, ast.JoinedStr | ast.Constant)
    ]


@pytest.mark.parametrize("script", PARSED)
def test_messages_name_options_that_the_script_has(root: Path, script: str) -> None:
    """Or commands of another script, which are named with it."""
    known, faults = {*options_of(PARSED[script]), *OF_OTHERS}, []
    for path in sorted(reached(root, script)):
        place = path.relative_to(root).as_posix()
        for text in texts_of(path):
            wrong = {name for name in re.findall(r"--([a-z][a-z_-]+)", text) if name not in known}
            wrong -= {name for module, name in REACHED_BY_THEIR_OWN if module == place}
            if wrong and ".py" not in text:
                faults.append(f"{place}: {', '.join(sorted(wrong))} in {text[:120]}")
    assert not faults


def test_no_file_asks_to_be_split(root: Path) -> None:
    for path in [*(root / "utils").rglob("*.py"), *root.glob("*.py")]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path


def test_every_option_is_read(root: Path) -> None:
    """What a script accepts has an effect; settings of quantization are refused, or told to have none."""
    from utils.arguments import scripts
    from utils.arguments.fields import Arguments, options_of
    from utils.arguments.groups.quantization import QuantArguments

    sources = [*(root / "utils").rglob("*.py"), *root.glob("*.py"), *(root / "data" / "tools").glob("*.py")]
    text = ""
    for path in sources:
        if path.parent.name != "groups":
            own = path.read_text(encoding="utf-8")
            # plan.py lists options to leave them out of a comparison
            text += re.sub(r'"[^"\n]*"', "", own) if path.name == "plan.py" else own
    known = {*options_of(QuantArguments), "data_format", "data_impl"}  # of the last two there is one choice
    classes = [cls for cls in vars(scripts).values() if isinstance(cls, type) and issubclass(cls, Arguments)]
    assert len(classes) > 8
    for name in {name for cls in classes for name in options_of(cls)} - known:
        assert re.search(rf"""\.{name}\b|["']{name}["']|\b{name}: """, text), name


# --- names ------------------------------------------------------------------------------------------

NAMED = ("id", "attr", "name", "arg", "asname")  # fields of the syntax tree that hold names
# a private word, the field's term, and where the private one must not stand; some mean something else in other places
GLOSSARY = (
    ("Held", "ShardPlan", "utils"),
    ("held", "shard_plan", "utils/adapters utils/training utils/partition utils/checkpoints/load.py"),
    ("Alone", "ProcessGroup", "utils"),
    ("Peers", "ConnectedGroup", "utils"),
    ("peers", "processes", "utils"),
    ("gate", "barrier", "utils/inference utils/parallel utils/partition utils/training"),
    ("rings", "traced_collectives", "utils"),
    ("WeightShare", "Zero3", "utils"),
    ("Slot", "Accumulator", "utils/parallel utils/training"),
    ("Head", "SharedPrefix", "utils/inference"),
    ("Heads", "SharedPrefixes", "utils/inference"),
    ("Places", "AttentionInputs", "utils"),
    ("turns", "rotaries", "utils/model"),
    ("turned", "rotated or transposed", "utils/model utils/checkpoints utils/adapters utils/families"),
    ("few", "single_token", "utils/kernels utils/model"),
    ("ways", "branches", "utils/model/steps.py utils/model/fused.py utils/model/plain.py"),
    ("Update", "Residual", "utils/kernels utils/model"),
    ("room", "capacity", "utils/model utils/kernels"),
    ("Piece", "CheckpointShard", "utils/training"),
    ("corner", "engine", "utils"),
)


@pytest.mark.parametrize(("private", "term", "places"), GLOSSARY)
def test_names_are_the_terms_of_the_field(root: Path, private: str, term: str, places: str) -> None:
    """Names in code, of modules too."""
    faults = []
    for place in places.split():
        for path in [root / place] if place.endswith(".py") else sorted((root / place).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = {path.stem, *(getattr(node, field, None) for node in ast.walk(tree) for field in NAMED)}
            if private in names:
                faults.append(f"{path.relative_to(root)}: {private}, say {term}")
    assert not faults
