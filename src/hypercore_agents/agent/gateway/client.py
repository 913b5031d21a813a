"""Client of the gateway's internal routes: the agent's own token, session tokens, what a turn cost.

Short questions go by the relay's own connections: a turn's answer waits for one of them. Archives and traces, which are
streams or seldom, go by aiohttp. The agent token is renewed by a supervised task long before it expires; when the
gateway refuses to renew, the agent is no longer one and says so in `refused`. Requests here may all be repeated without
harm, so those that got no answer are, within a few seconds.
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
    error_in,
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
from hypercore_agents.kit.relay.upstream import Limits, Side, Upstream

Model = TypeVar("Model", bound=BaseModel)
_log = structlog.get_logger(__name__)
_PAUSES = (0.0, 0.0, 0.5)
"""Seconds before each attempt: the second follows at once, since a pooled connection may just have gone stale."""
_CONNECTIONS = 256
_KEEP_ALIVE = 60.0
_ANSWER_BYTES = 128 * 2**20
_ATTEMPT = Limits(answer=5.0, idle=5.0, total=5.0)
_PAGE = Limits(answer=120, idle=120, total=120)
"""Of a transcript, which may be megabytes."""
_TRANSFER = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=120)
"""Of an archive: it may take long, as long as it goes on. Whoever sends or receives one bounds the whole."""
_REFUSAL_BYTES = 64 * 1024
_SLOT = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=60)
_FIRST_PAUSE, _LAST_PAUSE = 1.0, 30.0
_REFUSED = "the gateway no longer accepts this agent"
_REFUSALS = 2
"""Refused heartbeats in a row: one alone may come from a gateway that has not read its new key ring yet."""


class StalePlacement(Conflict):
    """The session now lives elsewhere: this agent's copy of it must end."""


class Unplaced(Unavailable):
    """The session has lost its place here, as sessions do whose agent is given up: its next turn is placed anew."""


class FilesMissing(InternalError):
    """The session's workspace is not in the blob store, and trying again does not bring it there."""

    retryable = False


class AgentRefused(Unavailable):
    """The gateway does not take this agent's token: it was ended, or its token expired."""


