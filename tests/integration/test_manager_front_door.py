"""The front door: hosts, origins, bodies, paths; authentication and scopes."""

import base64
import hmac
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from joserfc import jwt
from joserfc.jwk import OctKey

from hypercore_agents.security.bearers import digest, new_bearer
from hypercore_agents.store.bearers import BearerRow, add_bearer, delete_bearer
from support.manager_server import Deployment, deployed
from support.raw_http import post, send_bytes

SECRET = "a-secret-of-more-than-thirty-two-bytes"


@pytest_asyncio.fixture
async def open_manager(tmp_path: Path) -> AsyncIterator[Deployment]:
    async with deployed(tmp_path / "state", base_domain="agents.test") as running:
        yield running


@pytest_asyncio.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[Deployment]:
    async with deployed(tmp_path / "state", min_agents=1, enable_auth=True, jwt_secret=SECRET) as running:
        yield running


@pytest.mark.parametrize("host", ["localhost:8080", "127.0.0.1", "[::1]:80", "127.9.9.9", "agents.test", "LOCALHOST"])
async def test_hosts_of_this_machine_are_served(open_manager: Deployment, host: str) -> None:
    assert (await open_manager.call("GET", "/v1/agents/stats", headers={"host": host}))[0] == 200


@pytest.mark.parametrize("host", ["evil.test", "127.0.0.1.evil.test", "10.0.0.1", "agents.test.evil", "notagents.test"])
async def test_other_hosts_are_refused_with_a_remedy(open_manager: Deployment, host: str) -> None:
    status, answer = await open_manager.call("GET", "/v1/agents/stats", headers={"host": host})
    assert (status, answer["error"]["type"]) == (403, "forbidden")
    assert "ENABLE_AUTH" in answer["error"]["message"]


@pytest.mark.parametrize(("origin", "status"), [("http://evil.test", 403), ("null", 403), (None, 200)])
async def test_requests_of_other_origins_are_refused(open_manager: Deployment, origin: str | None, status: int) -> None:
    headers = {"origin": origin} if origin else {"origin": open_manager.url}
    assert (await open_manager.call("GET", "/v1/agents/stats", headers=headers))[0] == status


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
async def test_a_body_must_be_declared_as_json(open_manager: Deployment, media: str) -> None:
    async with open_manager.http.post(
        f"{open_manager.url}/v1/agent/chat",
        data=b'{"user_id": "ada", "prompt": "hi"}',
        headers={"content-type": media},
    ) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["details"]["field"] == "Content-Type"


@pytest.mark.parametrize(
    "path", ["//v1/agents/stats", "/v1/../v1/agents/stats", "/v1/%2e%2e/agents", "/v1%2Fagents", "/v1/agents/..%5c"]
)
async def test_ambiguous_paths_are_refused(open_manager: Deployment, path: str) -> None:
    from yarl import URL

    async with open_manager.http.get(URL(open_manager.url + path, encoded=True)) as answer:
        assert answer.status == 400, await answer.text()


async def test_headers_that_affect_decisions_must_not_be_repeated(open_manager: Deployment) -> None:
    """A proxy in front of the manager may have used the other value."""
    for name in ("Authorization", "Content-Type", "Host", "Idempotency-Key", "Last-Event-ID", "Origin"):
        first = open_manager.url if name == "Origin" else "a"
        both = ("Content-Length: 31", f"{name}: {first}", f"{name}: http://evil.test")
        request = post(
            "/v1/agent/chat", *both, body=b'{"user_id":"ada","prompt":"hi"}', host=f"Host: {open_manager.url[7:]}"
        )
        answer = await send_bytes(open_manager.url, request)
        assert answer.startswith(b"HTTP/1.1 400 "), (name, answer)
        assert f'"field":"{name}"'.encode() in answer, (name, answer)


async def test_a_request_target_must_not_have_a_fragment(open_manager: Deployment) -> None:
    for target in ("/v1/agents/stats#/health", "/v1/agents/stats?a=b#c"):
        request = f"GET {target} HTTP/1.1\r\nHost: {open_manager.url[7:]}\r\n\r\n".encode()
        answer = await send_bytes(open_manager.url, request)
        assert answer.startswith(b"HTTP/1.1 400 "), answer


