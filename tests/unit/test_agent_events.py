"""The ring of a session's last events: nothing twice, nothing missed without a `reset`."""

import asyncio
import json

from hypercore_agents.agent.persistence import event_ring
from hypercore_agents.agent.persistence.event_ring import EventLog
from hypercore_agents.agent.persistence.journal import Journal
from hypercore_agents.api.errors import NotFound
from hypercore_agents.api.events import Delta, encode, parse_id
from hypercore_agents.api.internal import EventEntry


def fill(log: EventLog, first: int, last: int, generation: int = 1) -> None:
    for number in range(first, last + 1):
        log.add((generation, number), encode(Delta(text="x"), f"{generation}.{number}"))


def ids(frames: bytes) -> list[str]:
    return [line.removeprefix("id: ") for line in frames.decode().splitlines() if line.startswith("id: ")]


def test_what_a_client_has_not_seen_comes_once_and_in_order() -> None:
    log = EventLog()
    assert log.after((1, 7)) == (b"", (1, 7))
    fill(log, 1, 12)
    frames, last = log.after((1, 9))
    assert (ids(frames), last) == (["1.10", "1.11", "1.12"], (1, 12))
    assert log.after(last) == (b"", (1, 12))
    assert len(ids(log.after(None)[0])) == len(ids(log.after((1, 0))[0])) == 12


def test_who_missed_what_is_gone_or_comes_from_another_placement_is_told() -> None:
    log = EventLog()
    fill(log, 1, event_ring.EVENTS + 10)
    frames, _ = log.after((1, 9))
    assert frames.startswith(b"event: reset")
    assert ids(frames)[0] == "1.11"
    assert not log.after((1, 10))[0].startswith(b"event: reset"), "it saw the last that was let go"
    moved = EventLog()
    moved.start = (1, 499)
    fill(moved, 1, 3, generation=2)
    for last in ((1, 500), (2, 4), (3, 1)):
        assert moved.after(last)[0].startswith(b"event: reset"), last
        assert not moved.holds(last)
    assert ids(moved.after((1, 499))[0]) == ["2.1", "2.2", "2.3"], "it saw the last that was before"
    assert moved.holds((1, 499))
    assert moved.holds((2, 3))
    assert not moved.holds(None), "the first of the session's events are not here"
    assert not EventLog().holds(None), "nor is it known what there was before"


def test_who_saw_a_turns_end_in_the_log_before_it_was_said_here_does_not_get_it_again() -> None:
    kept: list[EventEntry] = []
    journal = Journal(1, lambda entry, _: kept.append(entry))
    end = NotFound("over").body("")
    journal.say(Delta(text="x"))
    early = journal.announce(end)
    seen = (early.generation, early.sequence)
    assert (journal.ring.holds(seen), journal.ring.after(seen)) == (True, (b"", seen))
    assert journal.say(end)[0] == "1.2" == f"{early.generation}.{early.sequence}"
    assert kept[-1] == early
    assert journal.ring.after(seen) == (b"", seen)
    journal.announce(end)
    assert journal.say(Delta(text="late"))[0] == "1.4", "1.3 may be in the store"


def test_a_text_longer_than_the_ring_is_in_the_log_before_the_ring_lets_go_of_it() -> None:
    kept: list[EventEntry] = []
    journal = Journal(1, lambda entry, _: kept.append(entry))
    for _ in range(2 * event_ring.EVENTS + 7):
        journal.say(Delta(text="x"))
        start = journal.ring.start
        assert start is None or start <= (kept[-1].generation, kept[-1].sequence)
    journal.flush()
    assert sum(len(json.loads(entry.data)["text"]) for entry in kept) == 2 * event_ring.EVENTS + 7
    assert {entry.name for entry in kept} == {"text"}
    kept.clear()
    journal.say(Delta(text="x" * (event_ring.SIZE + 1)))
    assert len(kept) == 1


def test_what_is_no_id_of_ours_counts_as_none() -> None:
    assert parse_id("2.17") == (2, 17)
    for text in (None, "", "7", "a.b", "1.", ".1", "1.2.3", "-1.2", "1.9999999999999", "\u0661.1"):
        assert parse_id(text) is None, text


async def test_who_follows_gets_events_as_they_come_and_goes_with_the_session() -> None:
    log = EventLog()
    fill(log, 1, 2)
    heard: list[str] = []

    async def follow() -> None:
        async for frames in log.follow((1, 1), silence=60):
            heard.extend(ids(frames))

    following = asyncio.create_task(follow())
    await asyncio.sleep(0)
    fill(log, 3, 4)
    log.close()
    await asyncio.wait_for(following, 30)
    assert heard == ["1.2", "1.3", "1.4"]
