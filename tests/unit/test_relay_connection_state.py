"""The states of a relay's connection to an upstream: every transition of the table occurs, and no other one does."""

import asyncio
from itertools import product
from typing import Any, cast

import pytest

from hypercore_agents.kit.relay.connection import Connection
from hypercore_agents.kit.relay.connection_state import TRANSITIONS, ConnectionState, IllegalTransition
from hypercore_agents.kit.relay.delayed_calls import DelayedCalls

S = ConnectionState
FRAMED = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
UNFRAMED = b"HTTP/1.1 200 OK\r\n\r\n"


class Socket:
    """Looks like a socket and like its transport; nothing is sent."""

    def __init__(self) -> None:
        self.aborted = False

    def get_extra_info(self, _: str) -> "Socket":
        return self

    def fileno(self) -> int:
        return 0

    def write(self, data: bytes) -> None:
        pass

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted


class RecordedConnection(Connection):
    """Records each transition."""

    def __init__(self, made: set[tuple[S, S]]) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(loop, DelayedCalls(loop, 60))
        self.made = made

    def _change(self, state: S) -> None:
        before = self.state
        super()._change(state)
        self.made.add((before, state))

    def connect(self) -> None:
        self.connection_made(cast(Any, Socket()))

    def request(self, *, head_only: bool = False) -> None:
        self.begin(b"", None, head_only=head_only, body_follows=False, response_timeout=60, idle_timeout=60)

    def lose(self) -> None:
        self.connection_lost(None)


@pytest.mark.parametrize(("before", "after"), list(product(S, S)))
async def test_only_the_transitions_of_the_table_are_possible(before: S, after: S) -> None:
    connection = RecordedConnection(set())
    connection.state = before
    if after in TRANSITIONS[before]:
        connection._change(after)
        assert connection.state is after
    else:
        with pytest.raises(IllegalTransition, match=f"from {before.name} to {after.name}"):
            connection._change(after)
        assert connection.state is before


async def test_events_of_a_connection_make_every_transition_of_the_table() -> None:
    made: set[tuple[S, S]] = set()

    def new(*, connected: bool = True) -> RecordedConnection:
        connection = RecordedConnection(made)
        if connected:
            connection.connect()
        return connection

    new(connected=False).abort()
    new().lose()
    requested = new()
    requested.request()
    requested.lose()
    reused = new()
    for _ in range(2):
        reused.request()
        reused.data_received(FRAMED)
        assert reused.state is S.RECEIVING
        reused.data_received(b"ok")
        assert await reused.read() == b"ok"
        assert reused.release()
    cut_off = new()
    cut_off.request()
    cut_off.data_received(FRAMED)
    cut_off.lose()
    head_only = new()
    head_only.request(head_only=True)
    head_only.data_received(FRAMED)
    assert head_only.state is S.COMPLETE
    assert not head_only.release(), "a body may follow by mistake"
    until_close = new()
    until_close.request()
    until_close.data_received(UNFRAMED + b"all")
    until_close.lose()
    assert until_close.state is S.COMPLETE_CLOSED
    assert (await until_close.read(), await until_close.read()) == (b"all", b"")
    failed = new()
    failed.request()
    failed.data_received(UNFRAMED + b"part")
    failed.connection_lost(ConnectionResetError())
    assert await failed.read() == b"part"
    with pytest.raises(ConnectionResetError):
        await failed.read()
    assert made == {(before, after) for before, following in TRANSITIONS.items() for after in following}


async def test_bytes_that_were_not_requested_close_a_connection() -> None:
    connection = RecordedConnection(set())
    connection.connect()
    connection.data_received(b"HTTP/1.1 200 OK\r\n\r\n")
    assert connection.state is S.CLOSED


async def test_bytes_after_a_whole_response_close_the_connection_only() -> None:
    connection = RecordedConnection(set())
    connection.connect()
    connection.request()
    connection.data_received(FRAMED + b"okHTTP/1.1 200 OK\r\n\r\n")
    assert connection.state is S.COMPLETE_CLOSED
    assert await connection.read() == b"ok"
    assert not connection.release()


async def test_a_request_on_a_connection_that_was_lost_at_once_is_a_connection_error() -> None:
    connection = RecordedConnection(set())
    connection.connect()
    connection.lose()
    assert not connection.reusable
    with pytest.raises(ConnectionResetError):
        connection.request()
