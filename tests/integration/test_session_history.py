"""A session's history: read from the end of its transcript, on both stores, and over HTTP."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hypercore_agents.api.history import TEXT_LIMIT, TOOL_LIMIT, TOOLS_LIMIT
from hypercore_agents.api.ids import new_session_id
from hypercore_agents.manager.sessions import history
from hypercore_agents.manager.sessions.history import Histories, message_of
from hypercore_agents.store import transcripts
from hypercore_agents.store.database import Database
from hypercore_agents.store.transcripts import EntryRow
from support.manager_server import deployed


def entry(role: str, content: Any, **more: Any) -> str:
    return json.dumps({"type": role, "message": {"role": role, "content": content}, **more})


CALL = {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {"command": "ls"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "note.txt"}]}
CONVERSATION = [
    '{"type":"queue-operation","operation":"enqueue"}',
    entry("user", "what is here?", timestamp="2026-01-02T03:04:05.678Z"),
    entry("user", "a note of the CLI's", isMeta=True),
    entry("assistant", [{"type": "thinking", "thinking": "hm"}]),
    entry("assistant", [{"type": "text", "text": "I look."}]),
    entry("assistant", [CALL]),
    entry("assistant", "a subagent's", isSidechain=True),
    entry("user", [RESULT]),
    '{"type":"summary","summary":"looked"}',
    entry("user", "what came before, in short", isCompactSummary=True),
    "no JSON",
    entry("assistant", [{"type": "text", "text": "A note."}]),
    '{"type":"last-prompt"}',
]


async def store(database: Database, session_id: str, lines: Sequence[str], subpath: str = "") -> None:
    rows = [EntryRow(subpath, f"{subpath}{number}", line) for number, line in enumerate(lines)]
    async with database.write() as connection:
        await transcripts.append(connection, session_id, rows)


async def test_the_history_contains_only_messages_of_user_and_model(database: Database) -> None:
    session_id, other = new_session_id(), new_session_id()
    await store(database, other, [entry("user", "of another session")])
    await store(database, session_id, CONVERSATION[:6])
    await store(database, session_id, [entry("user", "of a subagent")], "subagents/agent-1")
    await store(database, session_id, CONVERSATION)
    messages, more = await Histories(database).read(session_id, 20, None)
    assert [(m.role, m.text) for m in messages] == [
        ("user", "what is here?"), ("assistant", "I look."), ("assistant", ""), ("user", ""), ("assistant", "A note."),
    ]  # fmt: skip
    assert messages[0].at is not None
    assert messages[0].at.startswith("2026-01-02T03:04:05")
    assert [(call.id, call.name, call.input) for call in messages[2].tool_uses] == [
        ("toolu_1", "Bash", '{"command": "ls"}')
    ]
    assert [(r.id, r.text, r.error) for r in messages[3].tool_results] == [("toolu_1", "note.txt", False)]
    assert more is None
    assert await Histories(database).read(session_id, 0, None) == ([], None)
    assert await Histories(database).read(new_session_id(), 20, None) == ([], None)


@pytest.mark.parametrize("bounds", ["pages of few entries", "pages of few characters", "a short scan"])
async def test_pages_of_history_have_no_gaps_or_repetitions(
    database: Database, bounds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bounds == "pages of few entries":
        monkeypatch.setattr(transcripts, "BACK_ENTRIES", 3)
    elif bounds == "pages of few characters":
        monkeypatch.setattr(transcripts, "BACK_CHARACTERS", 100)  # a single line is longer, and is still returned
    else:
        monkeypatch.setattr(transcripts, "BACK_ENTRIES", 2)
        monkeypatch.setattr(history, "SCAN_ENTRIES", 2)
    session_id = new_session_id()
    texts = [f"message {number} {'x' * 60}" for number in range(23)]
    for number, text in enumerate(texts):
        row = EntryRow("", f"m{number}", entry("user", text))
        async with database.write() as connection:
            await transcripts.append(connection, session_id, [row])
            if number % 4 == 0:  # entries that are not messages between them, so a page may be short
                rows = [EntryRow("", f"n{number}.{n}", '{"type":"progress"}') for n in range(4)]
                rows += [EntryRow("subagents/agent-1", f"s{number}.{n}", entry("user", "no")) for n in range(4)]
                await transcripts.append(connection, session_id, rows)
    read: list[str] = []
    before = None
    for _ in range(100):
        messages, before = await Histories(database).read(session_id, 5, before)
        assert len(messages) <= 5
        read = [message.text for message in messages] + read
        if before is None:
            break
    assert read == texts


def test_the_interrupt_marker_is_not_in_the_history() -> None:
    for text in ("[Request interrupted by user]", "[Request interrupted by user for tool use]"):
        assert message_of(entry("user", [{"type": "text", "text": text}], promptId="p")) is None
        typed = message_of(entry("user", text, promptId="p", promptSource="sdk"))
        assert typed is not None
        assert typed.text == text, "a user may type exactly that"


def test_long_messages_are_shortened_and_marked() -> None:
    text = message_of(entry("assistant", "y" * (TEXT_LIMIT + 1)))
    assert text is not None
    assert (len(text.text), text.shortened) == (TEXT_LIMIT, True)
    call = {**CALL, "input": {"command": "z" * 5000}}
    many = message_of(entry("assistant", [call] * (TOOLS_LIMIT + 1)))
    assert many is not None
    assert ([len(each.input) for each in many.tool_uses], many.shortened) == ([TOOL_LIMIT] * TOOLS_LIMIT, True)
    short = message_of(entry("assistant", [CALL]))
    assert short is not None
    assert not short.shortened


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("[" * 100_000, None),
        ("1" * 10_000, None),
        ("[]", None),
        ('{"type":"user","message":7}', None),
        (entry("user", 7), None),
        (entry("user", [7, {"type": "text", "text": 7}]), None),
        (entry("user", [{"type": "image", "source": {"data": "AAAA"}}]), "[image]"),
        (entry("user", "\ud800 alone", timestamp="0001-01-01T00:00:00"), "\ufffd alone"),
        (entry("user", "late", timestamp=[]), "late"),
    ],
)
def test_forged_transcript_lines_are_harmless(line: str, text: str | None) -> None:
    message = message_of(line)
    assert (message and message.text) == text
    if message is not None:
        json.loads(message.model_dump_json())


async def test_a_session_returns_its_history_only_to_its_user(tmp_path: Path) -> None:
    async with deployed(tmp_path / "state", min_agents=1) as deployment:
        await deployment.warm(1)
        placed = (await deployment.chat())[1]
        session_id = placed["session_id"]
        path = f"/v1/agent/session/{session_id}"
        assert (await deployment.call("GET", path))[1]["history"] == []
        await store(deployment.database, session_id, CONVERSATION)
        for prefix in ("", f"/agents/{placed['agent_id']}"):
            status, shown = await deployment.call("GET", f"{prefix}{path}", user_id="ada")
            assert (status, shown["turns"], len(shown["history"]), shown["history_next"]) == (200, 1, 5, None)
            status, newest = await deployment.call("GET", f"{prefix}{path}", history="2")
            assert newest["history"] == shown["history"][3:]
            status, older = await deployment.call("GET", f"{prefix}{path}", before=str(newest["history_next"]))
            assert older["history"] == shown["history"][:3]
            assert (await deployment.call("GET", f"{prefix}{path}", user_id="eve"))[0] == 404
            for wrong in ("history=201", "history=-1", "history=x", "before=0", "before=x"):
                assert (await deployment.call("GET", f"{prefix}{path}?{wrong}"))[0] == 400
        assert (await deployment.call("GET", path, history="0"))[1]["history"] == []
        assert (await deployment.call("DELETE", path))[0] == 200
        assert (await deployment.call("GET", path))[0] == 404
