"""The transcript's mirror beside the SDK's own contract, and against what a forging tool may make its CLI say."""

import asyncio
import json
from typing import Any

import pytest
from claude_agent_sdk.testing import run_session_store_conformance

from hypercore_agents.agent.persistence import transcript
from hypercore_agents.agent.persistence.transcript import TranscriptMirror, TranscriptPort
from hypercore_agents.api.chat import Usage
from hypercore_agents.api.errors import Unavailable
from hypercore_agents.api.ids import new_session_id
from hypercore_agents.api.internal import EventEntry, TranscriptEntry
from hypercore_agents.kit.aio.tasks import Tasks


class _Kept:
    """A gateway that keeps what it is told."""

    def __init__(self) -> None:
        self.entries: list[TranscriptEntry] = []
        self.batches: list[tuple[int, int | None]] = []
        self.events: list[EventEntry] = []
        self.before_events: list[int] = []
        self.works = True

    async def append_transcript(
        self,
        session_id: str,
        generation: int,
        entries: list[TranscriptEntry],
        events: list[EventEntry],
        *,
        turn: int | None = None,
    ) -> Usage | None:
        if not self.works:
            raise Unavailable("not now")
        self.batches.append((len(entries), turn))
        self.entries += entries
        if events:
            self.before_events.append(len(self.entries))
        self.events += events
        return None if turn is None else Usage(input_tokens=7)


def _mirror(session_id: str, tasks: Tasks) -> tuple[_Kept, TranscriptMirror]:
    kept = _Kept()
    gateway: Any = kept
    return kept, TranscriptMirror(session_id, 1, gateway, tasks, on_stale=lambda: None, on_lost=lambda: None)


async def test_odd_paths_are_dropped_and_the_session_is_the_servers_whatever_an_entry_says() -> None:
    tasks, own = Tasks("test"), new_session_id()
    kept, mirror = _mirror(own, tasks)
    port = TranscriptPort()
    early: Any = {"n": "early", "sessionId": new_session_id()}
    await port.append({"project_key": "any", "session_id": own}, [early])
    await port.give(mirror)
    for path in ("../../etc", "/etc/passwd", "a//b", "x" * 5000, "a\n"):
        odd: Any = {"n": "odd"}
        await port.append({"project_key": "any", "session_id": own, "subpath": path}, [odd])
    assert await mirror.settled(30)
    assert [json.loads(entry.line) for entry in kept.entries] == [{"n": "early", "sessionId": own}]
    await tasks.close()


async def test_a_turns_end_sends_all_that_waits_in_one_request_and_hears_with_it_what_the_turn_cost() -> None:
    tasks, own = Tasks("test"), new_session_id()
    kept, mirror = _mirror(own, tasks)
    key: Any = {"project_key": "any", "session_id": own}
    for name in ("prompt", "answer"):
        await mirror.append(key, [{"type": name}])
    assert await mirror.conclude(3, 30) == (True, Usage(input_tokens=7))
    assert kept.batches == [(2, 3)]
    assert await mirror.conclude(4, 30) == (True, None), "nothing waited, so nothing was asked"
    await mirror.append(key, [{"type": "late"}])
    async with asyncio.timeout(30):
        while not mirror.kept:  # what no turn's end hurries goes by itself
            await asyncio.sleep(0.005)
    assert kept.batches == [(2, 3), (1, None)]
    await tasks.close()


async def test_a_turns_end_is_stored_with_the_last_of_its_transcript_and_never_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transcript, "_BATCH_ENTRIES", 1)
    tasks, own = Tasks("test"), new_session_id()
    kept, mirror = _mirror(own, tasks)
    end = EventEntry(generation=1, sequence=2, name="result", data="{}")
    for name in ("prompt", "answer"):
        await mirror.append({"project_key": "any", "session_id": own}, [{"type": name}])
    assert await mirror.conclude(3, 30, end=end) == (True, Usage(input_tokens=7))
    assert (kept.batches, kept.events, kept.before_events) == ([(1, None), (1, 3)], [end], [2])
    assert await mirror.conclude(4, 30, end=end) == (True, Usage(input_tokens=7)), "also where nothing else waited"
    kept.works = False
    await mirror.append({"project_key": "any", "session_id": own}, [{"type": "later"}])
    assert await mirror.conclude(5, 0.01, end=end) == (False, None)
    kept.works = True
    assert await mirror.settled(30)
    assert kept.events == [end, end], "what was not kept in time is not said to be"
    await tasks.close()


async def test_the_port_is_a_session_store_but_for_its_load() -> None:
    """The SDK's conformance suite, with a load that reads back what was sent.

    Exceptions: our own `load` says None, and project keys are not kept apart, since a transcript is one session's; so
    each (project, session) of the suite gets a mirror of its own.
    """
    tasks = Tasks("test")

    class ReadBack:
        def __init__(self) -> None:
            self.parts: dict[tuple[str, str], tuple[_Kept, TranscriptMirror]] = {}

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
            assert await part[1].settled(30)
            return [json.loads(e.line) for e in part[0].entries if e.subpath == key.get("subpath", "")] or None

    store: Any = ReadBack
    await run_session_store_conformance(store)
    await tasks.close()
