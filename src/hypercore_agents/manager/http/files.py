"""Routes of the files of a session's workspace, relayed to the session's agent.

An unplaced session is first placed as by a turn, and its workspace restored.
Rejected: reading the workspace archive here (it is hostile input, and is unpacked only with the session's own rights).
"""

import contextlib
from typing import Any
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Response

from hypercore_agents.api.files import (
    MOST_ENTRIES,
    READ_LIMIT,
    WRITE_LIMIT,
    FileDeleted,
    FileList,
    FilePath,
    FilesLimit,
    FileWritten,
)
from hypercore_agents.http.context import Receive, Scope, Send
from hypercore_agents.http.paths import PathInUrl
from hypercore_agents.http.routes import CheckedRouter
from hypercore_agents.kit.relay.relay import Relay, RequestLimits
from hypercore_agents.manager.http.responses import RelayedResponse
from hypercore_agents.manager.http.session_access import Access, session_route
from hypercore_agents.manager.open_responses import OpenResponses
from hypercore_agents.manager.sessions.access import SessionAccess
from hypercore_agents.manager.sessions.opening import SessionOpener

_LIMITS = RequestLimits(response=90, idle=30, total=600, request_bytes=WRITE_LIMIT, response_bytes=READ_LIMIT)
_FILES = "/session/{session_id}/files"
_FILE = _FILES + "/{path:any}"
_LISTED: dict[int | str, dict[str, Any]] = {200: {"model": FileList}}
_WRITTEN: dict[int | str, dict[str, Any]] = {200: {"model": FileWritten}}
_DELETED: dict[int | str, dict[str, Any]] = {200: {"model": FileDeleted}}
_READ: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {}}, "description": "the file's bytes"}
}


def files_router(opener: SessionOpener, relay: Relay, downloads: OpenResponses) -> APIRouter:
    """Return the routes `session/{session_id}/files`."""
    router = CheckedRouter(tags=["files"])

    async def relay_to_agent(
        session_id: str, access: SessionAccess, path: str, *, empty: bool = True, download: bool = False
    ) -> Response:
        session = await opener.open(session_id, access)
        endpoint = session.endpoint

        async def write(scope: Scope, receive: Receive, send: Send) -> None:
            with downloads.open(session.user_id) if download else contextlib.nullcontext():
                await pass_through(scope, receive, send)

        async def pass_through(scope: Scope, receive: Receive, send: Send) -> None:
            await relay.relay(
                scope,
                receive,
                send,
                url=f"{endpoint.address}/v1/agent/session/{session_id}/{path}",
                headers=[("authorization", f"Bearer {endpoint.bearer}")],
                drop=("cookie",),
                body=b"" if empty else None,
                limits=_LIMITS,
            )

        return RelayedResponse(write)

    @session_route(router, "GET", _FILES, response_model=None, responses=_LISTED)
    async def list_files(
        session_id: str, access: Access, after: FilePath | None = None, limit: FilesLimit = MOST_ENTRIES
    ) -> Response:
        """List the files of a session's workspace, in pages. `after`: the `next` of the previous page."""
        return await relay_to_agent(session_id, access, _page(after, limit))

    @session_route(router, "GET", _FILE, response_model=None, responses=_READ)
    async def read_file(session_id: str, path: PathInUrl, access: Access) -> Response:
        """Return a file of a session's workspace."""
        return await relay_to_agent(session_id, access, _file(path), download=True)

    @session_route(router, "PUT", _FILE, response_model=None, responses=_WRITTEN)
    async def write_file(session_id: str, path: PathInUrl, access: Access) -> Response:
        """Write a file into a session's workspace: the body's bytes, with any content type."""
        return await relay_to_agent(session_id, access, _file(path), empty=False)

    @session_route(router, "DELETE", _FILE, response_model=None, responses=_DELETED)
    async def delete_file(session_id: str, path: PathInUrl, access: Access) -> Response:
        """Delete a file, a link or an empty folder of a session's workspace."""
        return await relay_to_agent(session_id, access, _file(path))

    return router


def _page(after: str | None, limit: int) -> str:
    return "files?" + urlencode({"limit": limit} if after is None else {"limit": limit, "after": after})


def _file(path: str) -> str:
    return f"files/{quote(path)}"
