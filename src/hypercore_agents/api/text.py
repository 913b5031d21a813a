"""What JSON can say and nobody after it can keep: refused or replaced where it comes in.

What a user sends is refused (`keepable`), so that nobody's words are changed in silence. What a CLI or a model says
cannot be refused, since a turn would be lost with it: there, `cleaned` replaces what has no UTF-8. Both look at values,
never at JSON text: an escape in a text is not what it looks like when the backslash before it is escaped itself.

A null character ends a command line's argument and is no text for PostgreSQL; a lone surrogate has no UTF-8; NaN and
infinities are no JSON, though Python's parser takes them.
"""

import math
import re
from typing import Any

from pydantic import BaseModel

_LONE = re.compile("[\ud800-\udfff]")


def cleaned(value: Any) -> Any:
    """Return a parsed JSON value with U+FFFD in the place of each lone surrogate; containers are changed in place.

    Programs that count in UTF-16 leave one where they cut a text in the middle of a character.
    """
    if isinstance(value, str):
        return value if _is_unicode(value) else _LONE.sub("\ufffd", value)
    containers = [value]  # a stack: a parser nests deeper than Python may call itself
    while containers:
        container = containers.pop()
        if isinstance(container, dict):
            if not all(map(_is_unicode, container)):
                entries = [(cleaned(name), inner) for name, inner in container.items()]
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


def keepable(value: Any) -> Any:
    """Return the value as it is. Raises ValueError when a string or a number anywhere in it cannot be kept."""
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("text must not have null characters")
        if not _is_unicode(value):
            raise ValueError("text must not have lone surrogates: it is no valid Unicode")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("numbers must be finite")
    elif isinstance(value, dict):
        for name, inner in value.items():
            keepable(name)
            keepable(inner)
    elif isinstance(value, list):
        for inner in value:
            keepable(inner)
    elif isinstance(value, BaseModel):
        keepable(vars(value))
    return value