class Gateway:
    """What the agent asks of the gateway."""

    def __init__(self, url: str, token: AgentToken) -> None:
        self._url = url
        self._token = token
        self._client = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=5.0),
            connector=aiohttp.TCPConnector(limit=_CONNECTIONS, keepalive_timeout=_KEEP_ALIVE),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._upstream = Upstream(
            side=Side("the gateway", Unavailable), limits=_ATTEMPT, connections=_CONNECTIONS, keep_alive=_KEEP_ALIVE
        )
        self.refused: str | None = None
        self._refusals = 0

    def start(self, tasks: Tasks) -> None:
        """Keep the agent token fresh from now on."""
        tasks.start("renew-agent-token", self._keep_fresh())

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()
        await self._upstream.close()

    async def session_token(self, session_id: str, generation: int) -> SessionToken:
        """Return a fresh credential for a session's CLI.

        Raises StalePlacement, NotFound (not this agent's session) or Unavailable.
        """
        body = SessionTokenRequest(session_id=session_id, generation=generation)
        return await self._ask("POST", "/internal/session-tokens", SessionToken, body)

    async def heartbeat(self, beat: Heartbeat) -> None:
        """Tell how this agent is. Raises Unavailable.

        After several refusals in a row this agent is `refused`: its token is void, as after `keys prune --force`.
        """
        try:
            await self._ask("POST", "/internal/heartbeat", HeartbeatTaken, beat)
        except AgentRefused:
            self._refusals += 1
            if self._refusals >= _REFUSALS:
                self.refused = _REFUSED
            raise
        if self._refusals:
            self._refusals, self.refused = 0, None

    @contextlib.asynccontextmanager
    async def start_slot(self, *, wait: bool) -> AsyncIterator[bool]:
        """Hold one of the host's slots for starts of a Claude CLI, for as long as the gateway's answer stays open.

        Without `wait` it yields False where sessions of other agents use all of them. Where the gateway does not
        answer, starts are not held up: then only this agent's own bound holds.
        """
        held: aiohttp.ClientResponse | None = None
        granted = True
        try:
            while held is None:
                held = await self._client.post(
                    f"{self._url}/internal/start-slots?wait={str(wait).lower()}",
                    headers=self._headers(),
                    timeout=_SLOT,
                    allow_redirects=False,
                )
                if held.status == 200 and await held.content.readline():
                    granted = True
                    break
                full = isinstance(error_in(await held.read()), AtCapacity)
                granted = not full
                if not full:
                    _log.warning("gateway.no_start_slot", status=held.status)
                if not full or not wait:
                    break
                held = None  # it has waited for long: ask again
        except (aiohttp.ClientError, TimeoutError) as error:
            granted = True
            _log.warning("gateway.no_start_slot", error=type(error).__name__)
        except BaseException:
            if held is not None:
                held.close()
            raise
        try:
            yield granted
        finally:
            if held is not None:
                held.close()

    async def send_spans(self, spans: bytes) -> None:
        """Hand over spans (OTLP, protobuf) for the collector. Raises Unavailable."""
        headers = {"authorization": f"Bearer {self._token.agent_token}", "content-type": "application/x-protobuf"}
        async with self._client.post(f"{self._url}/internal/traces", data=spans, headers=headers) as response:
            if response.status != 200:
                raise Unavailable(f"the gateway takes no spans: {response.status}")

    async def usage(self, session_id: str, turn: int, generation: int) -> Usage:
        """Return what a turn cost by the ledger, complete once the model's last byte was received."""
        path = f"/internal/sessions/{session_id}/turns/{turn}/usage?generation={generation}"
        return await self._ask("GET", path, Usage)

    async def append_transcript(
        self,
        session_id: str,
        generation: int,
        entries: list[TranscriptEntry],
        events: list[EventEntry],
        *,
        turn: int | None = None,
    ) -> Usage | None:
        """Add entries to a session's transcript and events to its log; return what `turn` cost, if one is given.

        Raises StalePlacement, NotFound, InvalidRequest, PayloadTooLarge (the transcript is full) or Unavailable.
        """
        body = TranscriptAppend(generation=generation, entries=entries, events=events, turn=turn)
        taken = await self._ask("POST", f"/internal/sessions/{session_id}/transcript", TranscriptTaken, body)
        return taken.usage

    async def transcript(self, session_id: str, generation: int) -> Transcript:
        """Return what is kept of a session, all pages as one. Raises as `append_transcript` does."""
        path = f"/internal/sessions/{session_id}/transcript?generation={generation}"
        whole = page = await self._ask("GET", f"{path}&after=0", Transcript, limits=_PAGE)
        while page.next is not None:
            page = await self._ask("GET", f"{path}&after={page.next}", Transcript, limits=_PAGE)
            whole.entries += page.entries
        return whole

    async def events(self, session_id: str, generation: int, after: str | None, limit: int) -> SessionEvents:
        """Return what the store has of a session's log, after an id. Raises as `append_transcript` does."""
        query = f"generation={generation}&limit={limit}{f'&after={after}' if after else ''}"
        return await self._ask("GET", f"/internal/sessions/{session_id}/events?{query}", SessionEvents)

    async def put_workspace(self, session_id: str, generation: int, archive: AsyncIterator[bytes]) -> str:
        """Send a workspace's archive as it comes; return the SHA-256 of what arrived.

        An archive that raises is not stored. Raises as `append_transcript` does, and PayloadTooLarge.
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
            raise Unavailable(f"the gateway did not take the workspace ({type(error).__name__})") from None

    async def get_workspace(self, session_id: str, generation: int, digest: str) -> AsyncGenerator[bytes, None]:
        """Give a workspace's archive. Raises as `append_transcript` does."""
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
            raise Unavailable(f"the gateway did not give the workspace ({type(error).__name__})") from None

    def _headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self._token.agent_token}"}

    async def _ask(
        self,
        method: str,
        path: str,
        answer: type[Model],
        body: BaseModel | None = None,
        *,
        limits: Limits = _ATTEMPT,
    ) -> Model:
        headers = self._headers()
        data = None if method == "GET" else b""
        if body is not None:
            data = body.model_dump_json().encode()
            headers["content-type"] = "application/json"
        trouble = ""
        for pause in _PAUSES:
            if pause:
                await asyncio.sleep(pause)
            try:
                status, content = await self._once(method, path, headers, data, limits)
                if status == 200:
                    return answer.model_validate_json(content)
            except ValidationError:
                trouble = "an answer of another shape"
            except (HypercoreError, TimeoutError) as error:
                trouble = str(error) or "no answer in time"
            else:
                if status < 500 and status != 429:
                    raise _refusal(status)
                trouble = f"HTTP {status}"
        _log.warning("gateway.unavailable", path=path.partition("?")[0], trouble=trouble)
        raise Unavailable("the gateway does not answer the agent; try again")

    async def _once(
        self, method: str, path: str, headers: dict[str, str], data: bytes | None, limits: Limits
    ) -> tuple[int, bytes]:
        async with asyncio.timeout(limits.total):
            answer = await self._upstream.open(
                method, self._url + path, headers=headers.items(), body=data, limits=limits
            )
            try:
                return answer.status, await answer.read(_ANSWER_BYTES)
            finally:
                answer.close()

    async def _keep_fresh(self) -> None:
        lifetime = self._token.expires_at - time.time()
        pause = _FIRST_PAUSE
        while True:
            remaining = self._token.expires_at - time.time()
            await asyncio.sleep(max(pause, remaining - lifetime / 2))
            try:
                self._token = await self._ask("POST", "/internal/agent-token", AgentToken)
                lifetime = self._token.expires_at - time.time()
                pause = _FIRST_PAUSE
                self.refused = None
            except AgentRefused:
                self.refused = _REFUSED
                _log.error("gateway.refused")
                pause = min(pause * 2, _LAST_PAUSE)
            except HypercoreError as error:
                # half of the token's life is left in which to try again
                if self._token.expires_at <= time.time():
                    self.refused = "the agent's token expired and the gateway did not renew it"
                _log.warning("gateway.not_renewed", error=error.message)
                pause = min(pause * 2, _LAST_PAUSE)


def _refusal(status: int, body: bytes = b"") -> HypercoreError:
    if status == 413 and (said := error_in(body)) is not None:
        return said  # it names the limit
    if status == 409:
        return StalePlacement("the session has moved to another agent")
    if status == 404:
        return NotFound("there is no such session on this agent")
    if status == 410:
        return FilesMissing(
            "the files of this session are missing from the platform's blob store; its operator has to bring them back",
        )
    if status == 413:
        return PayloadTooLarge("the gateway takes no more (WORKSPACE_MAX_MB, TRANSCRIPT_MAX_MB)")
    if status == 400:
        return InvalidRequest("the gateway refused what the agent sent")
    if status in (401, 403):
        return AgentRefused("the gateway refuses this agent's token", retry_after=30)
    return Unavailable(f"the gateway answered the agent with HTTP {status}")
