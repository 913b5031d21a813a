"""The protocol between agent server and launcher: JSON messages with file descriptors.

One SOCK_SEQPACKET socket, inherited by the server, carries requests. A request is one datagram without content that
carries descriptors: the reply socket (SOCK_SEQPACKET, the client's), a memfd with the request, and for `run` the
process's standard input, output and error. Closing the reply socket ends the request: for `run` it kills the process
and its whole pid namespace, so a server that dies leaves nothing behind.

    run     session, argv, environment, cwd, files, network, user, share → {"started": pid} (+ listening socket), then
            {"exited": n}
    assign  session, user, share → {"assigned": true}: its processes count against this user's share from now on
    limits  session → {}, with the limit that it reached since the last such request
    pack    session, user, share → as `run`, only for `pack_command`, which reads files regardless of their mode
    files   session, work, user, share → as `run`, for `workspace_files.work_on`
    look    session, path → {"exists": bool, "size": n}
    usage   session → {"method": ...} and, where the kernel counts, usage and limits (`storage.Usage`)
    remove  session → {"removed": true}: its processes have ended and its folder is removed

or {"error": text} at any point; "full" beside it names the full resource. `user` is any name that stands for the
session's user, `share` the part of the agent's memory and processes that this user's sessions may use together. If a
limit ended a process or kept it from starting, the reply has "limit": [kind, text].

Rejected: a named socket (a path that a session might reach); requests in the datagram itself (a command line may be
longer than the largest message of a local socket).
"""

from __future__ import annotations

import array
import json
import os
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FD_VARIABLE = "AGENT_LAUNCHER_FD"
"""The variable that holds the descriptor of the server's end of the socket."""

DISK_VARIABLE = "AGENT_SESSION_DISK"
"""The variable that describes how sessions' files are limited (`storage.describe`)."""

FOLDER = "/session"
"""The path of a session's folder in its view: the same in every agent, so transcripts and workspaces can move."""

SERVER_FOLDER = "/agent"
"""The path of the server's folder in its view."""

CLI = "/opt/claude-code/claude"
"""The path of the Claude CLI in a session's view."""

MODEL_ADDRESS = ("127.0.0.1", 8090)
"""The address of the model routes in a session: the only one that leads out of its network namespace."""

_SAVED = ("config/projects", "config/plans", "config/tasks", "config/todos")
"""Files that the Claude CLI saves beside the transcript and a conversation refers to by path: long tool results, plans,
task lists."""


def pack_command(folder: str) -> tuple[str, ...]:
    """Return the command that writes a session's files as a tar stream; its working directory is the workspace.

    Workspace members are named `./...`, the CLI's saved files `config/...`. Transcripts (`*.jsonl`) are left out: the
    store holds them. An `--exclude` applies to the names after it. Standard error names the files that cannot be read.
    """
    return (
        "tar", "--create", "--file=-", "--format=gnu", "--sort=name", "--numeric-owner", "--owner=0", "--group=0",
        "--sparse", "--one-file-system", "--ignore-failed-read", "--warning=none", "--warning=failed-read",
        f"--exclude=.incoming.{'[0-9a-f]' * 16}", ".",
        f"--directory={folder}", "--exclude=config/projects/*.jsonl", *_SAVED,
    )  # fmt: skip


PACK_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}

REQUEST_BYTES = 64 << 20
_REPLY_BYTES = 16 << 10
_DESCRIPTORS = 5


class MalformedRequest(Exception):
    """The server sent something that is not a request."""


def send_request(channel: socket.socket, request: dict[str, Any], descriptors: list[int]) -> None:
    """Send a request; the first descriptor is the reply socket. Raises OSError."""
    payload = os.memfd_create("request", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(payload), "wb") as file:
            file.write(json.dumps(request).encode())
        socket.send_fds(channel, [b"r"], [descriptors[0], payload, *descriptors[1:]])
    finally:
        os.close(payload)


def receive_request(channel: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Return the next request and its descriptors (without the memfd), None if the server has closed the socket.

    Raises MalformedRequest; then no descriptor is left open.
    """
    data, ancillary, _, _ = channel.recvmsg(16, socket.CMSG_SPACE(_DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC)
    descriptors = _descriptors(ancillary)
    if not data and not descriptors:
        return None
    try:
        if len(descriptors) < 2:
            raise MalformedRequest("a request needs at least two descriptors")
        payload = descriptors.pop(1)
        try:
            size = os.fstat(payload).st_size
            if not 0 < size <= REQUEST_BYTES:
                raise MalformedRequest("a request must be 1 byte to 64 MB")
            request = json.loads(os.pread(payload, size, 0))
        finally:
            os.close(payload)
        if not isinstance(request, dict):
            raise MalformedRequest("a request must be an object")
        return request, descriptors
    except (MalformedRequest, OSError, ValueError) as error:
        for descriptor in descriptors:
            os.close(descriptor)
        raise MalformedRequest(str(error)) from None


def send_reply(channel: socket.socket, reply: dict[str, Any], descriptors: list[int] | None = None) -> None:
    """Send a reply; drop it if the client has closed the socket or does not read."""
    try:
        socket.send_fds(channel, [json.dumps(reply).encode()], descriptors or [], socket.MSG_DONTWAIT)
    except OSError:
        return


def receive_reply(channel: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """Return the next reply, None if the launcher closed the socket. Raises BlockingIOError if there is none yet."""
    data, ancillary, _, _ = channel.recvmsg(_REPLY_BYTES, socket.CMSG_SPACE(_DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC)
    return (json.loads(data) if data else None), _descriptors(ancillary)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)
