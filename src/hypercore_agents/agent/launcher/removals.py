"""Removal of sessions: once no process of a session is left, a worker deletes its folder."""

from __future__ import annotations

from hypercore_agents.agent.launcher.protocol import send_reply

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from hypercore_agents.agent.launcher.folders import Folders
    from hypercore_agents.agent.launcher.workers import Workers


class Removals:
    """The sessions that are being removed; the launcher refuses other requests for them."""

    def __init__(self, folders: Folders, workers: Workers) -> None:
        self._folders = folders
        self._workers = workers
        self._reply_sockets: dict[str, socket.socket] = {}

    def __contains__(self, session: str) -> bool:
        return session in self._reply_sockets

    def request(self, session: str, reply_socket: socket.socket) -> None:
        """Record a request; call `start` once the session has no processes."""
        self._reply_sockets[session] = reply_socket

    def start(self, session: str) -> None:
        """Delete the session's folder in a worker, then reply."""
        self._workers.start(
            lambda: self._folders.remove(session),
            lambda succeeded: self._ended(session, succeeded),
            purpose=f"remove {session}",
        )

    def _ended(self, session: str, succeeded: bool) -> None:
        if succeeded:
            self._folders.forget(session)
        with self._reply_sockets.pop(session) as reply_socket:
            send_reply(
                reply_socket,
                {"removed": True} if succeeded else {"error": "the session's folder could not be removed completely"},
            )
