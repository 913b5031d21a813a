"""Counters over all workers, in a memory-mapped file with one row of integers per worker.

A worker writes only its own row, so no lock is needed; readers add up the rows. The peak of concurrently open streams
over all workers is updated whenever a worker opens a stream.
"""

import mmap
from pathlib import Path

_COLUMNS = ("open_streams", "requests", "tokens", "faults", "peak_streams")
_OPEN, _REQUESTS, _TOKENS, _FAULTS, _PEAK = range(len(_COLUMNS))


class Counts:
    """The counters, written by the worker with index `worker` of `workers`."""

    def __init__(self, directory: Path, worker: int, workers: int) -> None:
        self._workers = workers
        self._first = worker * len(_COLUMNS)
        size = workers * len(_COLUMNS) * 8
        with (directory / "counts.bin").open("a+b") as file:
            if file.tell() < size:
                file.truncate(size)
            self._map = mmap.mmap(file.fileno(), size)
        self._rows = memoryview(self._map).cast("q")
        self._rows[self._first + _OPEN] = 0  # the streams of the row's previous worker ended with it

    def close(self) -> None:
        """Release the mapping."""
        self._rows.release()
        self._map.close()

    def request(self) -> None:
        """Count a request for a message."""
        self._rows[self._first + _REQUESTS] += 1

    def fault(self) -> None:
        """Count an injected fault."""
        self._rows[self._first + _FAULTS] += 1

    def tokens(self, count: int) -> None:
        """Count sent tokens."""
        self._rows[self._first + _TOKENS] += count

    def opened(self) -> None:
        """Count a stream as open."""
        self._rows[self._first + _OPEN] += 1
        total = self._sum(_OPEN)
        if total > self._rows[self._first + _PEAK]:
            self._rows[self._first + _PEAK] = total

    def closed(self) -> None:
        """Count a stream as closed."""
        self._rows[self._first + _OPEN] -= 1

    def totals(self) -> dict[str, int]:
        """Return every counter summed over all workers, and the number of workers."""
        totals = {name: self._sum(column) for column, name in enumerate(_COLUMNS)}
        totals["peak_streams"] = max(self._rows[_PEAK :: len(_COLUMNS)])
        return totals | {"workers": self._workers}

    def _sum(self, column: int) -> int:
        return sum(self._rows[column :: len(_COLUMNS)])
