"""What JSON can say and nobody after it can keep: refused where it comes in, rather than failing somewhere behind.

A null character ends a command line's argument and is no text for PostgreSQL; a lone surrogate has no UTF-8; NaN and
infinities are no JSON, though Python's parser takes them.
"""

import math
from typing import Any

from pydantic import BaseModel


def keepable(value: Any) -> Any:
    """Return the value as it is. Raises ValueError when a string or a number anywhere in it cannot be kept."""
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("text must not have null characters")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError("text must not have lone surrogates: it is no valid Unicode") from None
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
