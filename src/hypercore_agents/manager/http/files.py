"""Files of a session's workspace: relayed to the agent that holds the session.

A session that is on no agent now is placed first, as its next turn would place it, and its workspace brought back.
Rejected: reading its archive here (a workspace is hostile input, and is unpacked with the session's own rights only).
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
from hypercore_agents.kit.relay.relay import Limits, Relay
from hypercore_agents.manager.http.answers import RelayedAnswer
from hypercore_agents.manager.http.session_access import WithinAgent, WithinPool
from hypercore_agents.manager.open_responses import OpenResponses
from hypercore_agents.manager.sessions.sessions import SessionScope
from hypercore_agents.manager.sessions.turns import Turns

_LIMITS = Limits(answer=90, idle=30, total=600, request_bytes=WRITE_LIMIT, answer_bytes=READ_LIMIT)
_LISTED: dict[int | str, dict[str, Any]] = {200: {"model": FileList}}
_WRITTEN: dict[int | str, dict[str, Any]] = {200: {"model": FileWritten}}
_DELETED: dict[int | str, dict[str, Any]] = {200: {"model": FileDeleted}}
_READ: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {}}, "description": "the file's bytes"}
}


def files_router(turns: Turns, relay: Relay, downloads: OpenResponses) -> APIRouter:
    """Return the routes under `/v1/agent` and, for one agent, under `/agents/AGENT_ID/v1/agent`."""
    router = CheckedRouter(tags=["files"])

    async def pass_on(
        session_id: str, within: SessionScope, path: str, *, empty: bool = True, download: bool = False
    ) -> Response:
        held = await turns.hold(session_id, within)
        endpoint = held.endpoint

        async def write(scope: Scope, receive: Receive, send: Send) -> None:
            with downloads.open(held.opening.user_id) if download else contextlib.nullcontext():
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

        return RelayedAnswer(write)

    def both(path: str, method: str, responses: dict[int | str, dict[str, Any]]) -> Any:
        def add(work: Any, on_agent: Any) -> None:
            for prefix, endpoint in (("", work), ("/agents/{agent_id}", on_agent)):
                router.add_api_route(
                    f"{prefix}/v1/agent/session/{{session_id}}/{path}",
                    endpoint,
                    methods=[method],
                    response_model=None,
                    responses=responses,
                )

        return add

    async def list_files(
        session_id: str, within: WithinPool, after: FilePath | None = None, limit: FilesLimit = MOST_ENTRIES
    ) -> Response:
        """List a page of the files of a session's workspace; `after`: an earlier answer's `next`."""
        return await pass_on(session_id, within, _page(after, limit))

    async def list_files_on_agent(
        session_id: str, within: WithinAgent, after: FilePath | None = None, limit: FilesLimit = MOST_ENTRIES
    ) -> Response:
        """List a page of the files of a session's workspace on this agent; `after`: an earlier answer's `next`."""
        return await pass_on(session_id, within, _page(after, limit))

    async def read_file(session_id: str, path: PathInUrl, within: WithinPool) -> Response:
        """Give a file of a session's workspace."""
        return await pass_on(session_id, within, _file(path), download=True)

    async def read_file_on_agent(session_id: str, path: PathInUrl, within: WithinAgent) -> Response:
        """Give a file of a session's workspace on this agent."""
        return await pass_on(session_id, within, _file(path), download=True)

    async def write_file(session_id: str, path: PathInUrl, within: WithinPool) -> Response:
        """Put a file into a session's workspace: the body's bytes, of any content type."""
        return await pass_on(session_id, within, _file(path), empty=False)

    async def write_file_on_agent(session_id: str, path: PathInUrl, within: WithinAgent) -> Response:
        """Put a file into a session's workspace on this agent: the body's bytes, of any content type."""
        return await pass_on(session_id, within, _file(path), empty=False)

    async def delete_file(session_id: str, path: PathInUrl, within: WithinPool) -> Response:
        """Delete a file, a link or an empty folder of a session's workspace."""
        return await pass_on(session_id, within, _file(path))

    async def delete_file_on_agent(session_id: str, path: PathInUrl, within: WithinAgent) -> Response:
        """Delete a file, a link or an empty folder of a session's workspace on this agent."""
        return await pass_on(session_id, within, _file(path))

    both("files", "GET", _LISTED)(list_files, list_files_on_agent)
    both("files/{path:any}", "GET", _READ)(read_file, read_file_on_agent)
    both("files/{path:any}", "PUT", _WRITTEN)(write_file, write_file_on_agent)
    both("files/{path:any}", "DELETE", _DELETED)(delete_file, delete_file_on_agent)
    return router


def _page(after: str | None, limit: int) -> str:
    return "files?" + urlencode({"limit": limit} if after is None else {"limit": limit, "after": after})


def _file(path: str) -> str:
    return f"files/{quote(path)}"
