"""Chat responses, and the capacity of an agent with its parking; without a CLI."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from hypercore_agents.agent.server.responses import ChatReply
from hypercore_agents.agent.sessions import send_buffer as send_buffer_module
from hypercore_agents.agent.sessions.capacity import LiveCapacity, SlotHolder
from hypercore_agents.agent.sessions.cli_state import CliStatus
from hypercore_agents.agent.sessions.parking import Parking, ParkingLimits
from hypercore_agents.agent.sessions.send_buffer import SendBuffer
from hypercore_agents.agent.sessions.turn import Turn
from hypercore_agents.api.chat import ChatResponse, Usage
from hypercore_agents.api.errors import AtCapacity, HypercoreError, ModelFailed
from hypercore_agents.api.events import KEEPALIVE, Delta
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.observability.metrics import AgentMetrics
from support.waiting import until


class StandInSession:
    """The part of a session that responses, capacity and parking need."""

    def __init__(self, used_at: float = 0.0) -> None:
        self.session_id = "s"
        self.user_id = "ada"
        self.guard = asyncio.Lock()
        self.status = CliStatus()
        self.has_prewarmed = False
        self.turn: object | None = None
        self.used_at = used_at
        self.parked = 0
        self.jobs = SimpleNamespace(running=False)
        self.job_has_ended = False

    @property
    def holds_slot(self) -> bool:
        return self.status.holds_slot

    async def check_jobs(self) -> bool:
        if self.job_has_ended:
            self.jobs.running, self.used_at = False, time.monotonic()
        return bool(self.jobs.running)

    async def park(self, reason: str) -> bool:
        async with self.guard:
            if self.turn is not None:
                return False
            await asyncio.sleep(0)
            self.status.process_ended()
            self.parked += 1
            return True


class StandInTurn:
    last_id = ""

    def __init__(self, send_buffer: SendBuffer | None) -> None:
        self.send_buffer = send_buffer
        self.session = StandInSession()
        self.number = 1
        self.stopped: list[str] = []

    def stop(self, reason: str) -> bool:
        self.stopped.append(reason)
        return True


class Client:
    """The client of an ASGI application."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""
        self.ended = False
        self.disconnected = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()

    async def receive(self) -> dict[str, Any]:
        await self.disconnected.wait()
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


class ServedReply:
    def __init__(self, *, stream: bool, keepalive_seconds: float = 15.0) -> None:
        self.send_buffer = SendBuffer() if stream else None
        self.turn = StandInTurn(self.send_buffer)
        self.client = Client()
        self.tasks = Tasks("test")
        self.outcome: asyncio.Future[ChatResponse | HypercoreError] = asyncio.get_running_loop().create_future()
        self.scope: dict[str, Any] = {"type": "http", "state": {"request_id": "req_1"}}
        metrics = AgentMetrics(CollectorRegistry())
        task = self.tasks.start("turn", self._turn())
        reply = ChatReply(cast(Turn, self.turn), task, self.tasks, metrics, keepalive_seconds)
        self.reply = asyncio.create_task(reply(self.scope, self.client.receive, self.client.send))

    async def _turn(self) -> ChatResponse | HypercoreError:
        return await self.outcome


async def test_keepalive_comments_are_sent_only_while_there_are_no_events() -> None:
    served = ServedReply(stream=True, keepalive_seconds=0.02)
    assert served.send_buffer is not None
    served.send_buffer.add(Delta(text="a"), "1.1")
    await until(lambda: served.client.body.count(KEEPALIVE) >= 2, seconds=5)
    served.outcome.set_result(answer())
    await served.reply
    events = [line for line in served.client.body.split(b"\n") if line.startswith(b"event")]
    assert events == [b"event: delta", b"event: result"]
    assert served.client.ended
    await served.tasks.close()


async def test_an_error_before_the_first_event_is_raised_before_any_byte_is_sent() -> None:
    served = ServedReply(stream=True, keepalive_seconds=0.01)
    served.outcome.set_result(AtCapacity("full"))
    with pytest.raises(AtCapacity):
        await served.reply
    assert served.client.status == 0
    await served.tasks.close()


