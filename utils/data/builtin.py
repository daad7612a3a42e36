"""Names of the datasets that PaddleNLP can download; looking a name up asks no network."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path

from utils.errors import UserError


def built_in_names() -> list[str]:
    """The datasets that PaddleNLP knows by name; asks no network and imports nothing."""
    found = importlib.util.find_spec("paddlenlp")
    places = list(found.submodule_search_locations or []) if found else []
    scripts = Path(places[0], "datasets").glob("*.py") if places else []
    helpers = {"__init__", "dataset", "embedding_dataset", "zero_padding_dataset"}
    return sorted(script.stem for script in scripts if script.stem not in helpers)


def resolve_built_in(name: str) -> str:
    """PaddleNLP's own spelling of a dataset's name (advertise_gen, AdvertiseGen: advertisegen).

    Raises:
        UserError: no folder and no dataset has this name.
    """

    def plain(text: str) -> str:
        return text.lower().replace("_", "").replace("-", "")

    known = built_in_names()
    for candidate in known:
        if plain(candidate) == plain(name):
            return candidate
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(
        f"dataset_name_or_path {name}: neither a folder nor a built-in dataset{hint} (built in: {', '.join(known)})"
    )