async def test_an_agents_host_name_is_rewritten_to_its_path(open_manager: Deployment) -> None:
    _, agent = await open_manager.call("POST", "/v1/agents/spawn", {"user_id": "ada"})
    agent_id = agent["agent_id"]
    assert agent["url"] == f"https://{agent_id}.agents.test"
    headers = {"host": f"{agent_id}.agents.test"}
    status, answer = await open_manager.call(
        "POST", "/v1/agent/chat", {"user_id": "ada", "prompt": "hi"}, headers=headers
    )
    assert (status, answer["agent_id"]) == (200, agent_id)
    assert (await open_manager.call("GET", "/health", headers=headers))[1] == {"status": "ok"}
    assert (await open_manager.call("GET", "/metrics", headers=headers))[1] == "agent_active_sessions 1\n"
    session = f"/v1/agent/session/{answer['session_id']}"
    assert (await open_manager.call("GET", session, headers=headers))[0] == 200
    assert (await open_manager.call("GET", "/v1/agents/stats", headers=headers))[0] == 404
    assert (await open_manager.call("GET", "/health", headers={"host": "unknown.agents.test"}))[0] == 404


def token(key: str = SECRET, **claims: Any) -> dict[str, str]:
    payload = {"sub": "ada", "exp": int(time.time()) + 60, **claims}
    payload = {name: value for name, value in payload.items() if value is not None}
    return {"authorization": f"Bearer {jwt.encode({'alg': 'HS256'}, payload, OctKey.import_key(key))}"}


def coded(part: bytes) -> str:
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


def signed(payload: bytes) -> str:
    """Return a JWT with exactly this payload and a valid signature."""
    text = f"{coded(json.dumps({'alg': 'HS256'}).encode())}.{coded(payload)}"
    return f"{text}.{coded(hmac.new(SECRET.encode(), text.encode(), 'sha256').digest())}"


DEEP = b'{"sub":"ada","exp":9999999999,"alg":' + b"[" * 20_000 + b"]" * 20_000 + b"}"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Basic YTpi"},
        {"authorization": "Bearer unknown"},
        {"authorization": "Bearer a.b.c"},
        token(exp=1),
        token(exp=None),
        token(exp=True),
        token(exp=float("nan")),
        token(exp=float("inf")),
        token(exp=10**400),
        token(exp=1e300),
        token(exp="9999999999"),
        token(exp=-1),
        token(nbf=float("nan")),
        token(nbf=10**400),
        token(sub=["ada"]),
        token(scope={"admin": 1}),
        {"authorization": f"Bearer {signed(DEEP)}"},
        {"authorization": f"Bearer {signed(b'[]')}"},
        {"authorization": f"Bearer {signed(b'7')}"},
        {"authorization": f"Bearer {'e' * 60_000}.e30.x"},
        {"authorization": f"Bearer {coded(DEEP)}.e30.x"},
        token(nbf=time.time() + 1000),
        token(sub="../x"),
        token(scope="root"),
        token(key="x" * 32),
    ],
)
async def test_requests_without_a_valid_credential_are_rejected(guarded: Deployment, headers: dict[str, str]) -> None:
    for path in ("/v1/agents/stats", "/v1/agents/list", "/metrics", "/v1/usage"):
        status, answer = await guarded.call("GET", path, headers=headers)
        assert (status, answer["error"]["type"]) == (401, "unauthenticated")
    for path in ("/ready", "/docs"):
        assert (await guarded.call("GET", path, headers=headers))[0] == 200


async def test_an_invalid_subject_is_refused_with_a_remedy(guarded: Deployment) -> None:
    for subject in ("auth0|64f0", "https://login.example.com/users/1", "x" * 129, None):
        status, answer = await guarded.call("GET", "/v1/agents/list", headers=token(sub=subject))
        assert status == 401
        assert "letters, digits and ._@:+-" in answer["error"]["message"]
    assert (
        "auth0|64f0" in (await guarded.call("GET", "/v1/usage", headers=token(sub="auth0|64f0")))[1]["error"]["message"]
    )
    assert (await guarded.call("GET", "/v1/agents/list", headers=token(sub="ada@example.com")))[0] == 200


