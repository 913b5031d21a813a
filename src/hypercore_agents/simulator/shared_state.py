"""State that all workers share through one folder: recorded requests and the counts of limited faults.

It uses only files and kernel operations, so one implementation serves one worker and many:

- A record is one line, appended under a lock. A full file becomes the older of two halves, so disk usage stays
  under the limit and the newest requests are always available.
- A count is a file that grows by one byte per call: O_APPEND makes the offset after the write unique.

Rejected: shared memory (records vary in length), SQLite (a transaction per request under load).
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class SharedState:
    """One worker's access to the shared folder. `most_bytes` limits the disk usage of recorded requests."""

    def __init__(self, directory: Path, most_bytes: int) -> None:
        self._half = most_bytes // 2
        self._newer = directory / "requests.jsonl"
        self._older = directory / "requests.1.jsonl"
        self._counts = directory / "counts"
        self._counts.mkdir(mode=0o700, exist_ok=True)
        self._lock = os.open(directory / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)

    def close(self) -> None:
        """Close the lock. The files remain."""
        os.close(self._lock)

    def count(self, key: str) -> int:
        """Return the number of calls with `key`, including this one; no two calls return the same number."""
        name = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()
        descriptor = os.open(self._counts / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, b".")
            return os.lseek(descriptor, 0, os.SEEK_CUR)
        finally:
            os.close(descriptor)

    def record(self, entry: dict[str, Any]) -> None:
        """Append an entry, without its body if it is larger than half the limit."""
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        if len(line) > self._half:
            line = json.dumps(entry | {"body": None}, separators=(",", ":")).encode() + b"\n"
        with self._locked(), self._newer.open("ab", buffering=0) as file:
            if file.tell() + len(line) > self._half:
                os.replace(self._newer, self._older)
                with self._newer.open("ab", buffering=0) as fresh:
                    fresh.write(line)
            else:
                file.write(line)

    def read(self, limit: int, session_id: str | None = None) -> list[dict[str, Any]]:
        """Return the last `limit` entries, newest last; with `session_id`, only those of that session."""
        with self._locked():
            halves = [path.read_bytes() for path in (self._newer, self._older) if path.exists()]
        needle = session_id.encode() if session_id is not None else b""
        found: list[dict[str, Any]] = []
        for half in halves:
            for line in reversed(half.splitlines()):
                if needle in line:
                    entry: dict[str, Any] = json.loads(line)
                    if session_id is None or entry["session_id"] == session_id:
                        found.append(entry)
                if len(found) == limit:
                    return found[::-1]
        return found[::-1]

    def clear(self) -> None:
        """Delete all records and counts."""
        with self._locked():
            for path in (self._newer, self._older, *self._counts.iterdir()):
                path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
