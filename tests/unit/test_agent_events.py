"""The event ring: no event is sent twice, and none is missed without a `reset`."""

import asyncio
import json

from hypercore_agents.agent.persistence import event_ring
from hypercore_agents.agent.persistence.event_ring import EventRing
from hypercore_agents.agent.persistence.journal import Journal
from hypercore_agents.api.errors import NotFound
from hypercore_agents.api.events import Delta, encode, parse_id
from hypercore_agents.api.internal import EventEntry


def fill(ring: EventRing, first: int, last: int, generation: int = 1) -> None:
    for number in range(first, last + 1):
        ring.add((generation, number), encode(Delta(text="x"), f"{generation}.{number}"))


def ids(frames: bytes) -> list[str]:
    return [line.removeprefix("id: ") for line in frames.decode().splitlines() if line.startswith("id: ")]


def test_unseen_events_come_once_and_in_order() -> None:
    ring = EventRing()
    assert ring.after((1, 7)) == (b"", (1, 7))
    fill(ring, 1, 12)
    frames, last = ring.after((1, 9))
    assert (ids(frames), last) == (["1.10", "1.11", "1.12"], (1, 12))
    assert ring.after(last) == (b"", (1, 12))
    assert len(ids(ring.after(None)[0])) == len(ids(ring.after((1, 0))[0])) == 12


def test_a_client_that_missed_events_gets_a_reset_first() -> None:
    ring = EventRing()
    fill(ring, 1, event_ring.EVENTS + 10)
    frames, _ = ring.after((1, 9))
    assert frames.startswith(b"event: reset")
    assert ids(frames)[0] == "1.11"
    assert not ring.after((1, 10))[0].startswith(b"event: reset"), "it saw the last event that the ring dropped"
    moved = EventRing()
    moved.start = (1, 499)
    fill(moved, 1, 3, generation=2)
    for last in ((1, 500), (2, 4), (3, 1)):
        assert moved.after(last)[0].startswith(b"event: reset"), last
        assert not moved.holds(last)
    assert ids(moved.after((1, 499))[0]) == ["2.1", "2.2", "2.3"], "it saw the last event before the session came here"
    assert moved.holds((1, 499))
    assert moved.holds((2, 3))
    assert not moved.holds(None), "the session's first events are not here"
    assert not EventRing().holds(None), "an empty ring has no start"


def test_a_turns_end_that_was_read_in_the_log_is_not_streamed_again() -> None:
    logged: list[EventEntry] = []
    journal = Journal(1, lambda entry, _: logged.append(entry))
    end = NotFound("over").body("")
    journal.publish(Delta(text="x"))
    early = journal.announce(end)
    seen = (early.generation, early.sequence)
    assert (journal.ring.holds(seen), journal.ring.after(seen)) == (True, (b"", seen))
    assert journal.publish(end)[0] == "1.2" == f"{early.generation}.{early.sequence}"
    assert logged[-1] == early
    assert journal.ring.after(seen) == (b"", seen)
    journal.announce(end)
    assert journal.publish(Delta(text="late"))[0] == "1.4", "1.3 may be in the store"


def test_a_long_text_is_logged_before_the_ring_drops_it() -> None:
    logged: list[EventEntry] = []
    journal = Journal(1, lambda entry, _: logged.append(entry))
    for _ in range(2 * event_ring.EVENTS + 7):
        journal.publish(Delta(text="x"))
        start = journal.ring.start
        assert start is None or start <= (logged[-1].generation, logged[-1].sequence)
    journal.flush()
    assert sum(len(json.loads(entry.data)["text"]) for entry in logged) == 2 * event_ring.EVENTS + 7
    assert {entry.name for entry in logged} == {"text"}
    logged.clear()
    journal.publish(Delta(text="x" * (event_ring.SIZE + 1)))
    assert len(logged) == 1


def test_malformed_event_ids_count_as_none() -> None:
    assert parse_id("2.17") == (2, 17)
    for text in (None, "", "7", "a.b", "1.", ".1", "1.2.3", "-1.2", "1.9999999999999", "\u0661.1"):
        assert parse_id(text) is None, text


async def test_a_follower_gets_events_as_they_come_until_the_session_leaves() -> None:
    ring = EventRing()
    fill(ring, 1, 2)
    received: list[str] = []

    async def follow() -> None:
        async for frames in ring.follow((1, 1), keepalive_seconds=60):
            received.extend(ids(frames))

    following = asyncio.create_task(follow())
    await asyncio.sleep(0)
    fill(ring, 3, 4)
    ring.close()
    await asyncio.wait_for(following, 30)
    assert received == ["1.2", "1.3", "1.4"]
