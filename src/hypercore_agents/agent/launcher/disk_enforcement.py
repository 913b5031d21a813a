"""Enforces sessions' disk limits where only a scan measures them (`disk_scan`)."""

from __future__ import annotations

import json
import os
import selectors

from hypercore_agents.agent.launcher.disk_scan import DiskScan, measure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from hypercore_agents.agent.launcher.workers import Workers


class DiskEnforcement:
    """Scans the folders of running sessions in a worker. Calls `exceeded` with each session to kill, and the reason."""

    def __init__(
        self,
        root: str,
        limit_mb: int,
        file_limit: int,
        *,
        selector: selectors.BaseSelector,
        workers: Workers,
        exceeded: Callable[[str, str], None],
    ) -> None:
        self._root = root
        self._scan = DiskScan(root, limit_mb, file_limit)
        self._selector = selector
        self._workers = workers
        self._exceeded = exceeded
        self._scanning = False
        self._output = b""

    def scan_if_due(self, running: Collection[str]) -> None:
        """Start a scan of these sessions if one is due and none is under way."""
        if self._scanning or not running or not self._scan.due():
            return
        folders = {session: os.path.join(self._root, session) for session in running}
        limits = self._scan.byte_limit, self._scan.file_limit
        reader, writer = os.pipe()
        self._workers.start(
            lambda: measure(folders, limits, writer), lambda _: None, purpose="scan sessions' folders", keep=(writer,)
        )
        os.close(writer)
        self._scanning, self._output = True, b""
        self._selector.register(reader, selectors.EVENT_READ, lambda: self._read_sizes(reader))

    def _read_sizes(self, reader: int) -> None:
        data = os.read(reader, 65536)
        self._output += data
        if data:
            return
        self._selector.unregister(reader)
        os.close(reader)
        self._scanning = False
        try:
            sizes = json.loads(self._output)
        except ValueError:  # the worker failed, and logged why
            return
        for session, reason in self._scan.over_limit(sizes).items():
            self._exceeded(session, reason)
