"""JSON schemas of answers, checked as the Claude CLI does: draft-07, in the strict mode of its validator (Ajv).

The CLI exits at its start if it refuses a schema, so invalid schemas are refused here, and the error names the place.
Checked are the dialect, the value of each keyword (draft-07's meta-schema), unknown keywords, and references that do
not lead to a part of the schema. Not checked are regular expressions, because Python's differ from ECMAScript's, and
schemas that contain `$id`; the agent turns the CLI's errors about them into an error of the same field.

Rejected: translating draft 2020-12 to draft-07, because the model would see another schema than the one that was sent.
"""

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

DRAFTS = frozenset({"http://json-schema.org/draft-07/schema#", "http://json-schema.org/draft-07/schema"})
"""Values of `$schema` that the pinned Claude CLI accepts."""
_ONE = ("additionalItems", "additionalProperties", "contains", "else", "if", "not", "propertyNames", "then")
_LISTS = ("allOf", "anyOf", "oneOf")
_MAPS = ("definitions", "patternProperties", "properties")
_OTHER = (
    "$comment", "$defs", "$id", "$ref", "$schema", "const", "contentEncoding", "contentMediaType", "default",
    "dependencies", "description", "enum", "examples", "exclusiveMaximum", "exclusiveMinimum", "format", "items",
    "maxItems", "maxLength", "maxProperties", "maximum", "minItems", "minLength", "minProperties", "minimum",
    "multipleOf", "nullable", "pattern", "readOnly", "required", "title", "type", "uniqueItems", "writeOnly",
)  # fmt: skip
_KEYWORDS = frozenset((*_ONE, *_LISTS, *_MAPS, *_OTHER))


def check_schema(schema: dict[str, Any]) -> None:
    """Raise ValueError, with place and remedy, if the Claude CLI would refuse this output schema."""
    try:
        text = json.dumps(schema)
    except RecursionError:
        raise ValueError("the schema is nested too deeply") from None
    fault = _fault_in(text)
    if fault is not None:
        raise ValueError(fault.encode(errors="backslashreplace").decode())  # a name may be invalid Unicode


@lru_cache(maxsize=256)
def _fault_in(text: str) -> str | None:
    # Imported here because most processes of the platform never handle an output schema.
    from jsonschema import Draft7Validator, FormatChecker
    from jsonschema.exceptions import SchemaError

    schema = json.loads(text)
    dialect = schema.get("$schema")
    if dialect is not None and not (isinstance(dialect, str) and dialect in DRAFTS):
        return (
            f"$schema {str(dialect)[:80]!r} is not supported; the Claude CLI supports draft-07 only: remove $schema or "
            'write "http://json-schema.org/draft-07/schema#"'
        )
    try:
        Draft7Validator.check_schema(schema, format_checker=FormatChecker(formats=()))
        return next(_faults(schema, schema, "", "$id" in text), None)
    except SchemaError as error:
        place = ".".join(map(str, error.absolute_path))
        return f"{place[:200] or 'the schema'} is not valid in JSON schema draft-07: {error.message[:300]}"
    except RecursionError:
        return "the schema is nested too deeply; move parts of it to definitions and refer to them"


def _faults(schema: Any, root: dict[str, Any], place: str, has_ids: bool) -> Iterator[str]:
    if not isinstance(schema, dict):
        return
    for keyword in schema:
        if keyword not in _KEYWORDS:
            yield (
                f"{place}{keyword[:80]} is not a keyword of JSON schema draft-07, which the Claude CLI checks "
                "strictly; remove it"
            )
    choices = schema.get("enum")
    if isinstance(choices, list) and len({json.dumps(choice, sort_keys=True) for choice in choices}) != len(
        choices or [0]
    ):
        yield f"{place}enum must have at least one value, without duplicates"
    if "nullable" in schema and "type" not in schema:
        yield f"{place}nullable requires a type; add one"
    if "additionalItems" in schema and not isinstance(schema.get("items"), list):
        yield f"{place}additionalItems requires a list of schemas in items"
    reference = schema.get("$ref")
    if isinstance(reference, str) and not has_ids and not _resolves(reference, root):
        yield (f"{place}$ref {reference[:80]!r} does not lead to a part of this schema; write #/definitions/NAME")
    for keyword in _ONE:
        yield from _faults(schema.get(keyword), root, f"{place}{keyword}.", has_ids)
    for keyword in (*_LISTS, "items"):
        inner = schema.get(keyword)
        for at, each in enumerate(inner if isinstance(inner, list) else ()):
            yield from _faults(each, root, f"{place}{keyword}.{at}.", has_ids)
    yield from _faults(schema.get("items"), root, f"{place}items.", has_ids)
    for keyword in (*_MAPS, "dependencies"):
        inner = schema.get(keyword)
        for name, each in (inner if isinstance(inner, dict) else {}).items():
            yield from _faults(each, root, f"{place}{keyword}.{name[:80]}.", has_ids)


def _resolves(reference: str, root: dict[str, Any]) -> bool:
    if reference in ("", "#"):
        return True
    if not reference.startswith("#/"):
        return False
    found: Any = root
    for part in reference[2:].split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and int(name[:9]) < len(found):
            found = found[int(name)]
        else:
            return "%" in name  # percent-encoded: the CLI decides
    return isinstance(found, dict | bool)
