"""The transcript mirror: the Agent SDK's contract for session stores, and entries that a tool has forged."""

import asyncio
import json
from typing import Any

import pytest
from claude_agent_sdk.testing import run_session_store_conformance

from hypercore_agents.agent.persistence import transcript_mirror
from hypercore_agents.agent.persistence.transcript import TranscriptPort
from hypercore_agents.agent.persistence.transcript_mirror import TranscriptMirror
from hypercore_agents.api.chat import Usage
from hypercore_agents.api.errors import Unavailable
from hypercore_agents.api.ids import new_session_id
from hypercore_agents.api.internal import EventEntry, TranscriptEntry
from hypercore_agents.kit.aio.tasks import Tasks


class _Store:
    """A gateway that stores what it receives."""

    def __init__(self) -> None:
        self.entries: list[TranscriptEntry] = []
        self.batches: list[tuple[int, int | None]] = []
        self.events: list[EventEntry] = []
        self.entries_before_events: list[int] = []
        self.is_up = True

    async def append_transcript(
        self,
        session_id: str,
        generation: int,
        entries: list[TranscriptEntry],
        events: list[EventEntry],
        *,
        turn: int | None = None,
    ) -> Usage | None:
        if not self.is_up:
            raise Unavailable("not now")
        self.batches.append((len(entries), turn))
        self.entries += entries
        if events:
            self.entries_before_events.append(len(self.entries))
        self.events += events
        return None if turn is None else Usage(input_tokens=7)


def _mirror(session_id: str, tasks: Tasks) -> tuple[_Store, TranscriptMirror]:
    store = _Store()
    gateway: Any = store
    return store, TranscriptMirror(session_id, 1, gateway, tasks, on_stale=lambda: None, on_lost=lambda: None)


async def test_entries_with_foreign_paths_are_dropped_and_forged_session_ids_replaced() -> None:
    tasks, own = Tasks("test"), new_session_id()
    store, mirror = _mirror(own, tasks)
    port = TranscriptPort()
    early: Any = {"n": "early", "sessionId": new_session_id()}
    await port.append({"project_key": "any", "session_id": own}, [early])
    await port.attach(mirror)
    for path in ("../../etc", "/etc/passwd", "a//b", "x" * 5000, "a\n"):
        odd: Any = {"n": "odd"}
        await port.append({"project_key": "any", "session_id": own, "subpath": path}, [odd])
    assert await mirror.wait_until_stored(30)
    assert [json.loads(entry.line) for entry in store.entries] == [{"n": "early", "sessionId": own}]
    await tasks.close()


async def test_a_turns_end_sends_the_queue_in_one_request_and_returns_the_turns_usage() -> None:
    tasks, own = Tasks("test"), new_session_id()
    store, mirror = _mirror(own, tasks)
    key: Any = {"project_key": "any", "session_id": own}
    for name in ("prompt", "answer"):
        await mirror.append(key, [{"type": name}])
    assert await mirror.conclude(3, 30) == (True, Usage(input_tokens=7))
    assert store.batches == [(2, 3)]
    assert await mirror.conclude(4, 30) == (True, None), "nothing was queued, so no request was sent"
    await mirror.append(key, [{"type": "late"}])
    async with asyncio.timeout(30):
        while not mirror.is_stored:  # it is sent without a turn's end, a little later
            await asyncio.sleep(0.005)
    assert store.batches == [(2, 3), (1, None)]
    await tasks.close()


async def test_a_turns_end_is_stored_with_the_last_of_its_transcript_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transcript_mirror, "_BATCH_ENTRIES", 1)
    tasks, own = Tasks("test"), new_session_id()
    store, mirror = _mirror(own, tasks)
    end = EventEntry(generation=1, sequence=2, name="result", data="{}")
    for name in ("prompt", "answer"):
        await mirror.append({"project_key": "any", "session_id": own}, [{"type": name}])
    assert await mirror.conclude(3, 30, end=end) == (True, Usage(input_tokens=7))
    assert (store.batches, store.events, store.entries_before_events) == ([(1, None), (1, 3)], [end], [2])
    assert await mirror.conclude(4, 30, end=end) == (True, Usage(input_tokens=7)), "also when nothing else is queued"
    store.is_up = False
    await mirror.append({"project_key": "any", "session_id": own}, [{"type": "later"}])
    assert await mirror.conclude(5, 0.01, end=end) == (False, None)
    store.is_up = True
    assert await mirror.wait_until_stored(30)
    assert store.events == [end, end], "an end that was not stored in time is withdrawn"
    await tasks.close()


async def test_the_transcript_port_is_a_session_store_except_for_load() -> None:
    """The SDK's conformance suite, with a load that reads back the stored entries.

    Exceptions: the port's own `load` returns None, and project keys are ignored, since a port serves one session. So
    each (project, session) of the suite gets its own mirror.
    """
    tasks = Tasks("test")

    class ReadBack:
        def __init__(self) -> None:
            self.parts: dict[tuple[str, str], tuple[_Store, TranscriptMirror]] = {}

        async def append(self, key: Any, entries: list[Any]) -> None:
            name = (key["project_key"], key["session_id"])
            if name not in self.parts:
                self.parts[name] = _mirror(name[1], tasks)
            await TranscriptPort(self.parts[name][1]).append(key, entries)

        async def load(self, key: Any) -> list[Any] | None:
            part = self.parts.get((key["project_key"], key["session_id"]))
            if part is None:
                return None
            assert await TranscriptPort(part[1]).load(key) is None
            assert await part[1].wait_until_stored(30)
            return [json.loads(e.line) for e in part[0].entries if e.subpath == key.get("subpath", "")] or None

    store: Any = ReadBack
    await run_session_store_conformance(store)
    await tasks.close()
