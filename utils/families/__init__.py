"""The model families: each module of this package that defines one, by its short name and in the order of modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from utils.families.base import FamilySpec

__all__ = ["FAMILIES", "FamilySpec", "family_of"]


def _defined() -> Iterator[FamilySpec]:
    """One instance of every family: of each class that a module defines under a name of its own."""
    for module in iter_modules(__path__):
        if module.ispkg:
            continue
        found = import_module(f"{__name__}.{module.name}")
        yield from (
            value
            for value in vars(found).values()
            if isinstance(value, FamilySpec) and type(value).__module__ == found.__name__
        )


FAMILIES: dict[str, FamilySpec] = {spec.name: spec for spec in _defined()}


def family_of(config: Mapping[str, Any]) -> FamilySpec | None:
    """The family that a config.json (as a dict) belongs to, or None if none knows it."""
    return next((spec for spec in FAMILIES.values() if spec.matches(config)), None)
