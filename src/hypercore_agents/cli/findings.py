"""The result of one check of `doctor`."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "missing"]


@dataclass(frozen=True)
class Finding:
    """What was found of one thing. `missing` makes the command fail; `remedy` is what to do about it."""

    name: str
    state: State
    found: str
    remedy: str = ""
