"""Names that other programs read: a pattern for the whole string each, and an error that lists the allowed characters.

The Claude CLI and the Claude API rewrite or drop names that do not fit their own rules, without an error. So a name is
refused here, where the field can be named. Patterns are matched against the whole string: `$` alone would let a
trailing newline pass.
"""

import re

from pydantic import AfterValidator, WithJsonSchema


def name_of(pattern: str, allowed: str) -> tuple[AfterValidator, WithJsonSchema]:
    """Return the annotations of a string type whose values match `pattern` as a whole.

    `allowed` completes the sentence "must be ..." in the error.
    """
    whole = re.compile(pattern)

    def check(value: str) -> str:
        if whole.fullmatch(value) is None:
            raise ValueError(f"{value[:80]!r} must be {allowed}")
        return value

    return AfterValidator(check), WithJsonSchema({"type": "string", "pattern": f"^(?:{pattern})$"})
