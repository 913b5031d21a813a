"""The pool of a relay's connections: reuse, how many may be open, who waits for one, when an idle one is closed.

What a connection that the other side closed does, and what is sent again: `tests/faults/test_relay_faults.py`.
"""

import asyncio

import pytest

from hypercore_agents.api.errors import AgentUnreachable
from hypercore_agents.kit.relay.upstream import Peer, RequestLimits, Upstream, UpstreamResponse
from support.relay_ends import Connection, echo_bodies, scripted_upstream


def upstream(connections: int, *, keep_alive: float = 30, connect: float = 20) -> Upstream:
    return Upstream(
        peer=Peer(),
        limits=RequestLimits(connect=connect, response=20, idle=20),
        connections=connections,
        keep_alive=keep_alive,
    )


async def test_the_connection_used_last_serves_the_next_request() -> None:
    ours = upstream(5)
    async with asyncio.timeout(20), scripted_upstream(echo_bodies) as side:
        for _ in range(3):
            answer = await ours.open("POST", side.url, body=b"ok")
            assert await answer.read(10) == b"ok"
            answer.close()
        assert (side.connections, len(side.requests)) == (1, 3)
        await ours.close()


async def test_no_more_than_the_limit_are_open_and_who_gives_up_takes_no_place() -> None:
    ours = upstream(2)
    async with asyncio.timeout(20), scripted_upstream(echo_bodies) as side:
        held = [await ours.open("POST", side.url, body=b"ok") for _ in range(2)]
        order: list[int] = []

        async def waiting(number: int) -> UpstreamResponse:
            answer = await ours.open("POST", side.url, body=b"ok")
            order.append(number)
            return answer

        tasks = [asyncio.create_task(waiting(number)) for number in range(3)]
        gave_up = tasks[1]
        await asyncio.sleep(0)
        gave_up.cancel()
        await asyncio.wait([gave_up])
        assert (order, ours._pool.open) == ([], 2)  # a place is taken before the first packet
        for answer in held:
            await answer.read(10)
            answer.close()
        for answer in await asyncio.gather(tasks[0], tasks[2]):
            assert await answer.read(10) == b"ok"
            answer.close()
        assert sorted(order) == [0, 2]
        await ours.close()


async def test_whoever_finds_no_place_in_time_is_told() -> None:
    ours = upstream(1, connect=0.05)
    async with asyncio.timeout(20), scripted_upstream(echo_bodies) as side:
        held = await ours.open("POST", side.url, body=b"ok")
        with pytest.raises(AgentUnreachable, match="could not be reached within"):
            await ours.open("POST", side.url, body=b"ok")
        await held.read(10)
        held.close()
        again = await ours.open("POST", side.url, body=b"ok")  # the place was not lost with the one who waited
        assert await again.read(10) == b"ok"
        again.close()
        await ours.close()


async def test_an_idle_connection_elsewhere_makes_room() -> None:
    ours = upstream(1)
    async with asyncio.timeout(20), scripted_upstream(echo_bodies) as first, scripted_upstream(echo_bodies) as second:
        for side in (first, second, first):
            answer = await ours.open("POST", side.url, body=b"ok")
            assert await answer.read(10) == b"ok"
            answer.close()
        assert (first.connections, second.connections) == (2, 1)
        await ours.close()


async def test_an_idle_connection_is_closed_after_a_while() -> None:
    closed = asyncio.Event()

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await connection.closed_by_peer()
        closed.set()

    ours = upstream(5, keep_alive=0.05)
    async with asyncio.timeout(20), scripted_upstream(script) as side:
        answer = await ours.open("POST", side.url, body=b"{}")
        await answer.read(10)
        answer.close()
        await closed.wait()
        await ours.close()