async def test_an_error_after_the_first_event_is_sent_as_the_last_event() -> None:
    served = ServedReply(stream=True)
    assert served.send_buffer is not None
    served.send_buffer.add(Delta(text="a"), "1.1")
    await until(lambda: served.client.status == 200)
    served.outcome.set_result(ModelFailed("no"))
    await served.reply
    assert b"event: error" in served.client.body
    assert b"req_1" in served.client.body
    assert served.scope["state"]["outcome"] == 502
    await served.tasks.close()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_disconnected_client_stops_its_turn(stream: bool) -> None:
    served = ServedReply(stream=stream)
    served.client.disconnected.set()
    await served.reply
    assert served.turn.stopped == ["disconnect"]
    assert served.scope["state"]["outcome"] == 0
    served.outcome.set_result(answer())
    await served.tasks.close()


async def test_a_turn_pauses_for_a_slow_client_until_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(send_buffer_module, "LIMIT", 100)
    send_buffer = SendBuffer()
    send_buffer.add(Delta(text="x" * 200), "1.1")
    assert send_buffer.full
    waiting = asyncio.create_task(send_buffer.wait_for_space())
    await asyncio.sleep(0)
    assert not waiting.done()
    assert send_buffer.take().endswith(b"\n\n")
    await waiting
    send_buffer.add(Delta(text="x" * 200), "1.2")
    waiting = asyncio.create_task(send_buffer.wait_for_space())
    await asyncio.sleep(0)
    send_buffer.release()  # the turn is stopped
    await waiting
    assert not send_buffer.full


class CapacityUnderTest:
    def __init__(self, limit: int, *, timeout: float = 5) -> None:
        self.sessions: list[StandInSession] = []
        self.tasks = Tasks("test")
        self.parked = 0
        self.capacity = LiveCapacity(
            limit,
            timeout=timeout,
            sessions=self.all_sessions,
            tasks=self.tasks,
            on_parked=self._count,
        )

    def all_sessions(self) -> list[SlotHolder]:
        return cast(list[SlotHolder], self.sessions)

    def _count(self) -> None:
        self.parked += 1

    def session(self, used_at: float = 0.0, *, busy: bool = True) -> StandInSession:
        self.sessions.append(StandInSession(used_at))
        self.sessions[-1].turn = "turn" if busy else None
        return self.sessions[-1]

    async def enter(self, session: StandInSession) -> None:
        await self.capacity.enter(cast(SlotHolder, session))

    def end_turn(self, session: StandInSession) -> None:
        session.turn = None
        self.capacity.notify_change()


async def test_the_least_recently_used_session_is_parked_for_a_waiting_turn() -> None:
    setup = CapacityUnderTest(2)
    older, newer = setup.session(1.0), setup.session(2.0)
    await setup.enter(newer)
    await setup.enter(older)
    older.turn = newer.turn = None
    third = setup.session(3.0)
    await setup.enter(third)
    assert (older.parked, newer.parked, third.holds_slot, older.holds_slot) == (1, 0, True, False)
    assert setup.capacity.used == 2
    await setup.enter(third)
    assert setup.capacity.used == 2
    await setup.tasks.close()


async def test_waiting_turns_of_one_user_are_admitted_in_order() -> None:
    setup = CapacityUnderTest(1)
    busy = setup.session()
    await setup.enter(busy)
    entered: list[int] = []

    async def wait(number: int, session: StandInSession) -> None:
        await setup.enter(session)
        entered.append(number)

    waiting = [setup.session() for _ in range(3)]
    tasks = [asyncio.create_task(wait(number, session)) for number, session in enumerate(waiting)]
    await asyncio.sleep(0)
    setup.end_turn(busy)
    for session, task in zip(waiting, tasks, strict=True):
        await task
        setup.end_turn(session)
    assert entered == [0, 1, 2]
    assert setup.parked == 3
    await setup.tasks.close()


async def test_a_user_with_many_turns_does_not_delay_other_users() -> None:
    setup = CapacityUnderTest(1)
    busy = setup.session()
    await setup.enter(busy)
    entered: list[str] = []

    async def wait(session: StandInSession) -> None:
        await setup.enter(session)
        entered.append(session.user_id)
        setup.end_turn(session)

    waiting = [setup.session() for _ in range(6)]
    for session, user in zip(waiting, ("ada", "ada", "ada", "ada", "bob", "eve"), strict=True):
        session.user_id = user
    tasks = [asyncio.create_task(wait(session)) for session in waiting]
    await asyncio.sleep(0)
    setup.end_turn(busy)
    await asyncio.gather(*tasks)
    assert entered == ["ada", "bob", "eve", "ada", "ada", "ada"]
    assert setup.capacity.used == 1
    assert setup.capacity.waiting == 0
    await setup.tasks.close()


