"""The response's side of a turn, and who makes room for whom; without a CLI."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from hypercore_agents.agent.server.responses import Reply
from hypercore_agents.agent.sessions import send_buffer as frames_module
from hypercore_agents.agent.sessions.capacity import LiveCapacity
from hypercore_agents.agent.sessions.parking import Parking, Policy
from hypercore_agents.agent.sessions.send_buffer import SendBuffer
from hypercore_agents.agent.sessions.session import Session
from hypercore_agents.agent.sessions.turn import Turn
from hypercore_agents.api.chat import ChatResponse, Usage
from hypercore_agents.api.errors import AtCapacity, HypercoreError, ModelFailed
from hypercore_agents.api.events import KEEPALIVE, Delta
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.observability.metrics import AgentMetrics
from support.waiting import until


class StandInSession:
    """As much of a session as responses and room need."""

    def __init__(self, used_at: float = 0.0) -> None:
        self.session_id = "s"
        self.user_id = "ada"
        self.guard = asyncio.Lock()
        self.resident = False
        self.is_live = True
        self.is_starting = False
        self.has_spare = False
        self.turn: object | None = None
        self.used_at = used_at
        self.parked = 0
        self.process: object | None = None
        self.jobs = SimpleNamespace(running=False)
        self.jobs_ended = False
        self._sequence = 0

    def event_id(self) -> str:
        self._sequence += 1
        return f"1.{self._sequence}"

    async def look_at_jobs(self) -> bool:
        if self.jobs_ended:
            self.jobs.running, self.used_at = False, time.monotonic()
        return bool(self.jobs.running)

    async def park(self, why: str) -> bool:
        async with self.guard:
            if self.turn is not None:
                return False
            await asyncio.sleep(0)
            self.parked += 1
            return True


class StandInTurn:
    last_id = ""

    def __init__(self, frames: SendBuffer | None) -> None:
        self.frames = frames
        self.session = StandInSession()
        self.number = 1
        self.stopped: list[str] = []

    def stop(self, reason: str) -> bool:
        self.stopped.append(reason)
        return True


class Client:
    """The other end of an ASGI send and receive."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""
        self.ended = False
        self.gone = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await self.reads.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.body += message["body"]
            self.ended = not message.get("more_body", False)


def answer() -> ChatResponse:
    return ChatResponse(
        session_id="s", agent_id="a", content="c", usage=Usage(), status="completed", turn=1, tools=False
    )


class Served:
    def __init__(self, *, stream: bool, silence: float = 15.0) -> None:
        self.frames = SendBuffer() if stream else None
        self.turn = StandInTurn(self.frames)
        self.client = Client()
        self.tasks = Tasks("test")
        self.outcome: asyncio.Future[ChatResponse | HypercoreError] = asyncio.get_running_loop().create_future()
        self.scope: dict[str, Any] = {"type": "http", "state": {"request_id": "req_1"}}
        metrics = AgentMetrics(CollectorRegistry())
        task = self.tasks.start("turn", self._turn())
        reply = Reply(cast(Turn, self.turn), task, self.tasks, metrics, silence)
        self.reply = asyncio.create_task(reply(self.scope, self.client.receive, self.client.send))

    async def _turn(self) -> ChatResponse | HypercoreError:
        return await self.outcome


async def test_silence_is_broken_by_comments_and_only_by_them() -> None:
    served = Served(stream=True, silence=0.02)
    assert served.frames is not None
    served.frames.add(Delta(text="a"), "1.1")
    await until(lambda: served.client.body.count(KEEPALIVE) >= 2, seconds=5)
    served.outcome.set_result(answer())
    await served.reply
    events = [line for line in served.client.body.split(b"\n") if line.startswith(b"event")]
    assert events == [b"event: delta", b"event: result"]
    assert served.client.ended
    await served.tasks.close()


async def test_no_byte_is_sent_before_the_first_event_so_that_an_error_has_its_status() -> None:
    served = Served(stream=True, silence=0.01)
    served.outcome.set_result(AtCapacity("full"))
    with pytest.raises(AtCapacity):
        await served.reply
    assert served.client.status == 0
    await served.tasks.close()


