"""The result of one check of `doctor`."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "missing"]


@dataclass(frozen=True)
class Finding:
    """The result of one check. `found` describes what was found; `missing` makes the command fail."""

    name: str
    state: State
    found: str
    remedy: str = ""
