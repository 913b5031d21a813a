"""Text and numbers that JSON allows but later components cannot store: refused or replaced where they enter.

Text from users is refused with an error (`storable`), never changed silently. Text from a CLI or a model cannot be
refused, because the turn would be lost with it: `replace_lone_surrogates` replaces what UTF-8 cannot encode. Both work
on parsed values, never on JSON text, where an escape means something else after an escaped backslash.

A null character ends a command-line argument and is not valid text in PostgreSQL; a lone surrogate has no UTF-8
encoding; NaN and infinities are not JSON, although Python's parser accepts them.
"""

import math
import re
from typing import Any

from pydantic import BaseModel

_LONE = re.compile("[\ud800-\udfff]")


def replace_lone_surrogates(value: Any) -> Any:
    """Return a parsed JSON value with lone surrogates replaced by U+FFFD; containers are changed in place.

    Programs that count in UTF-16 leave a lone surrogate where they cut text within a character.
    """
    if isinstance(value, str):
        return value if _is_unicode(value) else _LONE.sub("\ufffd", value)
    containers = [value]  # a stack, because a parser nests deeper than Python can recurse
    while containers:
        container = containers.pop()
        if isinstance(container, dict):
            if not all(map(_is_unicode, container)):
                entries = [(replace_lone_surrogates(name), inner) for name, inner in container.items()]
                container.clear()
                container.update(entries)
            items: Any = container.items()
        elif isinstance(container, list):
            items = enumerate(container)
        else:
            continue
        for key, inner in items:
            if isinstance(inner, str):
                if not _is_unicode(inner):
                    container[key] = _LONE.sub("\ufffd", inner)
            elif isinstance(inner, dict | list):
                containers.append(inner)
    return value


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def storable(value: Any) -> Any:
    """Return the value unchanged. Raises ValueError if a string or a number anywhere in it cannot be stored."""
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("text must not contain null characters")
        if not _is_unicode(value):
            raise ValueError("text must not contain lone surrogates: it is not valid Unicode")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("numbers must be finite")
    elif isinstance(value, dict):
        for name, inner in value.items():
            storable(name)
            storable(inner)
    elif isinstance(value, list):
        for inner in value:
            storable(inner)
    elif isinstance(value, BaseModel):
        storable(vars(value))
    return value