async def test_an_error_after_the_first_event_is_the_last_event() -> None:
    served = Served(stream=True)
    assert served.frames is not None
    served.frames.add(Delta(text="a"), "1.1")
    await until(lambda: served.client.status == 200)
    served.outcome.set_result(ModelFailed("no"))
    await served.reply
    assert b"event: error" in served.client.body
    assert b"req_1" in served.client.body
    assert served.scope["state"]["outcome"] == 502
    await served.tasks.close()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_lost_client_stops_the_turn(stream: bool) -> None:
    served = Served(stream=stream)
    served.client.gone.set()
    await served.reply
    assert served.turn.stopped == ["gone"]
    assert served.scope["state"]["outcome"] == 0
    served.outcome.set_result(answer())
    await served.tasks.close()


async def test_a_turn_pauses_for_a_slow_client_until_it_reads_or_the_turn_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frames_module, "LIMIT", 100)
    frames = SendBuffer()
    frames.add(Delta(text="x" * 200), "1.1")
    assert frames.full
    waiting = asyncio.create_task(frames.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    assert frames.take().endswith(b"\n\n")
    await waiting
    frames.add(Delta(text="x" * 200), "1.2")
    waiting = asyncio.create_task(frames.room())
    await asyncio.sleep(0)
    frames.release()
    await waiting
    assert not frames.full


class Rooms:
    def __init__(self, limit: int, *, timeout: float = 5) -> None:
        self.sessions: list[StandInSession] = []
        self.tasks = Tasks("test")
        self.parked = 0
        self.room = LiveCapacity(
            limit,
            timeout=timeout,
            sessions=lambda: cast(list[Session], self.sessions),
            tasks=self.tasks,
            on_parked=self._count,
        )

    def _count(self) -> None:
        self.parked += 1

    def session(self, used_at: float = 0.0, *, busy: bool = True) -> StandInSession:
        self.sessions.append(StandInSession(used_at))
        self.sessions[-1].turn = "turn" if busy else None
        return self.sessions[-1]

    async def enter(self, session: StandInSession) -> None:
        await self.room.enter(cast(Session, session))

    def ended(self, session: StandInSession) -> None:
        session.turn = None
        self.room.changed()


async def test_the_session_used_longest_ago_makes_way() -> None:
    rooms = Rooms(2)
    older, newer = rooms.session(1.0), rooms.session(2.0)
    await rooms.enter(newer)
    await rooms.enter(older)
    older.turn = newer.turn = None
    third = rooms.session(3.0)
    await rooms.enter(third)
    assert (older.parked, newer.parked, third.resident, older.resident) == (1, 0, True, False)
    assert rooms.room.used == 2
    await rooms.enter(third)
    assert rooms.room.used == 2
    await rooms.tasks.close()


async def test_who_came_first_is_let_in_first() -> None:
    rooms = Rooms(1)
    busy = rooms.session()
    await rooms.enter(busy)
    entered: list[int] = []

    async def wait(number: int, session: StandInSession) -> None:
        await rooms.enter(session)
        entered.append(number)

    waiting = [rooms.session() for _ in range(3)]
    tasks = [asyncio.create_task(wait(number, session)) for number, session in enumerate(waiting)]
    await asyncio.sleep(0)
    rooms.ended(busy)
    for session, task in zip(waiting, tasks, strict=True):
        await task
        rooms.ended(session)
    assert entered == [0, 1, 2]
    assert rooms.parked == 3
    await rooms.tasks.close()


async def test_one_user_who_asks_for_much_does_not_keep_the_others_waiting() -> None:
    rooms = Rooms(1)
    busy = rooms.session()
    await rooms.enter(busy)
    entered: list[str] = []

    async def wait(session: StandInSession) -> None:
        await rooms.enter(session)
        entered.append(session.user_id)
        rooms.ended(session)

    waiting = [rooms.session() for _ in range(6)]
    for session, user in zip(waiting, ("ada", "ada", "ada", "ada", "bob", "eve"), strict=True):
        session.user_id = user
    tasks = [asyncio.create_task(wait(session)) for session in waiting]
    await asyncio.sleep(0)
    rooms.ended(busy)
    await asyncio.gather(*tasks)
    assert entered == ["ada", "bob", "eve", "ada", "ada", "ada"]
    assert rooms.room.used == 1
    assert rooms.room.waiting == 0
    await rooms.tasks.close()


async def test_who_is_idle_too_long_has_grown_or_fills_the_memory_is_parked_and_nobody_else() -> None:
    rooms = Rooms(9)
    now = time.monotonic()
    idle, grown, older, newer, busy = (rooms.session(now - age, busy=False) for age in (900, 5, 30, 20, 800))
    sizes = {idle: 90, grown: 500, older: 300, newer: 300, busy: 900}
    for pid, session in enumerate(sizes, 1):
        await rooms.enter(session)
        session.process = SimpleNamespace(pid=pid)
    busy.turn = "turn"
    by_pid = dict(enumerate(sizes.values(), 1))
    keeper = Parking(
        Policy(park_after=600, memory_mb=1250, recycle_mb=400),
        lambda: cast(list[Session], rooms.sessions),
        rooms.room,
        measure=lambda pid: float(by_pid[pid]),
    )
    await keeper.look()
    assert [session.parked for session in sizes] == [1, 1, 1, 0, 0]
    assert not keeper.over
    busy.parked = 0
    await keeper.look()
    assert [session.resident for session in sizes] == [False, False, False, True, True]
    await rooms.tasks.close()


async def test_a_job_in_the_background_keeps_its_session_live_for_so_long_and_makes_way_last() -> None:
    rooms = Rooms(9)
    now = time.monotonic()
    young, over, done, grown, idle = (rooms.session(now - age, busy=False) for age in (900, 1300, 1300, 900, 30))
    sizes = {young: 300, over: 300, done: 300, grown: 900, idle: 300}
    by_pid = {pid: float(size) for pid, size in enumerate(sizes.values(), 1)}
    for pid, session in enumerate(sizes, 1):
        await rooms.enter(session)
        session.process = SimpleNamespace(pid=pid)
        session.jobs.running = session is not idle
    done.jobs_ended = True

    def keeper(memory_mb: int) -> Parking:
        policy = Policy(park_after=600, memory_mb=memory_mb, recycle_mb=400, background_max=1200)
        known = lambda: cast(list[Session], rooms.sessions)  # noqa: E731
        return Parking(policy, known, rooms.room, lambda pid: by_pid[pid])

    await keeper(9000).look()
    assert [session.parked for session in sizes] == [0, 1, 0, 0, 0], "idle since its job ended, or busy with it"
    await keeper(1250).look()
    assert [session.parked for session in sizes] == [0, 1, 1, 0, 1], "memory is taken from who has no job first"
    await keeper(1000).look()
    assert [session.parked for session in sizes] == [1, 1, 1, 0, 1]
    await rooms.tasks.close()


async def test_a_turn_that_waits_parks_a_session_with_a_job_only_when_no_other_is_idle_and_a_spare_never() -> None:
    rooms = Rooms(2)
    job, idle, third, fourth = (rooms.session(age) for age in (1.0, 2.0, 3.0, 4.0))
    for session in (job, idle):
        await rooms.enter(session)
        session.turn = None
    job.jobs.running = True
    rooms.room.reserve = 2
    rooms.room.changed()
    await until(lambda: not idle.resident)
    await asyncio.sleep(0)
    assert (job.resident, rooms.room.used) == (True, 1), "a spare has no claim on it"
    await rooms.enter(third)
    assert job.resident
    await rooms.enter(fourth)
    assert (job.parked, job.resident) == (1, False)
    await rooms.tasks.close()


async def test_a_full_room_says_so_in_time_and_a_waiter_that_leaves_holds_nothing_up() -> None:
    rooms = Rooms(1, timeout=0.02)
    busy, late = rooms.session(), rooms.session()
    await rooms.enter(busy)
    with pytest.raises(AtCapacity) as raised:
        await rooms.enter(late)
    assert raised.value.details == {"live_sessions": 1, "limit": 1}
    rooms.room.leave(cast(Session, busy))
    rooms.room.leave(cast(Session, busy))
    await rooms.enter(late)
    assert rooms.room.used == 1
    await rooms.tasks.close()
