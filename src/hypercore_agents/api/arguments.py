"""Values that the Agent SDK passes on the command line of the Claude CLI, with the limits of the kernel and the CLI.

Linux refuses to start a program with an argument longer than 128 KiB (`MAX_ARG_STRLEN`, execve(2)), counted in bytes
and with the final NUL. The SDK joins the permission rules of a list by commas, and writes MCP servers and the output
schema as JSON with ASCII escapes, so an emoji counts 12 bytes there.

The CLI splits a list of rules at commas and spaces outside of parentheses; the first `)` ends a specifier. A rule that
would be split into other rules is refused.
"""

import json
from typing import Any

ARGUMENT_BYTES = 128 * 1024 - 1
"""Maximum size of a process argument on Linux, without its final NUL."""
RULES_BYTES = ARGUMENT_BYTES - 8 * 1024
"""Maximum size of a list of permission rules; the rest is for rules that the platform adds, such as for skills."""


def check_size(text: str, limit: int, what: str) -> None:
    """Raise ValueError if `text` is longer than `limit` bytes. `what` is the subject of the message."""
    size = len(text.encode(errors="surrogatepass"))  # invalid Unicode is refused elsewhere
    if size > limit:
        raise ValueError(f"{what} is {size} bytes; the Claude CLI accepts at most {limit} bytes in one argument")


def check_json_size(value: Any, what: str) -> None:
    """Raise ValueError if `value`, as JSON, does not fit into one argument of the Claude CLI."""
    check_size(json.dumps(value), ARGUMENT_BYTES, f"{what}, as JSON with ASCII escapes,")


def split_rules(text: str) -> list[str]:
    """Split `text` into permission rules as the pinned Claude CLI does."""
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
