"""The pool of a relay's connections: reuse, the bound on open connections, waiters, expiry of idle connections.

Connections closed by the upstream and repeated requests: `tests/faults/test_relay_faults.py`.
"""

import asyncio

import pytest

from hypercore_agents.api.errors import AgentUnreachable
from hypercore_agents.kit.relay.upstream import Peer, RequestLimits, Upstream, UpstreamResponse
from support.relay_ends import Connection, echo_bodies, scripted_upstream


def new_client(connections: int, *, keep_alive: float = 30, connect: float = 20) -> Upstream:
    return Upstream(
        peer=Peer(),
        limits=RequestLimits(connect=connect, response=20, idle=20),
        connections=connections,
        keep_alive=keep_alive,
    )


async def test_the_most_recently_used_connection_is_reused() -> None:
    client = new_client(5)
    async with asyncio.timeout(20), scripted_upstream(echo_bodies) as upstream:
        for _ in range(3):
            answer = await client.open("POST", upstream.url, body=b"ok")
            assert await answer.read(10) == b"ok"
            answer.close()
        assert (upstream.connections, len(upstream.requests)) == (1, 3)
        await client.close()


async def test_open_connections_are_bounded_and_cancelled_waiters_free_their_slot() -> None:
    client = new_client(2)
    async with asyncio.timeout(20), scripted_upstream(echo_bodies) as upstream:
        held = [await client.open("POST", upstream.url, body=b"ok") for _ in range(2)]
        order: list[int] = []

        async def waiting(number: int) -> UpstreamResponse:
            answer = await client.open("POST", upstream.url, body=b"ok")
            order.append(number)
            return answer

        tasks = [asyncio.create_task(waiting(number)) for number in range(3)]
        cancelled = tasks[1]
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        assert (order, client._pool.open) == ([], 2)  # a slot is taken before the first packet
        for answer in held:
            await answer.read(10)
            answer.close()
        for answer in await asyncio.gather(tasks[0], tasks[2]):
            assert await answer.read(10) == b"ok"
            answer.close()
        assert sorted(order) == [0, 2]
        await client.close()


async def test_waiting_for_a_connection_times_out_with_an_error() -> None:
    client = new_client(1, connect=0.05)
    async with asyncio.timeout(20), scripted_upstream(echo_bodies) as upstream:
        held = await client.open("POST", upstream.url, body=b"ok")
        with pytest.raises(AgentUnreachable, match="could not be reached within"):
            await client.open("POST", upstream.url, body=b"ok")
        await held.read(10)
        held.close()
        again = await client.open("POST", upstream.url, body=b"ok")  # the failed waiter did not lose the slot
        assert await again.read(10) == b"ok"
        again.close()
        await client.close()


async def test_an_idle_connection_to_another_origin_is_closed_for_a_new_one() -> None:
    client = new_client(1)
    async with asyncio.timeout(20), scripted_upstream(echo_bodies) as first, scripted_upstream(echo_bodies) as second:
        for upstream in (first, second, first):
            answer = await client.open("POST", upstream.url, body=b"ok")
            assert await answer.read(10) == b"ok"
            answer.close()
        assert (first.connections, second.connections) == (2, 1)
        await client.close()


async def test_idle_connections_expire() -> None:
    closed = asyncio.Event()

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await connection.closed_by_peer()
        closed.set()

    client = new_client(5, keep_alive=0.05)
    async with asyncio.timeout(20), scripted_upstream(script) as upstream:
        answer = await client.open("POST", upstream.url, body=b"{}")
        await answer.read(10)
        answer.close()
        await closed.wait()
        await client.close()