async def test_parking_ends_sessions_that_are_idle_large_or_hold_scarce_memory() -> None:
    setup = CapacityUnderTest(9)
    now = time.monotonic()
    idle, grown, older, newer, busy = (setup.session(now - age, busy=False) for age in (900, 5, 30, 20, 800))
    sizes = {idle: 90, grown: 500, older: 300, newer: 300, busy: 900}
    for pid, session in enumerate(sizes, 1):
        await setup.enter(session)
        session.status.process = cast(Any, SimpleNamespace(pid=pid, alive=True))
    busy.turn = "turn"
    by_pid = dict(enumerate(sizes.values(), 1))
    parking = Parking(
        ParkingLimits(park_after=600, memory_mb=1250, recycle_mb=400),
        setup.all_sessions,
        setup.capacity,
        measure=lambda pid: float(by_pid[pid]),
    )
    await parking.run()
    assert [session.parked for session in sizes] == [1, 1, 1, 0, 0]
    assert not parking.memory_is_short
    busy.parked = 0
    await parking.run()
    assert [session.holds_slot for session in sizes] == [False, False, False, True, True]
    await setup.tasks.close()


async def test_a_background_job_delays_the_parking_of_its_session() -> None:
    setup = CapacityUnderTest(9)
    now = time.monotonic()
    young, old, done, grown, idle = (setup.session(now - age, busy=False) for age in (900, 1300, 1300, 900, 30))
    sizes = {young: 300, old: 300, done: 300, grown: 900, idle: 300}
    by_pid = {pid: float(size) for pid, size in enumerate(sizes.values(), 1)}
    for pid, session in enumerate(sizes, 1):
        await setup.enter(session)
        session.status.process = cast(Any, SimpleNamespace(pid=pid, alive=True))
        session.jobs.running = session is not idle
    done.job_has_ended = True

    def parking(memory_mb: int) -> Parking:
        limits = ParkingLimits(park_after=600, memory_mb=memory_mb, recycle_mb=400, background_max=1200)
        return Parking(limits, setup.all_sessions, setup.capacity, lambda pid: by_pid[pid])

    await parking(9000).run()
    assert [session.parked for session in sizes] == [0, 1, 0, 0, 0], "only the session whose job ran too long"
    await parking(1250).run()
    assert [session.parked for session in sizes] == [0, 1, 1, 0, 1], "sessions without a job are parked first"
    await parking(1000).run()
    assert [session.parked for session in sizes] == [1, 1, 1, 0, 1]
    await setup.tasks.close()


async def test_a_session_with_a_job_is_parked_last_and_never_for_prewarmed_clis() -> None:
    setup = CapacityUnderTest(2)
    job, idle, third, fourth = (setup.session(age) for age in (1.0, 2.0, 3.0, 4.0))
    for session in (job, idle):
        await setup.enter(session)
        session.turn = None
    job.jobs.running = True
    setup.capacity.reserve = 2
    setup.capacity.notify_change()
    await until(lambda: not idle.holds_slot)
    await asyncio.sleep(0)
    assert (job.holds_slot, setup.capacity.used) == (True, 1), "a session with a job is not parked for prewarmed CLIs"
    await setup.enter(third)
    assert job.holds_slot
    await setup.enter(fourth)
    assert (job.parked, job.holds_slot) == (1, False)
    await setup.tasks.close()


async def test_a_turn_without_a_free_slot_is_refused_and_leaves_the_queue() -> None:
    setup = CapacityUnderTest(1, timeout=0.02)
    busy, late = setup.session(), setup.session()
    await setup.enter(busy)
    with pytest.raises(AtCapacity) as raised:
        await setup.enter(late)
    assert raised.value.details == {"live_sessions": 1, "limit": 1}
    setup.capacity.release(cast(SlotHolder, busy))
    setup.capacity.release(cast(SlotHolder, busy))
    await setup.enter(late)
    assert setup.capacity.used == 1
    await setup.tasks.close()
