"""schemathesis over the OpenAPI of manager, agent and gateway: no 5xx, no undocumented answer, whatever is sent.

Examples are bounded and derived from nothing but the schema, so that two runs send the same. Servers run in the test's
event loop, schemathesis in a thread beside it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import requests
import schemathesis
from aiohttp import web
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from agent_sides import served_agent, stand_in_gateway
from gateway_site import gateway_site
from hypercore_agents.agent.app import create_app as create_agent_app
from hypercore_agents.api.chat import PlacedChatRequest
from manager_sides import Deployment, aiohttp_served, deployed

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 15
SECONDS = 30


def fastapi_of(app: Any) -> FastAPI:
    """Return the FastAPI application inside its middleware."""
    while not isinstance(app, FastAPI):
        app = app._app
    return app


def examine(
    document: dict[str, Any],
    url: str,
    *,
    modes: Callable[[str], list[GenerationMode]] = lambda _: [GenerationMode.POSITIVE, GenerationMode.NEGATIVE],
    headers: dict[str, str] | None = None,
    known: Callable[[], dict[str, str]] = dict,
) -> int:
    """Send examples of each operation and check the answers; return how many were sent.

    `known` gives ids that exist: with them each operation is tried again.
    """
    schema = schemathesis.openapi.from_dict(document)
    sent = 0

    def send(case: schemathesis.Case[Any]) -> None:
        nonlocal sent
        sent += 1
        case.call_and_validate(base_url=url, headers=headers, checks=CHECKS, timeout=SECONDS)

    for found in schema.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr]
        for mode in modes(f"{operation.method.upper()} {operation.path}"):
            for ids in _places(operation, known):
                strategy = operation.as_strategy(generation_mode=mode, path_parameters=ids or None)
                examples = settings(
                    max_examples=EXAMPLES,
                    derandomize=True,
                    database=None,
                    deadline=None,
                    phases=[Phase.explicit, Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                try:
                    examples(given(case=strategy)(send))()
                except Unsatisfiable:
                    assert mode is GenerationMode.NEGATIVE  # nothing of this operation can be wrong
                except BaseException as failed:
                    failed.add_note(f"{mode.value} examples of {operation.method.upper()} {operation.path}, ids {ids}")
                    raise
    return sent


def _places(operation: Any, known: Callable[[], dict[str, str]]) -> Iterator[dict[str, str]]:
    yield {}
    ids = {name: value for name, value in known().items() if f"{{{name}}}" in operation.path}
    if ids:
        yield ids


@pytest_asyncio.fixture
async def managed(tmp_path: Path) -> AsyncIterator[Deployment]:
    async def ready(_: web.Request) -> web.Response:
        return web.json_response({})

    gateway = web.Application()
    gateway.router.add_get("/ready", ready)
    async with (
        aiohttp_served(gateway) as gateway_url,
        deployed(
            tmp_path / "state",
            min_agents=1,
            max_agents=2,
            max_agents_per_user=3,
            max_concurrent_requests=1000,
            gateway_url=gateway_url,
            rate_limit_per_minute=0,
            rate_limit_per_hour=0,
        ) as running,
    ):
        await running.warm(1)
        yield running


@pytest.mark.timeout(400)
async def test_the_manager_keeps_its_contract(managed: Deployment) -> None:
    url = managed.url

    def fresh() -> dict[str, str]:
        chat = {"user_id": "ada", "prompt": "hello"}
        answer = requests.post(f"{url}/v1/agent/chat", json=chat, timeout=SECONDS).json()
        return {"session_id": answer["session_id"], "agent_id": answer["agent_id"]}

    document = await asyncio.to_thread(lambda: requests.get(f"{url}/openapi.json", timeout=SECONDS).json())
    sent = await asyncio.to_thread(examine, document, url, known=fresh)
    assert sent > 20 * EXAMPLES


@pytest.mark.timeout(400)
async def test_the_agent_keeps_its_contract(tmp_path: Path) -> None:
    def modes(operation: str) -> list[GenerationMode]:
        if operation == "POST /v1/agent/chat":
            return [GenerationMode.NEGATIVE]  # a good one starts a Claude CLI: test_agent_turns.py
        return [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]

    async with stand_in_gateway() as gateway, served_agent(gateway, tmp_path / "agent") as agent:
        document = fastapi_of(create_agent_app(agent.server)).openapi()
        _declare_body(document, "/v1/agent/chat", PlacedChatRequest)
        sent = await asyncio.to_thread(examine, document, agent.url, modes=modes, headers=agent.headers)
    assert sent > 5 * EXAMPLES


@pytest.mark.timeout(400)
@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_the_gateway_keeps_its_contract(tmp_path: Path, store_url: str) -> None:
    async with gateway_site(tmp_path, store_url, "http://127.0.0.1:1") as site:
        session_id = await site.session()
        headers = {"authorization": f"Bearer {site.agent_token()}"}
        document = fastapi_of(site.app._internal).openapi()
        sent = await asyncio.to_thread(
            examine, document, site.url, headers=headers, known=lambda: {"session_id": session_id}
        )
    assert sent > 5 * EXAMPLES


def _declare_body(document: dict[str, Any], path: str, model: Any) -> None:
    """Say what the body of an operation is that reads it from the raw bytes."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    document.setdefault("components", {}).setdefault("schemas", {}).update(schema.pop("$defs", {}))
    document["paths"][path]["post"]["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": schema}},
    }
