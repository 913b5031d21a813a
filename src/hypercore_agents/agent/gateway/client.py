"""Client of the gateway's internal routes: tokens, heartbeats, start slots, transcripts, archives and usage.

Short requests use the relay's connections, because a turn's answer waits for them. Archives and traces, which are
streams or rare, use aiohttp. A supervised task renews the agent token long before it expires. If the gateway refuses
the renewal, the agent has been ended, and `refused` has the reason. All short requests are idempotent, so those without
a response are repeated, within a few seconds.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

import aiohttp
import structlog
from pydantic import BaseModel, ValidationError

from hypercore_agents.api.chat import Usage
from hypercore_agents.api.errors import (
    AtCapacity,
    Conflict,
    HypercoreError,
    InternalError,
    InvalidRequest,
    NotFound,
    PayloadTooLarge,
    Unavailable,
    parse_error,
)
from hypercore_agents.api.events import SessionEvents
from hypercore_agents.api.internal import (
    AgentToken,
    EventEntry,
    Heartbeat,
    HeartbeatTaken,
    SessionToken,
    SessionTokenRequest,
    Transcript,
    TranscriptAppend,
    TranscriptEntry,
    TranscriptTaken,
    WorkspaceStored,
)
from hypercore_agents.kit.aio.tasks import Tasks
from hypercore_agents.kit.relay.upstream import Peer, RequestLimits, Upstream

Model = TypeVar("Model", bound=BaseModel)
_log = structlog.get_logger(__name__)
_PAUSES = (0.0, 0.0, 0.5)
"""Seconds before each attempt. The second follows at once, since a pooled connection may just have gone stale."""
_CONNECTIONS = 256
_KEEP_ALIVE = 60.0
_ANSWER_BYTES = 128 * 2**20
_ATTEMPT = RequestLimits(response=5.0, idle=5.0, total=5.0)
_PAGE = RequestLimits(response=120, idle=120, total=120)
"""For a page of a transcript, which may be megabytes."""
_TRANSFER = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=120)
"""For an archive: no total limit while data flows. The caller limits the whole transfer."""
_REFUSAL_BYTES = 64 * 1024
_SLOT = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=60)
_FIRST_PAUSE, _LAST_PAUSE = 1.0, 30.0
_REFUSED = "the gateway no longer accepts this agent"
_REFUSALS = 2
"""Refused heartbeats in a row. A single one may come from a gateway that has not read its new key ring yet."""


class StalePlacement(Conflict):
    """The session is on another agent now, and this agent must end its copy."""


class Unplaced(Unavailable):
    """The session is no longer on this agent. Its next turn assigns it to an agent again."""


class FilesMissing(InternalError):
    """The session's workspace is missing from the blob store, and a retry does not help."""

    retryable = False


class AgentRefused(Unavailable):
    """The gateway rejects this agent's token: the agent was ended, or the token expired."""


