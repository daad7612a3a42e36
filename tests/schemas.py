"""Fifty JSON schemas as people ask for them: names say what is special; texts are short enough for small models."""

from __future__ import annotations

from typing import Any

WORD = {"type": "string", "maxLength": 12}
COUNT = {"type": "integer", "minimum": 0, "maximum": 99}
POINT = {"type": "array", "prefixItems": [COUNT, COUNT], "items": False, "minItems": 2}


def closed(optional: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    """An object of these properties and no others, as strict forms of OpenAI's are."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def texts(**settings: Any) -> dict[str, Any]:
    return {"type": "string", **settings}


def lists(items: Any, least: int, most: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


SCHEMAS: dict[str, Any] = {
    # values
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "constant": {"const": {"a": [1, None, "ü"]}},
    "integer in bounds": {"type": "integer", "minimum": -20, "maximum": 5},
    "integer beyond a bound": {"type": "integer", "exclusiveMinimum": 99, "maximum": 1200},
    "number in bounds": {"type": "number", "minimum": 0, "maximum": 1},
    "number with open bounds": {"type": "number", "exclusiveMinimum": -1.5, "exclusiveMaximum": 2.25},
    "multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    "several types": {"type": ["boolean", "null", "integer"], "maximum": 100, "minimum": 0},
    "enumeration of texts": {"enum": ["red", "green", "light blue"]},
    "enumeration of all kinds": {"enum": [1, 2.5, "three", None, True, {"four": 4}, [5]]},
    "enumeration with signs": {"enum": ['a "quoted" word', "back\\slash", "line\nend", "日本", "🙂"]},
    "text of few signs": texts(minLength=2, maxLength=6),
    "long enumeration": {"enum": [f"city-{number}" for number in range(500)]},
    # texts
    "pattern of a plate": texts(pattern="^[A-Z]{2}-[0-9]{3}$"),
    "pattern with choices": texts(pattern="^(north|south)(east|west)?$"),
    "pattern with classes": texts(pattern="^\\w{3,5}@\\w{2,4}\\.(com|org)$"),
    "pattern with signs": texts(pattern='^"[a-f]{2}"\\\\$'),
    "date": texts(format="date"),
    "time": texts(format="time"),
    "moment": texts(format="date-time"),
    "uuid": texts(format="uuid"),
    "address": texts(format="ipv4"),
    # objects
    "person": closed(name=WORD, age=COUNT, member={"type": "boolean"}),
    "optional property": closed(("nick",), name=WORD, nick=WORD),
    "nothing required": {"type": "object", "properties": {"a": COUNT, "b": WORD}, "additionalProperties": False},
    "open object": {"type": "object", "additionalProperties": COUNT, "maxProperties": 3},
    "keys of other languages": closed(**{"名前": WORD, "größe": COUNT, "emoji 🙂": {"type": "boolean"}}),
    "keys with signs": closed(**{'a "b"': COUNT, "c\\d": COUNT, "e/f~g": COUNT, " ": COUNT}),
    "empty object": closed(),
    "nested": closed(a=closed(b=closed(c=closed(d={"type": "boolean"})))),
    "properties by pattern": {
        "type": "object",
        "patternProperties": {"^x_[a-z]{1,3}$": COUNT},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    "property or null": closed(name={"anyOf": [WORD, {"type": "null"}]}, score={**COUNT, "type": ["integer", "null"]}),
    # lists
    "list of numbers": lists(COUNT, 1, 5),
    "list of lists": lists(lists({"type": "boolean"}, 1, 2), 1, 3),
    "list of objects": lists(closed(id=COUNT, tags=lists({"enum": ["x", "y"]}, 0, 3)), 1, 3),
    "pair": POINT,
    "empty list": lists(COUNT, 0, 0),
    # combinations
    "any of objects": {"anyOf": [closed(circle=COUNT), closed(box=lists(COUNT, 2, 2)), {"type": "null"}]},
    "one of objects": {
        "oneOf": [
            closed(kind={"const": "cat"}, lives=COUNT),
            closed(kind={"const": "dog"}, good={"type": "boolean"}),
        ]
    },
    "all of objects": {
        "allOf": [
            {"type": "object", "properties": {"a": COUNT}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ],
        "additionalProperties": False,
        "properties": {"a": True, "b": True},
    },
    "all of bounds": {"allOf": [{"type": "integer", "minimum": 10}, {"type": "integer", "maximum": 12}]},
    # references
    "definitions": {
        "$defs": {"point": POINT},
        **closed(start={"$ref": "#/$defs/point"}, end={"$ref": "#/$defs/point"}),
    },
    "older definitions": {
        "definitions": {"id": texts(pattern="^[0-9a-f]{4}$")},
        **closed(id={"$ref": "#/definitions/id"}),
    },
    "tree": {
        "$defs": {"node": closed(value=COUNT, children=lists({"$ref": "#/$defs/node"}, 0, 1))},
        "$ref": "#/$defs/node",
    },
    "chain": {
        "$defs": {"link": closed(next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/link"}]})},
        **closed(head={"$ref": "#/$defs/link"}),
    },
    # as people send them
    "with words about it": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Weather",
        "description": "What it is like outside",
        **closed(
            city={**WORD, "description": "a place", "examples": ["Oslo"]},
            unit={"enum": ["C", "F"], "default": "C"},
        ),
    },
    "reasoning steps": closed(
        steps=lists(closed(explanation=texts(maxLength=30), output=WORD), 1, 2), final_answer=WORD
    ),
    "invoice": closed(
        number=texts(pattern="^INV-[0-9]{4}$"),
        date=texts(format="date"),
        lines=lists(closed(item=WORD, amount={"type": "number", "minimum": 0, "maximum": 1000}), 1, 2),
        paid={"type": "boolean"},
    ),
    "person with a home": {
        "$defs": {"home": closed(street=WORD, zip=texts(pattern="^[0-9]{5}$"))},
        **closed(("spouse",), name=WORD, home={"$ref": "#/$defs/home"}, spouse={"anyOf": [WORD, {"type": "null"}]}),
    },
}
