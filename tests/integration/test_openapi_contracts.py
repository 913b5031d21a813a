"""schemathesis over the OpenAPI of manager, agent and gateway: no 5xx and no undocumented response to any request.

Examples are limited in number and derived only from the schema, so that two runs send the same. Servers run in the
test's event loop, schemathesis in a thread. The gateway's model routes have no OpenAPI document, because they are those
of the Messages API; their requests come from a schema in this file.
"""

import asyncio
import copy
import re
from collections import Counter
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

from hypercore_agents.agent.server.app import create_app as create_agent_app
from hypercore_agents.api.chat import PlacedChatRequest
from hypercore_agents.api.errors import ErrorBody
from hypercore_agents.manager.sessions import follow
from support.agent_server import served_agent, stand_in_gateway
from support.gateway_server import gateway_site
from support.manager_server import Deployment, aiohttp_served, deployed
from support.simulator_fixtures import RunningSimulator

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 15
CHATS = 5
"""Number of valid chats sent to an agent: each starts a Claude CLI."""
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
    examples: int = EXAMPLES,
) -> Counter[int]:
    """Send examples of each operation and check the answers; return the count of each status.

    `known` gives ids that exist: with them each operation is tried again.
    """
    # The response of a start slot stays open while the slot is held; test_gateway_start_slots.py tests that route.
    schema = schemathesis.openapi.from_dict(document).exclude(path="/internal/start-slots")
    sent: Counter[int] = Counter()

    def send(case: schemathesis.Case[Any]) -> None:
        answer = case.call_and_validate(base_url=url, headers=headers, checks=CHECKS, timeout=SECONDS)
        sent[answer.status_code] += 1

    for found in schema.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr]
        place = re.sub(r"\{.*?\}", "x", operation.path)
        unknown = requests.request(
            operation.method, url + place, params={"no_such": "1"}, headers=headers, timeout=SECONDS
        )
        assert unknown.status_code == 400, f"{operation.method.upper()} {operation.path} ignores what it does not know"
        assert "query parameter" in unknown.text, unknown.text
        for mode in modes(f"{operation.method.upper()} {operation.path}"):
            for ids in _places(operation, known):
                strategy = operation.as_strategy(generation_mode=mode, path_parameters=ids or None)
                bounded = settings(
                    max_examples=examples,
                    derandomize=True,
                    database=None,
                    deadline=None,
                    phases=[Phase.explicit, Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                try:
                    bounded(given(case=strategy)(send))()
                except Unsatisfiable:
                    assert mode is GenerationMode.NEGATIVE  # this operation has no invalid examples
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
async def test_the_manager_conforms_to_its_openapi(managed: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "STREAM_SECONDS", 0.1)  # otherwise streams last as long as their sessions
    url = managed.url

    def fresh() -> dict[str, str]:
        chat = {"user_id": "ada", "prompt": "hello"}
        answer = requests.post(f"{url}/v1/agent/chat", json=chat, timeout=SECONDS).json()
        return {"session_id": answer["session_id"], "agent_id": answer["agent_id"]}

    document = await asyncio.to_thread(lambda: requests.get(f"{url}/openapi.json", timeout=SECONDS).json())
    sent = await asyncio.to_thread(examine, document, url, known=fresh)
    assert sent.total() > 20 * EXAMPLES


@pytest.mark.timeout(400)
async def test_the_agent_conforms_to_its_openapi(tmp_path: Path, simulator: RunningSimulator) -> None:
    """Valid chats run in the real CLI, so there are few; `_good_chats` limits their content."""
    chat = "/v1/agent/chat"

    def modes(operation: str) -> list[GenerationMode]:
        return [GenerationMode.NEGATIVE, *([] if operation.endswith(chat) else [GenerationMode.POSITIVE])]

    async with stand_in_gateway(simulator.url) as gateway, served_agent(gateway, tmp_path / "agent") as agent:
        document = fastapi_of(create_agent_app(agent.server)).openapi()
        _declare_body(document, chat, PlacedChatRequest.model_json_schema(ref_template=REFERENCE))
        sent = await asyncio.to_thread(examine, document, agent.url, modes=modes, headers=agent.headers)
        assert sent.total() > 5 * EXAMPLES
        sent = await asyncio.to_thread(
            examine,
            _good_chats(document, chat),
            agent.url,
            modes=lambda _: [GenerationMode.POSITIVE],
            headers=agent.headers,
            examples=CHATS,
        )
    assert sent[200] > 1, sent


@pytest.mark.timeout(400)
@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_the_gateway_conforms_to_its_openapi(tmp_path: Path, store_url: str) -> None:
    async with gateway_site(tmp_path, store_url, "http://127.0.0.1:1") as site:
        session_id = await site.session()
        headers = {"authorization": f"Bearer {site.agent_token()}"}
        document = fastapi_of(site.app._internal).openapi()
        sent = await asyncio.to_thread(
            examine, document, site.url, headers=headers, known=lambda: {"session_id": session_id}
        )
    assert sent.total() > 5 * EXAMPLES


@pytest.mark.timeout(400)
@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_model_routes_conform_to_the_messages_api(tmp_path: Path, store_url: str) -> None:
    async with aiohttp_served(_claude()) as claude, gateway_site(tmp_path, store_url, claude) as site:
        headers = {"x-api-key": site.token(await site.session())}
        sent = await asyncio.to_thread(examine, _messages_api(), site.url, headers=headers)
    assert sent[200] > EXAMPLES
    assert sent[400] > EXAMPLES


def _claude() -> web.Application:
    async def messages(request: web.Request) -> web.Response:
        if (await request.json()).get("stream"):
            return web.Response(body=b"event: message_stop\ndata: {}\n\n", content_type="text/event-stream")
        return web.json_response({"type": "message", "usage": {"input_tokens": 1, "output_tokens": 1}})

    async def other(_: web.Request) -> web.Response:
        return web.json_response({"input_tokens": 1, "data": []})

    app = web.Application(client_max_size=64 * 1024 * 1024)
    app.router.add_post("/v1/messages", messages)
    app.router.add_post("/v1/messages/count_tokens", other)
    app.router.add_get("/v1/models", other)
    return app


def _messages_api() -> dict[str, Any]:
    """Return the part of the Messages API that the gateway offers, as OpenAPI."""
    text = {
        "type": "object",
        "required": ["type", "text"],
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    }
    message = {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"enum": ["user", "assistant"]},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": text}]},
        },
    }
    body = {
        "type": "object",
        "required": ["model", "max_tokens", "messages"],
        "additionalProperties": False,
        "properties": {
            "model": {"enum": ["claude-sonnet-5", "claude-haiku-4-5"]},
            "max_tokens": {"type": "integer", "minimum": 1, "maximum": 64000},
            "messages": {"type": "array", "items": message, "minItems": 1},
            "stream": {"type": "boolean"},
            "system": {"anyOf": [{"type": "string"}, {"type": "array", "items": text}]},
            "temperature": {"type": "number", "minimum": 0, "maximum": 1},
            "tools": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {"name": {"type": "string"}, "type": {"const": "custom"}},
                },
            },
            "stop_sequences": {"type": "array", "items": {"type": "string"}},
            "metadata": {"type": "object"},
        },
    }
    error = ErrorBody.model_json_schema(ref_template=REFERENCE)
    schemas = {**error.pop("$defs"), "Error": {**error, "additionalProperties": True}}
    wrong = {
        "description": "an error",
        "content": {"application/json": {"schema": {"$ref": REFERENCE.format(model="Error")}}},
    }
    good = {"description": "an answer", "content": {"application/json": {}, "text/event-stream": {}}}
    answers = {"200": good, **{str(status): wrong for status in (400, 401, 403, 404, 405, 413, 429)}}
    limit = {"name": "limit", "in": "query", "schema": {"type": "integer"}}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "the gateway's model routes", "version": "1"},
        "components": {"schemas": schemas},
        "paths": {
            "/v1/messages": {"post": {"responses": answers}},
            "/v1/messages/count_tokens": {"post": {"responses": answers}},
            "/v1/models": {"get": {"parameters": [limit], "responses": answers}},
        },
    }
    _declare_body(document, "/v1/messages", body)
    _declare_body(document, "/v1/messages/count_tokens", body)
    return document


def _good_chats(document: dict[str, Any], path: str) -> dict[str, Any]:
    """Return only the chat, with time for a turn, without options that its sandbox or model does not support."""
    document = copy.deepcopy(document)
    document["paths"] = {path: document["paths"][path]}
    schemas = document["components"]["schemas"]
    chat = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    for options in (chat["properties"], schemas["SessionOptions"]["properties"]):
        for name in ("mcp_servers", "permission_mode", "model", "fallback_model", "max_turns", "max_budget_usd"):
            options.pop(name, None)
    schemas["Placement"]["properties"]["timeout"] = {"type": "number", "minimum": SECONDS, "maximum": SECONDS}
    chat["properties"]["prompt"]["maxLength"] = 1000
    return document


REFERENCE = "#/components/schemas/{model}"


def _declare_body(document: dict[str, Any], path: str, schema: dict[str, Any]) -> None:
    """Add the schema of the body to an operation that reads raw bytes."""
    document.setdefault("components", {}).setdefault("schemas", {}).update(schema.pop("$defs", {}))
    document["paths"][path]["post"]["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": schema}},
    }
