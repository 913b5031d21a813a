"""Behaviour that every server shares: one error shape, request ids, body limits, logs without secrets."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator

import aiohttp
import pytest
import pytest_asyncio
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, ValidationError
from structlog.testing import capture_logs
from yarl import URL

from hypercore_agents.api.errors import ERROR_TYPES, AtCapacity, HypercoreError, InvalidRequest, NotFound, readable_size
from hypercore_agents.http.context import Receive, RequestContext, Scope, Send
from hypercore_agents.http.errors import install_error_handlers
from hypercore_agents.http.serve import AddressError, is_loopback, parse_address
from hypercore_agents.http.validation_errors import describe_faults
from support.asgi_server import serving


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    size: int = 1


def application() -> FastAPI:
    app = FastAPI()
    install_error_handlers(app)

    @app.post("/things")
    async def things(body: Body) -> Body:
        return body

    @app.get("/list")
    async def list_things(owner_id: str, limit: int = 10) -> dict[str, object]:
        return {"owner_id": owner_id, "limit": limit}

    @app.get("/full")
    async def full() -> None:
        raise AtCapacity("full", retry_after=7, details={"capacity": 3})

    @app.get("/defect")
    async def defect() -> None:
        raise ZeroDivisionError("sk-ant-canary")

    return app


@pytest_asyncio.fixture
async def url() -> AsyncIterator[str]:
    async with serving(RequestContext(application(), max_body=1000)) as address:
        yield address


async def ask(
    url: str | URL, method: str = "GET", **options: object
) -> tuple[int, dict[str, object], aiohttp.ClientResponse]:
    async with aiohttp.ClientSession() as client, client.request(method, url, **options) as answer:  # type: ignore[arg-type]
        return answer.status, json.loads(await answer.read()), answer


def error_of(body: dict[str, object]) -> dict[str, object]:
    error = body["error"]
    assert isinstance(error, dict)
    assert set(error) <= {"type", "message", "request_id", "retryable", "details"}
    assert error["type"] in ERROR_TYPES
    return error


async def test_domain_errors_have_status_details_and_retry_after(url: str) -> None:
    status, body, answer = await ask(f"{url}/full", headers={"x-request-id": "mine-1"})
    assert (status, answer.headers["retry-after"], answer.headers["x-request-id"]) == (503, "7", "mine-1")
    assert error_of(body) == {
        "type": "at_capacity", "message": "full", "request_id": "mine-1", "retryable": True,
        "details": {"capacity": 3},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"naem": "a"}', "naem: unknown field; did you mean name?; name: Field required"),
        (b'{"called": "a"}', "called: unknown field; did you mean name?; name: Field required"),
        (b'{"name": "a", "colour": 1}', "colour: unknown field; see /docs"),
        (b'{"name": "a",', "body: not JSON at character 13: Expecting property name enclosed in double quotes"),
        (b"", "body: required; send a JSON object"),
    ],
)
async def test_unknown_fields_get_a_suggestion(url: str, data: bytes, message: str) -> None:
    _, body, _ = await ask(f"{url}/things", "POST", data=data, headers={"content-type": "application/json"})
    error = error_of(body)
    assert error["message"] == message
    details = error["details"]
    assert isinstance(details, dict)
    assert details["field"] == message.partition(":")[0]


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b'{"name": 3}', "name"),
        (b"{}", "name"),
        (b'{"name": "a", "extra": 1}', "extra"),
        (b'{"name": "a", "size": "x"}', "size"),
    ],
)
async def test_wrong_fields_are_refused_with_their_name(url: str, data: bytes, field: str) -> None:
    status, body, _ = await ask(f"{url}/things", "POST", data=data, headers={"content-type": "application/json"})
    error = error_of(body)
    assert (status, error["type"]) == (400, "invalid_request")
    assert field in str(error["message"])
    assert isinstance(error["details"], dict)
    assert error["details"]["field"] == field


@pytest.mark.parametrize("data", [b"{", b'{"name": "\xff"}', b"\xff\xfe", b"[]", b"null"])
async def test_bodies_that_are_not_json_objects_are_refused_with_400(url: str, data: bytes) -> None:
    status, body, _ = await ask(f"{url}/things", "POST", data=data, headers={"content-type": "application/json"})
    assert (status, error_of(body)["type"]) == (400, "invalid_request")


async def test_defects_of_bare_asgi_apps_have_the_common_shape() -> None:
    async def defective(scope: object, receive: object, send: object) -> None:
        raise ZeroDivisionError("sk-ant-canary")

    async with serving(RequestContext(defective)) as address:
        status, body, _ = await ask(f"{address}/anything")
    error = error_of(body)
    assert (status, error["type"], error["retryable"]) == (500, "internal", True)
    assert "canary" not in json.dumps(body)


def test_errors_about_many_wrong_fields_are_short() -> None:
    with pytest.raises(ValidationError) as wrong:
        Body.model_validate({"n" * 1_000_000 + str(number): 1 for number in range(50)})
    said = describe_faults(wrong.value.errors(include_url=False, include_input=False), list(Body.model_fields))
    assert [len(fault["field"]) for fault in (said.details or {})["faults"]] == [100] * 20
    assert len(said.message) < 1000


@pytest.mark.parametrize(
    ("encoding", "said"), [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("utf-16-be", "UTF-16"), ("utf-32", "UTF-32")]
)
async def test_json_in_other_encodings_is_refused(url: str, encoding: str, said: str) -> None:
    data, headers = '{"name": "a"}'.encode(encoding), {"content-type": "application/json"}
    status, body, _ = await ask(f"{url}/things", "POST", data=data, headers=headers)
    assert (status, error_of(body)["message"]) == (400, f"body: must be JSON in UTF-8; this is {said}")
    _, body, _ = await ask(f"{url}/things", "POST", data=b'{"name": "\xff"}', headers=headers)
    assert error_of(body)["message"] == "the body is not valid UTF-8"


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("owner=ada", "owner: unknown query parameter; did you mean owner_id?"),
        ("who=ada", "who: unknown query parameter; did you mean owner_id?"),
        ("owner_id=ada&colour=1", "colour: unknown query parameter; see /docs"),
        ("owner_id=ada&limits=1", "limits: unknown query parameter; did you mean limit?"),
        ("owner_id=ada&limit=", None),
        ("owner_id=ada&owner_id=bob", "owner_id: given 2 times; give it once"),
        ("owner_id=ada&owner%5Fid=ada", "owner_id: given 2 times; give it once"),
        ("owner_id=ada&&", ""),
        ("owner_id=ada&x", "x: unknown query parameter; see /docs"),
    ],
)
async def test_unknown_parameters_are_refused(url: str, query: str, message: str | None) -> None:
    status, body, _ = await ask(URL(f"{url}/list?{query}", encoded=True))
    if message == "":
        assert (status, body) == (200, {"owner_id": "ada", "limit": 10})
        return
    error = error_of(body)
    assert (status, error["type"]) == (400, "invalid_request")
    assert message is None or error["message"] == message


async def test_a_route_without_parameters_refuses_them(url: str) -> None:
    status, body, _ = await ask(f"{url}/full?x=1", "GET")
    assert (status, error_of(body)["details"]) == (
        400,
        {"faults": [{"field": "x", "problem": "unknown query parameter; see /docs"}], "field": "x"},
    )


async def test_errors_for_unknown_routes_and_methods_have_the_common_shape(url: str) -> None:
    assert error_of((await ask(f"{url}/nothing"))[1])["type"] == "not_found"
    status, body, answer = await ask(f"{url}/things", "DELETE")
    assert (status, error_of(body)["type"], answer.headers["allow"]) == (405, "method_not_allowed", "POST")


async def test_bodies_over_the_limit_are_refused_with_413(url: str) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b"x" * 300

    headers = {"content-type": "application/json"}
    for data in (b"x" * 1001, chunks()):
        status, body, _ = await ask(f"{url}/things", "POST", data=data, headers=headers)
        assert (status, error_of(body)["type"]) == (413, "payload_too_large")


async def test_defects_are_logged_and_the_response_has_no_stack_trace(url: str) -> None:
    with capture_logs() as logs:
        status, body, _ = await ask(f"{url}/defect")
    assert (status, error_of(body)["type"]) == (500, "internal")
    assert "canary" not in json.dumps(body)
    defect = next(entry for entry in logs if entry["event"] == "request.defect")
    assert defect["request_id"] == error_of(body)["request_id"]


@pytest.mark.parametrize("given", ["a" * 65, "with space", "new\tline", ""])
async def test_unsafe_request_ids_are_replaced(url: str, given: str) -> None:
    _, _, answer = await ask(f"{url}/full", headers={"x-request-id": given})
    assert answer.headers["x-request-id"].startswith("req_")


def test_every_error_type_is_unique_and_listed_in_the_tree() -> None:
    kinds = {
        error.type for error in HypercoreError.__subclasses__() if error.__module__.startswith("hypercore_agents.api")
    }
    assert kinds == set(ERROR_TYPES)
    assert InvalidRequest("x", field="y").details == {"field": "y"}
    assert not NotFound("x").retryable


@pytest.mark.parametrize("text", ["8080", "host:", ":8080", "host:port", "host:70000"])
def test_errors_about_bad_addresses_name_the_variable(text: str) -> None:
    with pytest.raises(AddressError, match="LISTEN_ADDR"):
        parse_address(text, "LISTEN_ADDR")


def test_addresses_are_parsed() -> None:
    assert parse_address("127.0.0.1:8080", "X") == ("127.0.0.1", 8080)
    assert parse_address("[::1]:1", "X") == ("::1", 1)
    assert [is_loopback(host) for host in ("127.3.2.1", "::1", "localhost", "0.0.0.0", "10.0.0.1", "example.com")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize("closing", [False, True])
async def test_clients_that_send_everything_first_still_read_the_413(closing: bool) -> None:
    """Also if the connection closes after the response: closing it while the body arrives would reset it."""

    async def reads(scope: Scope, receive: Receive, send: Send) -> None:
        while scope["type"] == "http" and (await receive()).get("more_body"):
            pass

    def ask(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            close = "connection: close\r\n" if closing else ""
            head = f"POST / HTTP/1.1\r\nhost: x\r\n{close}transfer-encoding: chunked\r\n\r\n"
            client.sendall(head.encode())
            for _ in range(300):
                client.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            answer: bytes = client.recv(4096)
            return answer

    async with serving(RequestContext(reads, max_body=1000)) as url:
        answer = await asyncio.to_thread(ask, int(url.rpartition(":")[2]))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"payload_too_large" in answer


@pytest.mark.parametrize(
    ("size", "said"), [(32 << 20, "32 MB"), (64 << 10, "64 KB"), ((1 << 20) + 1, "1048577 bytes"), (10, "10 bytes")]
)
def test_limits_are_shown_in_the_largest_whole_unit(size: int, said: str) -> None:
    assert readable_size(size) == said
