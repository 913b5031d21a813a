"""The conversation between agent server and launcher: messages of JSON, with descriptors beside them.

One SOCK_SEQPACKET socket, inherited by the server, carries requests; each is one datagram without content and with
these descriptors: where to answer (another SOCK_SEQPACKET socket, the requester's), a memfd with the request, and for
`run` the process's standard input, output and error. What belongs to a request ends when its answering socket is
closed: for `run` that kills the process and its whole pid namespace, so that a server that dies leaves nothing behind.

    run     session, argv, environment, cwd, files, network, user, share → {"started": pid} (+ listening socket), then
            {"exited": n}
    assign  session, user, share → {"assigned": true}: what it runs counts against this user's share from now on
    limits  session → {}: with the limit that it reached since this was last asked
    pack    session, user, share → as `run`, for `pack_command` alone, which reads files whatever their mode
    files   session, work, user, share → as `run`, for `workspace_files.work_on`
    look    session, path → {"exists": bool, "size": n}
    usage   session → {"method": ...} and, where the kernel counts, what is used and allowed (`storage.Usage`)
    remove  session → {"removed": true}: its processes and its folder are gone for certain

or {"error": text} at any point; "full" beside it names what has no room. `user` is any name that stands for the
session's user, `share` the part of the agent's memory and processes that this user's sessions may use together. A
process that ended, or could not start, because a limit was reached has "limit": [kind, text] in its answer.

Rejected: a named socket (a path that a session might reach); requests in the datagram itself (a command line may be
longer than what a local socket takes as one message).
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
"""Names the server's end of the socket in its environment."""

DISK_VARIABLE = "AGENT_SESSION_DISK"
"""Says in the server's environment how sessions' files are limited (`storage.describe`)."""

FOLDER = "/session"
"""Where a session sees its own folder: the same path in every agent, so that transcripts and workspaces move."""

SERVER_FOLDER = "/agent"
"""Where the server sees its own folder."""

CLI = "/opt/claude-code/claude"
"""Where a session sees its Claude CLI."""

MODEL_ADDRESS = ("127.0.0.1", 8090)
"""Where a session's processes find the model routes: the one address that leads out of their network namespace."""

_SAVED = ("config/projects", "config/plans", "config/tasks", "config/todos")
"""What the Claude CLI saves beside the transcript and the conversation refers to by path: long tool results, plans,
lists of tasks."""


def pack_command(folder: str) -> tuple[str, ...]:
    """Return the command that writes a session's files as a tar stream; its working directory is the workspace.

    Workspace members are named `./...`, the CLI's saved files `config/...`. Transcripts (`*.jsonl`) are kept in the
    store. An `--exclude` holds for the names that follow it. What cannot be read is named on standard error.
    """
    return (
        "tar", "--create", "--file=-", "--format=gnu", "--sort=name", "--numeric-owner", "--owner=0", "--group=0",
        "--sparse", "--one-file-system", "--ignore-failed-read", "--warning=none", "--warning=failed-read",
        f"--exclude=.incoming.{'[0-9a-f]' * 16}", ".",
        f"--directory={folder}", "--exclude=config/projects/*.jsonl", *_SAVED,
    )  # fmt: skip


PACK_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}

REQUEST_BYTES = 64 << 20
_ANSWER_BYTES = 16 << 10
_DESCRIPTORS = 5


class Malformed(Exception):
    """The other side sent something that is no message."""


def send_request(channel: socket.socket, request: dict[str, Any], descriptors: list[int]) -> None:
    """Send a request; `descriptors` begins with the answering socket. Raises OSError."""
    payload = os.memfd_create("request", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(payload), "wb") as file:
            file.write(json.dumps(request).encode())
        socket.send_fds(channel, [b"r"], [descriptors[0], payload, *descriptors[1:]])
    finally:
        os.close(payload)


def receive_request(channel: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Return the next request and its descriptors (without the memfd), None when the server has gone.

    Raises Malformed; then no descriptor is left open.
    """
    data, ancillary, _, _ = channel.recvmsg(16, socket.CMSG_SPACE(_DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC)
    descriptors = _descriptors(ancillary)
    if not data and not descriptors:
        return None
    try:
        if len(descriptors) < 2:
            raise Malformed("a request has at least two descriptors")
        payload = descriptors.pop(1)
        try:
            size = os.fstat(payload).st_size
            if not 0 < size <= REQUEST_BYTES:
                raise Malformed("a request is 1 to 64 MB")
            request = json.loads(os.pread(payload, size, 0))
        finally:
            os.close(payload)
        if not isinstance(request, dict):
            raise Malformed("a request is an object")
        return request, descriptors
    except (Malformed, OSError, ValueError) as error:
        for descriptor in descriptors:
            os.close(descriptor)
        raise Malformed(str(error)) from None


def send_answer(channel: socket.socket, answer: dict[str, Any], descriptors: list[int] | None = None) -> None:
    """Send an answer; whoever asked may be gone or may not read, and then nobody needs to know."""
    try:
        socket.send_fds(channel, [json.dumps(answer).encode()], descriptors or [], socket.MSG_DONTWAIT)
    except OSError:
        return


def receive_answer(channel: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """Return the next answer, None when the other side has gone. Raises BlockingIOError when there is none yet."""
    data, ancillary, _, _ = channel.recvmsg(_ANSWER_BYTES, socket.CMSG_SPACE(_DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC)
    return (json.loads(data) if data else None), _descriptors(ancillary)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)