class GatewayClient:
    """The agent's requests to the gateway."""

    def __init__(self, url: str, token: AgentToken) -> None:
        self._url = url
        self._token = token
        self._client = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=5.0),
            connector=aiohttp.TCPConnector(limit=_CONNECTIONS, keepalive_timeout=_KEEP_ALIVE),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._upstream = Upstream(
            peer=Peer("the gateway", Unavailable), limits=_ATTEMPT, connections=_CONNECTIONS, keep_alive=_KEEP_ALIVE
        )
        self.refused: str | None = None
        self._refusals = 0

    def start(self, tasks: Tasks) -> None:
        """Renew the agent token regularly from now on."""
        tasks.start("renew-agent-token", self._renew_token())

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()
        await self._upstream.close()

    async def session_token(self, session_id: str, generation: int) -> SessionToken:
        """Return a new credential for a session's CLI.

        Raises StalePlacement, NotFound (the session is not on this agent) or Unavailable.
        """
        body = SessionTokenRequest(session_id=session_id, generation=generation)
        return await self._request("POST", "/internal/session-tokens", SessionToken, body)

    async def heartbeat(self, beat: Heartbeat) -> None:
        """Send a heartbeat. Raises Unavailable.

        After several refusals in a row this agent is `refused`: its token is invalid, as after `keys prune --force`.
        """
        try:
            await self._request("POST", "/internal/heartbeat", HeartbeatTaken, beat)
        except AgentRefused:
            self._refusals += 1
            if self._refusals >= _REFUSALS:
                self.refused = _REFUSED
            raise
        if self._refusals:
            self._refusals, self.refused = 0, None

    @contextlib.asynccontextmanager
    async def start_slot(self, *, wait: bool) -> AsyncIterator[bool]:
        """Hold one of the host's start slots for as long as the gateway's response stays open.

        Without `wait`, yield False while sessions of other agents use all slots. If the gateway does not answer, starts
        are not delayed, and only this agent's own limit applies.
        """
        response: aiohttp.ClientResponse | None = None
        granted = True
        try:
            while response is None:
                response = await self._client.post(
                    f"{self._url}/internal/start-slots?wait={str(wait).lower()}",
                    headers=self._headers(),
                    timeout=_SLOT,
                    allow_redirects=False,
                )
                if response.status == 200 and await response.content.readline():
                    granted = True
                    break
                full = isinstance(parse_error(await response.read()), AtCapacity)
                granted = not full
                if not full:
                    _log.warning("gateway.no_start_slot", status=response.status)
                if not full or not wait:
                    break
                response = None  # the gateway ended a long wait: request again
        except (aiohttp.ClientError, TimeoutError) as error:
            granted = True
            _log.warning("gateway.no_start_slot", error=type(error).__name__)
        except BaseException:
            if response is not None:
                response.close()
            raise
        try:
            yield granted
        finally:
            if response is not None:
                response.close()

    async def send_spans(self, spans: bytes) -> None:
        """Send spans (OTLP, protobuf) for the collector. Raises Unavailable."""
        headers = {"authorization": f"Bearer {self._token.agent_token}", "content-type": "application/x-protobuf"}
        async with self._client.post(f"{self._url}/internal/traces", data=spans, headers=headers) as response:
            if response.status != 200:
                raise Unavailable(f"the gateway did not accept the spans: HTTP {response.status}")

    async def usage(self, session_id: str, turn: int, generation: int) -> Usage:
        """Return a turn's usage from the ledger, complete after the model's last byte."""
        path = f"/internal/sessions/{session_id}/turns/{turn}/usage?generation={generation}"
        return await self._request("GET", path, Usage)

    async def append_transcript(
        self,
        session_id: str,
        generation: int,
        entries: list[TranscriptEntry],
        events: list[EventEntry],
        *,
        turn: int | None = None,
    ) -> Usage | None:
        """Append entries to a session's transcript and events to its log; return the usage of `turn`, if given.

        Raises StalePlacement, NotFound, InvalidRequest, PayloadTooLarge (the transcript is full) or Unavailable.
        """
        body = TranscriptAppend(generation=generation, entries=entries, events=events, turn=turn)
        taken = await self._request("POST", f"/internal/sessions/{session_id}/transcript", TranscriptTaken, body)
        return taken.usage

    async def transcript(self, session_id: str, generation: int) -> Transcript:
        """Return a session's stored transcript, with all pages joined. Raises like `append_transcript`."""
        path = f"/internal/sessions/{session_id}/transcript?generation={generation}"
        whole = page = await self._request("GET", f"{path}&after=0", Transcript, limits=_PAGE)
        while page.next is not None:
            page = await self._request("GET", f"{path}&after={page.next}", Transcript, limits=_PAGE)
            whole.entries += page.entries
        return whole

    async def events(self, session_id: str, generation: int, after: str | None, limit: int) -> SessionEvents:
        """Return stored events of a session's log, after an id. Raises like `append_transcript`."""
        query = f"generation={generation}&limit={limit}{f'&after={after}' if after else ''}"
        return await self._request("GET", f"/internal/sessions/{session_id}/events?{query}", SessionEvents)

    async def put_workspace(self, session_id: str, generation: int, archive: AsyncIterator[bytes]) -> str:
        """Stream a workspace archive to the gateway; return the SHA-256 of the received archive.

        If the archive raises, nothing is stored. Raises like `append_transcript`, and PayloadTooLarge.
        """
        path = f"/internal/sessions/{session_id}/workspace?generation={generation}"
        try:
            async with self._client.put(
                self._url + path,
                data=archive,
                headers=self._headers(),
                timeout=_TRANSFER,
                allow_redirects=False,
            ) as response:
                if response.status != 200:
                    raise _refusal(response.status, await response.content.read(_REFUSAL_BYTES))
                return WorkspaceStored.model_validate_json(await response.read()).digest
        except (aiohttp.ClientError, TimeoutError, ValidationError) as error:
            raise Unavailable(f"the gateway did not store the workspace ({type(error).__name__})") from None

    async def get_workspace(self, session_id: str, generation: int, digest: str) -> AsyncGenerator[bytes, None]:
        """Yield a workspace archive. Raises like `append_transcript`."""
        path = f"/internal/sessions/{session_id}/workspaces/{digest}?generation={generation}"
        try:
            async with self._client.get(
                self._url + path, headers=self._headers(), timeout=_TRANSFER, allow_redirects=False
            ) as response:
                if response.status != 200:
                    raise _refusal(response.status)
                async for chunk in response.content.iter_any():
                    yield chunk
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unavailable(f"the gateway did not return the workspace ({type(error).__name__})") from None

    def _headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self._token.agent_token}"}

    async def _request(
        self,
        method: str,
        path: str,
        answer: type[Model],
        body: BaseModel | None = None,
        *,
        limits: RequestLimits = _ATTEMPT,
    ) -> Model:
        headers = self._headers()
        data = None if method == "GET" else b""
        if body is not None:
            data = body.model_dump_json().encode()
            headers["content-type"] = "application/json"
        problem = ""
        for pause in _PAUSES:
            if pause:
                await asyncio.sleep(pause)
            try:
                status, content = await self._attempt(method, path, headers, data, limits)
                if status == 200:
                    return answer.model_validate_json(content)
            except ValidationError:
                problem = "an invalid response"
            except (HypercoreError, TimeoutError) as error:
                problem = str(error) or "no response in time"
            else:
                if status < 500 and status != 429:
                    raise _refusal(status)
                problem = f"HTTP {status}"
        _log.warning("gateway.unavailable", path=path.partition("?")[0], problem=problem)
        raise Unavailable("the gateway does not answer the agent; try again")

    async def _attempt(
        self, method: str, path: str, headers: dict[str, str], data: bytes | None, limits: RequestLimits
    ) -> tuple[int, bytes]:
        async with asyncio.timeout(limits.total):
            answer = await self._upstream.open(
                method, self._url + path, headers=headers.items(), body=data, limits=limits
            )
            try:
                return answer.status, await answer.read(_ANSWER_BYTES)
            finally:
                answer.close()

    async def _renew_token(self) -> None:
        lifetime = self._token.expires_at - time.time()
        pause = _FIRST_PAUSE
        while True:
            remaining = self._token.expires_at - time.time()
            await asyncio.sleep(max(pause, remaining - lifetime / 2))
            try:
                self._token = await self._request("POST", "/internal/agent-token", AgentToken)
                lifetime = self._token.expires_at - time.time()
                pause = _FIRST_PAUSE
                self.refused = None
            except AgentRefused:
                self.refused = _REFUSED
                _log.error("gateway.refused")
                pause = min(pause * 2, _LAST_PAUSE)
            except HypercoreError as error:
                # Half of the token's lifetime remains for retries.
                if self._token.expires_at <= time.time():
                    self.refused = "the agent's token expired and the gateway did not renew it"
                _log.warning("gateway.not_renewed", error=error.message)
                pause = min(pause * 2, _LAST_PAUSE)


def _refusal(status: int, body: bytes = b"") -> HypercoreError:
    if status == 413 and (error := parse_error(body)) is not None:
        return error  # it names the limit
    if status == 409:
        return StalePlacement("the session has moved to another agent")
    if status == 404:
        return NotFound("this session is not on this agent")
    if status == 410:
        return FilesMissing(
            "the files of this session are missing from the platform's blob store; the operator must restore them",
        )
    if status == 413:
        return PayloadTooLarge("the request exceeds the gateway's limit (WORKSPACE_MAX_MB, TRANSCRIPT_MAX_MB)")
    if status == 400:
        return InvalidRequest("the gateway rejected the agent's request as invalid")
    if status in (401, 403):
        return AgentRefused("the gateway rejects this agent's token", retry_after=30)
    return Unavailable(f"the gateway answered the agent with HTTP {status}")
