"""Session options: spawns and POOL_CONFIG accept all of them; invalid combinations are refused with the field."""

from typing import Any

import pytest
from pydantic import ValidationError

from hypercore_agents.api.agents import SpawnRequest
from hypercore_agents.api.options import OUTPUT_SCHEMA_LIMIT, SessionOptions
from hypercore_agents.api.pool import PoolConfig

ALL: dict[str, Any] = {
    "model": "claude-sonnet-4-5", "fallback_model": "claude-haiku-4-5", "tools": ["Read"], "allowed_tools": ["Read"],
    "disallowed_tools": ["Bash"], "permission_mode": "plan", "approval_tools": ["*"], "max_turns": 3,
    "system_prompt": {"type": "preset", "preset": "claude_code", "append": "Be brief."}, "max_budget_usd": 1.5,
    "mcp_servers": {"notes": {"type": "stdio", "command": "notes", "args": []}}, "effort": "high",
    "agents": {"reviewer": {"description": "Reviews.", "prompt": "Review."}},
    "thinking": {"type": "enabled", "budget_tokens": 2000}, "output_schema": {"type": "object"},
    "skills": ["release-notes"],
}  # fmt: skip


def test_spawns_and_the_pool_configuration_accept_every_option() -> None:
    assert set(ALL) == set(SessionOptions.model_fields)
    offered = set(SessionOptions.model_fields) & set(SpawnRequest.model_fields)
    assert set(ALL) <= offered
    for options in (
        SpawnRequest.model_validate({"user_id": "ada", **ALL}).options(), PoolConfig.model_validate(ALL).options
    ):  # fmt: skip
        assert options.model_dump(mode="json", exclude_none=True) == ALL


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("thinking", {"type": "enabled"}),
        ("thinking", {"type": "adaptive", "budget_tokens": 2000}),
        ("thinking", {"type": "enabled", "budget_tokens": 10}),
        ("output_schema", {"type": "string"}),
        ("output_schema", {"type": "object", "description": "x" * OUTPUT_SCHEMA_LIMIT}),
        ("effort", "extreme"),
        ("agents", {"Not A Name": {"description": "d", "prompt": "p"}}),
        ("agents", {"reviewer": {"description": "d", "prompt": "p", "memory": "user"}}),
        ("system_prompt", {"type": "file", "path": "/etc/passwd"}),
    ],
)
def test_invalid_options_are_refused_with_the_field(field: str, value: Any) -> None:
    for model, more in ((SessionOptions, {}), (SpawnRequest, {"user_id": "ada"})):
        with pytest.raises(ValidationError) as caught:
            model.model_validate({field: value, **more})
        assert caught.value.errors()[0]["loc"][0] == field
