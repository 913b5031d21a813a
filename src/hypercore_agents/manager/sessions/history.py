"""Reads the messages of a conversation from its transcript, which the Claude CLI writes.

Transcripts are large and most entries are not messages, so a transcript is read from its end in pages, and one request
reads a limited amount. No entry is trusted: a tool may have written any of it.
"""

import asyncio
import json
from datetime import datetime
from typing import Any, Literal

from hypercore_agents.api.history import (
    TEXT_LIMIT,
    TOOL_LIMIT,
    TOOLS_LIMIT,
    HistoryMessage,
    ToolCall,
    ToolOutcome,
)
from hypercore_agents.api.text import replace_lone_surrogates
from hypercore_agents.manager.fleet.agents import iso
from hypercore_agents.store import transcripts
from hypercore_agents.store.database import Database

SCAN_ENTRIES, SCAN_CHARACTERS = 2000, 16 * 1024 * 1024
"""Maximum amount of a transcript that one request reads. The next request continues with older entries."""
_HIDDEN = ("isSidechain", "isMeta", "isCompactSummary", "isVisibleInTranscriptOnly", "teamName")
"""Fields that mark entries which are not part of the conversation: subagents, the CLI's notes, summaries."""
_INTERRUPTED = ("[Request interrupted by user]", "[Request interrupted by user for tool use]")
"""Texts that the CLI writes in the user's name after an interrupt."""
_NAME_LIMIT = 200


class Histories:
    """Reads conversations, a few at a time: each read holds a page of a transcript in memory."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._readers = asyncio.Semaphore(4)

    async def read(self, session_id: str, count: int, before: int | None) -> tuple[list[HistoryMessage], int | None]:
        """Return up to `count` messages before an entry, newest last, and the entry before which there may be more."""
        found: list[HistoryMessage] = []
        entries = characters = 0
        async with self._readers:
            while count:
                async with self._database.read() as connection:
                    page = await transcripts.load_back(connection, session_id, before=before)
                # Parsing megabytes of JSON would block the event loop.
                messages = await asyncio.to_thread(_messages, page.entries, count - len(found))
                found += [message for _, message in messages]
                if len(found) == count:
                    # Only a read can find out whether older entries are messages, so the next page may be empty.
                    oldest = messages[-1][0]
                    return found[::-1], oldest if page.next or oldest != page.entries[-1].entry_id else None
                before = page.next
                entries += len(page.entries)
                characters += sum(len(entry.line) for entry in page.entries)
                if before is None or entries >= SCAN_ENTRIES or characters >= SCAN_CHARACTERS:
                    break
        return found[::-1], before


def _messages(entries: list[transcripts.Backward], count: int) -> list[tuple[int, HistoryMessage]]:
    found: list[tuple[int, HistoryMessage]] = []
    for entry in entries:
        if len(found) == count:
            break
        message = message_of(entry.line)
        if message is not None:
            found.append((entry.entry_id, message))
    return found


def message_of(line: str) -> HistoryMessage | None:
    """Return an entry of a transcript as a message. None: it is not a message, or it is malformed."""
    try:
        entry = replace_lone_surrogates(json.loads(line))
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or any(entry.get(mark) for mark in _HIDDEN):
        return None
    role = entry.get("type")
    body = entry.get("message")
    if role not in ("user", "assistant") or not isinstance(body, dict):
        return None
    if body.get("model") == "<synthetic>" and not entry.get("isApiErrorMessage"):
        return None  # the CLI's placeholder, such as "No response requested."
    content = body.get("content")
    if role == "user" and entry.get("promptSource") is None and _is_marker(content):
        return None
    return _MessageReader(role).read(content, entry.get("timestamp"))


def _is_marker(content: Any) -> bool:
    blocks = _blocks(content)
    return bool(blocks) and all(block.get("type") == "text" and block.get("text") in _INTERRUPTED for block in blocks)


class _MessageReader:
    def __init__(self, role: Literal["user", "assistant"]) -> None:
        self._message = HistoryMessage(role=role)

    def read(self, content: Any, timestamp: Any) -> HistoryMessage | None:
        message = self._message
        texts: list[str] = []
        for block in _blocks(content):
            kind = block.get("type")
            if kind == "text" and isinstance(block.get("text"), str):
                texts.append(block["text"])
            elif kind in ("image", "document"):
                texts.append(f"[{kind}]")
            elif kind == "tool_use" and self._has_capacity(message.tool_uses):
                name, given = self._cut(block.get("name"), _NAME_LIMIT), self._json(block.get("input"))
                message.tool_uses.append(ToolCall(id=self._cut(block.get("id"), _NAME_LIMIT), name=name, input=given))
            elif kind == "tool_result" and self._has_capacity(message.tool_results):
                text = self._cut("\n".join(_text_of(inner) for inner in _blocks(block.get("content"))), TOOL_LIMIT)
                name = self._cut(block.get("tool_use_id"), _NAME_LIMIT)
                message.tool_results.append(ToolOutcome(id=name, text=text, error=block.get("is_error") is True))
        message.text = self._cut("\n".join(texts), TEXT_LIMIT)
        message.at = _time(timestamp)
        return message if message.text or message.tool_uses or message.tool_results else None

    def _has_capacity(self, tools: list[Any]) -> bool:
        if len(tools) < TOOLS_LIMIT:
            return True
        self._message.shortened = True
        return False

    def _json(self, value: Any) -> str:
        try:
            return self._cut(json.dumps(value, ensure_ascii=False), TOOL_LIMIT)
        except (ValueError, RecursionError):
            self._message.shortened = True
            return ""

    def _cut(self, value: Any, limit: int) -> str:
        text = value if isinstance(value, str) else ""
        if len(text) > limit:
            self._message.shortened = True
            text = text[:limit]
        return text


def _blocks(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [block for block in content if isinstance(block, dict)] if isinstance(content, list) else []


def _text_of(block: dict[str, Any]) -> str:
    text = block.get("text")
    return text if isinstance(text, str) else f"[{block.get('type')}]"


def _time(timestamp: Any) -> str | None:
    try:
        return iso(datetime.fromisoformat(timestamp).timestamp())
    except (TypeError, ValueError, OverflowError, OSError):
        return None
