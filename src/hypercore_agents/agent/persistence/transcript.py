"""The transcript of a session, as the Claude CLI sees it: the Agent SDK's session store, and the files for a resume.

`TranscriptPort` is the session store of the Agent SDK; it passes entries on to the session's mirror
(`transcript_mirror.py`), which stores them outside the agent. Its `load` always returns nothing: for a resume the
server writes the files itself, as the session's user (`restore`). The SDK's own restore fails under another user.
"""

import json
import os

from claude_agent_sdk.types import SessionKey, SessionStoreEntry

from hypercore_agents.agent.isolation.backends import Isolation
from hypercore_agents.agent.isolation.workspace import SessionFolder
from hypercore_agents.agent.persistence.transcript_mirror import TranscriptMirror
from hypercore_agents.api.internal import Transcript

_EARLY_LIMIT = 100
"""Maximum number of appends that are retained until the CLI has a session."""


class TranscriptPort:
    """The session store of one CLI. A prewarmed CLI has no session: its entries are retained until `attach`."""

    def __init__(self, mirror: TranscriptMirror | None = None) -> None:
        self._mirror = mirror
        self._used = False
        self._early: list[tuple[SessionKey, list[SessionStoreEntry]]] = []

    async def attach(self, mirror: TranscriptMirror) -> None:
        """Pass entries on to this mirror from now on, and the retained ones first."""
        self._mirror = mirror
        early, self._early = self._early, []
        for key, entries in early:
            await mirror.append(key, entries)

    def detach(self) -> bool:
        """Pass on no more entries; return whether there were none so far, so that another session can take the CLI."""
        self._mirror = None
        return not self._used

    async def append(self, key: SessionKey, entries: list[SessionStoreEntry]) -> None:
        """Pass entries on."""
        self._used = True
        if self._mirror is not None:
            await self._mirror.append(key, entries)
        elif len(self._early) < _EARLY_LIMIT:
            self._early.append((key, entries))

    async def load(self, key: SessionKey) -> list[SessionStoreEntry] | None:
        """Return None: the server has written the transcript to the path that the CLI reads."""
        return None


async def restore(transcript: Transcript, folder: SessionFolder, isolation: Isolation) -> int:
    """Write a transcript to the path that the CLI reads, as the session's user; return how many entries were left out.

    A damaged entry and everything after it in the same file are left out. Raises OSError.
    """
    files: dict[str, list[str]] = {}
    damaged: dict[str, int] = {}
    for entry in transcript.entries:
        if entry.subpath in damaged or not _is_object(entry.line):
            damaged[entry.subpath] = damaged.get(entry.subpath, 0) + 1
        else:
            files.setdefault(entry.subpath, []).append(entry.line)
    main = folder.root / folder.transcript
    for subpath, lines in files.items():
        target = main.with_suffix("") / f"{subpath}.jsonl" if subpath else main
        await _write(isolation, folder, str(target), "".join(f"{line}\n" for line in lines).encode())
    return sum(damaged.values())


async def _write(isolation: Isolation, folder: SessionFolder, path: str, content: bytes) -> None:
    source = os.memfd_create("transcript", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(source), "wb") as file:
            file.write(content)
        os.lseek(source, 0, os.SEEK_SET)
        script = 'umask 077 && mkdir -p "$(dirname "$1")" && cat >"$1"'
        status = await isolation.run_as(folder, ["sh", "-c", script, "sh", path], stdin=source)
    finally:
        os.close(source)
    if status != 0:
        raise OSError(f"a transcript could not be written (status {status})")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
