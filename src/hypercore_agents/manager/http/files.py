"""Files of a session's workspace: relayed to the agent that holds the session.

A session that is on no agent now is placed first, as its next turn would place it, and its workspace brought back.
Rejected: reading its archive here (a workspace is hostile input, and is unpacked with the session's own rights only).
"""

from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Path, Response

from hypercore_agents.api.files import READ_LIMIT, WRITE_LIMIT, FileList, FilePath, FileWritten
from hypercore_agents.http.context import Receive, Scope, Send
from hypercore_agents.http.routes import CheckedRouter
from hypercore_agents.kit.relay import Limits, Relay
from hypercore_agents.manager.http.answers import RelayedAnswer
from hypercore_agents.manager.http.reach import WithinAgent, WithinPool
from hypercore_agents.manager.sessions.sessions import SessionScope
from hypercore_agents.manager.sessions.turns import Turns
from hypercore_agents.manager.shares import OpenAnswers

_LIMITS = Limits(answer=90, idle=30, total=600, request_bytes=WRITE_LIMIT, answer_bytes=READ_LIMIT)
_LISTED: dict[int | str, dict[str, Any]] = {200: {"model": FileList}}
_WRITTEN: dict[int | str, dict[str, Any]] = {200: {"model": FileWritten}}
_READ: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {}}, "description": "the file's bytes"}
}
_Path = Annotated[FilePath, Path(description="relative to the workspace")]


def files_router(turns: Turns, relay: Relay, downloads: OpenAnswers) -> APIRouter:
    """Return the routes under `/v1/agent` and, for one agent, under `/agents/AGENT_ID/v1/agent`."""
    router = CheckedRouter(tags=["files"])

    async def pass_on(session_id: str, within: SessionScope, path: str, *, empty: bool) -> Response:
        held = await turns.hold(session_id, within)
        endpoint = held.endpoint

        async def write(scope: Scope, receive: Receive, send: Send) -> None:
            if path == "files" or not empty:
                await pass_through(scope, receive, send)
            else:
                with downloads.open(held.opening.user_id):
                    await pass_through(scope, receive, send)

        async def pass_through(scope: Scope, receive: Receive, send: Send) -> None:
            await relay.relay(
                scope,
                receive,
                send,
                url=f"{endpoint.address}/v1/agent/session/{session_id}/{quote(path)}",
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

    async def list_files(session_id: str, within: WithinPool) -> Response:
        """List the files of a session's workspace; at most 1000 entries."""
        return await pass_on(session_id, within, "files", empty=True)

    async def list_files_on_agent(session_id: str, within: WithinAgent) -> Response:
        """List the files of a session's workspace on this agent; at most 1000 entries."""
        return await pass_on(session_id, within, "files", empty=True)

    async def read_file(session_id: str, path: _Path, within: WithinPool) -> Response:
        """Give a file of a session's workspace."""
        return await pass_on(session_id, within, f"files/{path}", empty=True)

    async def read_file_on_agent(session_id: str, path: _Path, within: WithinAgent) -> Response:
        """Give a file of a session's workspace on this agent."""
        return await pass_on(session_id, within, f"files/{path}", empty=True)

    async def write_file(session_id: str, path: _Path, within: WithinPool) -> Response:
        """Put a file into a session's workspace: the body's bytes, as application/octet-stream."""
        return await pass_on(session_id, within, f"files/{path}", empty=False)

    async def write_file_on_agent(session_id: str, path: _Path, within: WithinAgent) -> Response:
        """Put a file into a session's workspace on this agent: the body's bytes, as application/octet-stream."""
        return await pass_on(session_id, within, f"files/{path}", empty=False)

    both("files", "GET", _LISTED)(list_files, list_files_on_agent)
    both("files/{path:path}", "GET", _READ)(read_file, read_file_on_agent)
    both("files/{path:path}", "PUT", _WRITTEN)(write_file, write_file_on_agent)
    return router
