"""Names that other programs read: a pattern for the whole string, and an error that lists the allowed characters.

The Claude CLI and the Claude API change or drop names that violate their rules, without an error. So such names are
refused here, where the error can name the field. Patterns match the whole string; `$` alone would accept a trailing
newline.
"""

import re

from pydantic import AfterValidator, WithJsonSchema


def name_of(pattern: str, allowed: str) -> tuple[AfterValidator, WithJsonSchema]:
    """Return the annotations of a string type whose values match `pattern` completely.

    `allowed` completes the sentence "must be ..." in the error.
    """
    whole = re.compile(pattern)

    def check(value: str) -> str:
        if whole.fullmatch(value) is None:
            raise ValueError(f"{value[:80]!r} must be {allowed}")
        return value

    return AfterValidator(check), WithJsonSchema({"type": "string", "pattern": f"^(?:{pattern})$"})
