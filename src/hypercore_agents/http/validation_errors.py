"""Error messages for invalid requests: each wrong field with its problem, and a suggestion for unknown fields.

Values are never quoted, because they may be secrets. The suggestion is a known field with a similar name, or else the
only missing required field, for example `prompt` for the unknown field `message`.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import Request
from pydantic import BaseModel

from hypercore_agents.api.errors import InvalidRequest

_WHOLE = ("body", "query", "path", "header")
_MAX_FAULTS, _MAX_NAME = 20, 100
"""A body may have a million wrong fields with names of a megabyte; only this much is examined and reported."""
_UNKNOWN, _MISSING, _NOT_JSON = "extra_forbidden", "missing", "json_invalid"


def describe_faults(found: Iterable[Mapping[str, Any]], known: Sequence[str] = ()) -> InvalidRequest:
    """Return one error for a list of faults from FastAPI or pydantic; its message names each field.

    `known` are the fields of the body.
    """
    located = [(_place(fault["loc"]), fault) for fault in found]
    if broken := next((fault for _, fault in located if fault["type"] == _NOT_JSON), None):
        return _not_json(broken)
    missing = [str(place[0]) for place, fault in located if fault["type"] == _MISSING and len(place) == 1]
    faults = []
    for place, fault in sorted(located, key=lambda pair: pair[1]["type"] != _UNKNOWN)[:_MAX_FAULTS]:
        problem = str(fault["msg"]).removeprefix("Value error, ")
        if fault["type"] == _UNKNOWN:
            top = len(place) == 1
            problem = "unknown field" + _suggestion(str(place[-1]), known if top else (), missing if top else ())
        elif fault["type"] == _MISSING and not place:
            problem = "required; send a JSON object"
        where = ".".join(map(str, place))[:_MAX_NAME] or str(next(iter(fault["loc"]), "body"))
        faults.append({"field": where, "problem": problem})
    return _refusal(faults)


def refuse_parameters(given: Mapping[str, int], known: Sequence[str], required: Sequence[str]) -> None:
    """Raise InvalidRequest if the query has an unknown parameter, or one more than once.

    `given` has the number of occurrences of each parameter.
    """
    missing = [name for name in required if name not in given]
    faults: list[dict[str, str]] = []
    for name, times in given.items():
        if len(faults) == _MAX_FAULTS:
            break
        if name not in known:
            problem = "unknown query parameter" + _suggestion(name, known, missing)
            faults.insert(0, {"field": name[:_MAX_NAME], "problem": problem})
        elif times > 1:
            faults.append({"field": name, "problem": f"given {times} times; give it once"})
    if faults:
        raise _refusal(faults)


def refuse_other_encodings(body: bytes) -> None:
    """Raise InvalidRequest if a JSON body is in UTF-16 or UTF-32, which Python's parser accepts."""
    encoding = json.detect_encoding(body)
    if not encoding.startswith("utf-8"):
        raise _refusal([{"field": "body", "problem": f"must be JSON in UTF-8; this is {encoding[:6].upper()}"}])


def fields_of_body(request: Request) -> list[str]:
    """Return the field names of this route's body; none if its body is not an object."""
    field = getattr(request.scope.get("route"), "body_field", None)
    model = getattr(getattr(field, "field_info", None), "annotation", None)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _refusal(faults: Sequence[Mapping[str, str]]) -> InvalidRequest:
    faults = faults[:_MAX_FAULTS]
    message = "; ".join(f"{fault['field']}: {fault['problem']}" for fault in faults[:5])
    return InvalidRequest(message, field=faults[0]["field"] if faults else None, details={"faults": faults})


def _suggestion(unknown: str, known: Sequence[str], missing: Sequence[str]) -> str:
    if len(unknown) > _MAX_NAME:
        return "; see /docs"
    similar = difflib.get_close_matches(unknown.lower(), known, n=1, cutoff=0.7)
    meant = similar[0] if similar else missing[0] if len(missing) == 1 else None
    return f"; did you mean {meant}?" if meant is not None else "; see /docs"


def _place(location: Sequence[str | int]) -> Sequence[str | int]:
    inside = location[1:] if location and location[0] in _WHOLE else location
    return inside[:-1] if inside and inside[-1] == "[key]" else inside  # pydantic's mark for an invalid key


def _not_json(fault: Mapping[str, Any]) -> InvalidRequest:
    at = next(reversed(fault["loc"]), None)
    why = fault.get("ctx", {}).get("error")
    position = f" at character {at}" if isinstance(at, int) else ""
    problem = f"not JSON{position}{f': {why}' if why else ''}"
    return _refusal([{"field": "body", "problem": problem}])
