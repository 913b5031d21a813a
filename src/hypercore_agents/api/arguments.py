"""Values that the Agent SDK puts on the command line of the Claude CLI, checked as the kernel and the CLI check them.

Linux refuses a program one of whose arguments is longer than 128 KiB (`MAX_ARG_STRLEN`, execve(2)), counted in bytes
and with the final NUL. The SDK joins the permission rules of a list by commas, and writes MCP servers and the output
schema as JSON with ASCII escapes, so an emoji there counts 12 bytes.

The CLI splits a list of rules at commas and at spaces outside of parentheses; the first `)` ends a specifier. A rule
that this takes apart would become other rules, so it is refused.
"""

import json
from typing import Any

ARGUMENT_BYTES = 128 * 1024 - 1
"""Longest argument of a process on Linux, without its final NUL."""
RULES_BYTES = ARGUMENT_BYTES - 8 * 1024
"""Longest list of permission rules; the rest is for rules that the platform adds, such as those for reading skills."""


def check_size(text: str, limit: int, what: str) -> None:
    """Raise ValueError when `text` is longer than `limit` bytes. `what` begins the sentence that says so."""
    size = len(text.encode(errors="surrogatepass"))  # what is no Unicode is refused elsewhere
    if size > limit:
        raise ValueError(f"{what} is {size} bytes; the Claude CLI takes it as one argument of at most {limit} bytes")


def check_json_size(value: Any, what: str) -> None:
    """Raise ValueError when `value` does not fit into one argument of the Claude CLI as JSON."""
    check_size(json.dumps(value), ARGUMENT_BYTES, f"{what}, as JSON with ASCII escapes,")


def split_rules(text: str) -> list[str]:
    """Return the permission rules in `text` as the pinned Claude CLI reads them."""
    rules: list[str] = []
    rule, inside = "", False
    for character in text:
        if character in "()":
            inside = character == "("
            rule += character
        elif character in ", " and not inside:
            if rule.strip():
                rules.append(rule.strip())
            rule = ""
        elif rule or character.strip():
            rule += character
    return [*rules, rule.strip()] if rule.strip() else rules
