"""What is wrong with a request, in words: each field with its fault; of one that there is not, the one that was meant.

Values are never quoted: they may be secrets. Guesses are of two kinds: a known field that is spelt alike, or else the
one field that is required and missing, which is what somebody wants to know who calls `prompt` `message`.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import Request
from pydantic import BaseModel

from hypercore_agents.api.errors import InvalidRequest

_WHOLE = ("body", "query", "path", "header")
_MOST_FAULTS, _LONGEST_NAME = 20, 100
"""A body may have a million wrong fields, with names of a megabyte: no more than this is looked at and said."""
_UNKNOWN, _MISSING, _NO_JSON = "extra_forbidden", "missing", "json_invalid"


def describe_faults(found: Iterable[Mapping[str, Any]], known: Sequence[str] = ()) -> InvalidRequest:
    """Turn FastAPI's or pydantic's list of faults into one message that names each field.

    `known`: the fields of the body.
    """
    located = [(_place(fault["loc"]), fault) for fault in found]
    if broken := next((fault for _, fault in located if fault["type"] == _NO_JSON), None):
        return _no_json(broken)
    missing = [str(place[0]) for place, fault in located if fault["type"] == _MISSING and len(place) == 1]
    faults = []
    for place, fault in sorted(located, key=lambda pair: pair[1]["type"] != _UNKNOWN)[:_MOST_FAULTS]:
        problem = str(fault["msg"]).removeprefix("Value error, ")
        if fault["type"] == _UNKNOWN:
            top = len(place) == 1
            problem = "there is no such field" + _guess(str(place[-1]), known if top else (), missing if top else ())
        elif fault["type"] == _MISSING and not place:
            problem = "required; send a JSON object"
        where = ".".join(map(str, place))[:_LONGEST_NAME] or str(next(iter(fault["loc"]), "body"))
        faults.append({"field": where, "problem": problem})
    return _refusal(faults)


def refuse_parameters(given: Mapping[str, int], known: Sequence[str], required: Sequence[str]) -> None:
    """Raise InvalidRequest when the query has a parameter that the route does not know, or one more than once.

    `given`: how often each is there.
    """
    missing = [name for name in required if name not in given]
    faults: list[dict[str, str]] = []
    for name, times in given.items():
        if len(faults) == _MOST_FAULTS:
            break
        if name not in known:
            problem = "there is no such query parameter" + _guess(name, known, missing)
            faults.insert(0, {"field": name[:_LONGEST_NAME], "problem": problem})
        elif times > 1:
            faults.append({"field": name, "problem": f"given {times} times; give it once"})
    if faults:
        raise _refusal(faults)


def refuse_other_encodings(body: bytes) -> None:
    """Raise InvalidRequest when a JSON body is in UTF-16 or UTF-32, which Python's parser would take."""
    encoding = json.detect_encoding(body)
    if not encoding.startswith("utf-8"):
        raise _refusal([{"field": "body", "problem": f"must be JSON in UTF-8; this is {encoding[:6].upper()}"}])


def fields_of_body(request: Request) -> list[str]:
    """Return the names of the fields of the body that this request's route takes; none when it takes no object."""
    field = getattr(request.scope.get("route"), "body_field", None)
    model = getattr(getattr(field, "field_info", None), "annotation", None)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _refusal(faults: Sequence[Mapping[str, str]]) -> InvalidRequest:
    faults = faults[:_MOST_FAULTS]
    message = "; ".join(f"{fault['field']}: {fault['problem']}" for fault in faults[:5])
    return InvalidRequest(message, field=faults[0]["field"] if faults else None, details={"faults": faults})


def _guess(unknown: str, known: Sequence[str], missing: Sequence[str]) -> str:
    if len(unknown) > _LONGEST_NAME:
        return "; see /docs"
    like = difflib.get_close_matches(unknown.lower(), known, n=1, cutoff=0.7)
    meant = like[0] if like else missing[0] if len(missing) == 1 else None
    return f"; did you mean {meant}?" if meant is not None else "; see /docs"


def _place(location: Sequence[str | int]) -> Sequence[str | int]:
    inside = location[1:] if location and location[0] in _WHOLE else location
    return inside[:-1] if inside and inside[-1] == "[key]" else inside  # pydantic's mark of a fault in a name


def _no_json(fault: Mapping[str, Any]) -> InvalidRequest:
    at = next(reversed(fault["loc"]), None)
    why = fault.get("ctx", {}).get("error")
    said = f" at character {at}" if isinstance(at, int) else ""
    problem = f"not JSON{said}{f': {why}' if why else ''}"
    return _refusal([{"field": "body", "problem": problem}])
