"""Generate an instance of a JSON schema, for structured answers and forced tool calls.

Deterministic and small: the first of every choice, the minimum of every range, required properties only (all of them
if none is required). Supports the keywords that the API accepts for structured outputs and ignores others.
"""

from typing import Any

_DEEPEST = 24


def instance(schema: dict[str, Any], text: str) -> Any:
    """Return a value that the schema accepts; its strings are `text`."""
    return _value(schema, schema, text, 0)


def _value(schema: Any, root: dict[str, Any], text: str, depth: int) -> Any:
    if not isinstance(schema, dict) or depth > _DEEPEST:
        return None
    if "const" in schema:
        return schema["const"]
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return schema["enum"][0]
    if isinstance(schema.get("$ref"), str):
        return _value(_resolve(schema["$ref"], root), root, text, depth + 1)
    for choice in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(choice), list) and schema[choice]:
            return _value(schema[choice][0], root, text, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    match kind[0] if isinstance(kind, list) and kind else kind:
        case "object":
            properties = schema.get("properties") or {}
            wanted = schema.get("required") or list(properties)
            return {name: _value(properties.get(name, {}), root, text, depth + 1) for name in wanted}
        case "array":
            least = schema.get("minItems", 0)
            count = min(least, 100) if isinstance(least, int) else 0
            return [_value(schema.get("items", {}), root, text, depth + 1) for _ in range(count)]
        case "integer" | "number":
            return schema.get("minimum", 0)
        case "boolean":
            return False
        case "null":
            return None
        case _:
            return text


def _resolve(reference: str, root: dict[str, Any]) -> Any:
    found: Any = root
    for part in reference.removeprefix("#/").split("/"):
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
    return found