async def test_a_user_can_access_only_its_own_resources(guarded: Deployment) -> None:
    ada, bob, admin = token(), token(sub="bob"), token(scope="admin")
    status, agent = await guarded.call("POST", "/v1/agents/spawn", {"user_id": "ada"}, headers=ada)
    assert status == 200
    assert (await guarded.call("POST", "/v1/agents/spawn", {"user_id": "ada"}, headers=bob))[0] == 403
    status, answer = await guarded.call("POST", "/v1/agent/chat", {"user_id": "ada", "prompt": "x"}, headers=ada)
    if status == 503:  # the pool's agent may still be starting
        path = f"/agents/{agent['agent_id']}/v1/agent/chat"
        status, answer = await guarded.call("POST", path, {"user_id": "ada", "prompt": "x"}, headers=ada)
    assert status == 200
    session = f"/v1/agent/session/{answer['session_id']}"
    for method, path, expected in (
        ("GET", session, 404),
        ("DELETE", session, 404),
        ("POST", f"{session}/interrupt", 404),
        ("GET", f"/v1/agents/get?agent_id={agent['agent_id']}", 404),
        ("DELETE", f"/v1/agents/delete?agent_id={agent['agent_id']}", 404),
        ("GET", f"/agents/{agent['agent_id']}/metrics", 404),
        ("GET", "/v1/agents/list?user_id=ada", 403),
        ("GET", "/v1/usage?user_id=ada", 403),
        ("GET", "/v1/agents/stats", 403),
        ("GET", "/metrics", 403),
        ("GET", "/v1/prometheus/targets", 403),
        ("GET", "/v1/pool", 403),
        ("DELETE", "/v1/pool/roll", 403),
    ):
        assert (await guarded.call(method, path, headers=bob))[0] == expected, path
    assert (await guarded.call("GET", session, headers=ada))[0] == 200
    assert (await guarded.call("GET", f"/agents/{agent['agent_id']}/metrics", headers=ada))[0] == 200
    assert (await guarded.call("GET", "/v1/agents/list", headers=bob))[1]["count"] == 0
    assert (await guarded.call("GET", "/v1/agents/list", headers=ada))[1]["count"] == 1
    assert (await guarded.call("GET", "/v1/agents/list", headers=admin))[1]["count"] == 2
    assert (await guarded.call("GET", session, headers=admin))[0] == 200


async def test_a_stored_bearer_is_valid_until_it_expires_or_is_revoked(guarded: Deployment) -> None:
    bearers = {name: new_bearer() for name in ("scraper", "old")}
    async with guarded.database.write() as connection:
        for name, expires_at in (("scraper", None), ("old", 1.0)):
            row = BearerRow(digest(bearers[name]), name, "metrics", None, 0.0, expires_at)
            assert await add_bearer(connection, row)
        assert not await add_bearer(connection, row), "the name is taken"
    scraper = {"authorization": f"Bearer {bearers['scraper']}"}
    assert (await guarded.call("GET", "/metrics", headers=scraper))[0] == 200
    assert (await guarded.call("POST", "/v1/agents/spawn", {"user_id": "ada"}, headers=token()))[0] == 200
    status, (target, *_) = await guarded.call("GET", "/v1/prometheus/targets", headers=scraper)
    assert status == 200
    page = target["labels"]["__metrics_path__"]
    assert (await guarded.call("GET", page, headers=scraper))[0] == 200
    assert (await guarded.call("GET", page.replace("/metrics", "/v1/agent/stats"), headers=scraper))[0] == 403
    assert (await guarded.call("POST", "/v1/pool/roll", {}, headers=scraper))[0] == 403
    assert (await guarded.call("GET", "/v1/agents/list", headers=scraper))[0] == 403
    assert (await guarded.call("GET", "/metrics", headers={"authorization": f"Bearer {bearers['old']}"}))[0] == 401
    async with guarded.database.write() as connection:
        assert await delete_bearer(connection, "scraper")
    assert (await guarded.call("GET", "/metrics", headers=scraper))[0] == 401


async def test_with_authentication_any_host_is_served(guarded: Deployment) -> None:
    headers = {**token(scope="admin"), "host": "platform.example.com", "x-request-id": "mine"}
    async with guarded.http.get(f"{guarded.url}/v1/agents/stats", headers=headers) as answer:
        assert answer.status == 200
        assert answer.headers["x-request-id"].startswith("req_")
