"""A gateway for tests, with a real store, a pool agent, a dedicated agent and sessions on them."""

import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from multidict import CIMultiDict
from pydantic import SecretStr

from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.api.ids import new_session_id
from hypercore_agents.gateway.app import GatewayApp, create_app
from hypercore_agents.gateway.credentials import Tokens
from hypercore_agents.gateway.settings import GatewaySettings
from hypercore_agents.security.bearers import digest, new_bearer
from hypercore_agents.security.sealing import KeyRing, KeyRingFile, Sealer
from hypercore_agents.store.agents import AgentRow, insert_agent
from hypercore_agents.store.database import Database
from hypercore_agents.store.enrolments import add_enrolment
from hypercore_agents.store.keys import put_key
from hypercore_agents.store.ledger import LedgerEntry
from hypercore_agents.store.placement import place_new
from hypercore_agents.store.schema import migrate
from hypercore_agents.store.sessions import end_session
from hypercore_agents.store.tables import ledger
from hypercore_agents.store.turns import begin_turn
from support.asgi_server import serving

POOL = "agent-00000000000000a1"
DEDICATED = "agent-00000000000000d1"
STARTING = "agent-00000000000000e1"
PLATFORM_KEY = "sk-ant-canary-platform-51c07d"
MODEL = "claude-sonnet-5"


def agent_row(agent_id: str, kind: AgentKind, state: AgentState, user_id: str = "platform") -> AgentRow:
    now = time.time()
    return AgentRow(
        agent_id=agent_id, user_id=user_id, kind=kind, state=state, wanted="running", backend="test", cores=1,
        memory_mb=512, gpu_quota_mb=None, capacity=100, timeout_seconds=300, options={}, tags={}, address=None,
        bearer_sealed=None, error=None, attempts=0, version=0, created_at=now, updated_at=now,
        running_at=now, ended_at=None,
    )  # fmt: skip


@dataclass
class Site:
    """A running gateway with its store, keys and tokens."""

    url: str
    operator_url: str
    app: GatewayApp
    database: Database
    sealer: Sealer
    tokens: Tokens
    settings: GatewaySettings
    http: aiohttp.ClientSession
    generations: dict[str, tuple[str, int]] = field(default_factory=dict)

    async def session(self, agent_id: str = POOL, user_id: str = "ada", **options: Any) -> str:
        """Place a new session; return its id."""
        session_id = new_session_id()
        async with self.database.write() as connection:
            placed = await place_new(
                connection, session_id=session_id, user_id=user_id, options=options, now=time.time(), agent_id=agent_id
            )
        assert placed == agent_id
        self.generations[session_id] = (agent_id, 1)
        return session_id

    async def turn(self, session_id: str, max_tokens: int | None = None, temperature: float | None = None) -> int:
        """Begin a turn; return its number."""
        async with self.database.write() as connection:
            row = await begin_turn(
                connection, session_id, holder="m", max_tokens=max_tokens, temperature=temperature, now=time.time()
            )
        assert row is not None
        return row.turn

    async def end(self, session_id: str) -> None:
        async with self.database.write() as connection:
            assert await end_session(connection, session_id, now=time.time())

    async def key(self, owner: str, key: str) -> None:
        async with self.database.write() as connection:
            await put_key(connection, owner, self.sealer.seal(key, owner), now=time.time())

    async def allow_enrolment(self, agent_id: str = STARTING, *, expires_in: float = 60, **more: Any) -> str:
        """Store a one-use secret; return it."""
        secret = new_bearer()
        async with self.database.write() as connection:
            now = time.time()
            await add_enrolment(
                connection,
                secret_digest=digest(secret),
                agent_id=agent_id,
                now=now,
                expires_at=now + expires_in,
                **more,
            )
        return secret

    def token(self, session_id: str, generation: int | None = None) -> str:
        agent_id, now = self.generations[session_id]
        return self.tokens.for_session(agent_id, session_id, now if generation is None else generation)[0]

    def agent_token(self, agent_id: str = POOL) -> str:
        return self.tokens.for_agent(agent_id)[0]

    async def entries(self) -> list[LedgerEntry]:
        """Return the ledger in order."""
        async with self.database.read() as connection:
            rows = await connection.execute(ledger.select().order_by(ledger.c.entry_id))
            names = LedgerEntry.__dataclass_fields__
            return [LedgerEntry(**{name: getattr(row, name) for name in names}) for row in rows]

    async def ask(
        self, path: str = "/v1/messages", *, token: str, method: str = "POST", headers: Any = None, **body: Any
    ) -> tuple[int, Any, "CIMultiDict[str]"]:
        """Call a model route; return status, decoded body and headers."""
        given = {"model": MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}], **body}
        send = {"json": given} if method == "POST" else {}
        async with self.http.request(
            method,
            self.url + path,
            headers={"x-api-key": token, **(headers or {})},
            **send,  # type: ignore[arg-type]
        ) as answer:
            kind = answer.content_type
            return answer.status, await (answer.json() if "json" in kind else answer.text()), answer.headers.copy()

    async def metrics(self) -> str:
        async with self.http.get(f"{self.operator_url}/metrics") as answer:
            return await answer.text()


@contextlib.asynccontextmanager
async def gateway_site(folder: Path, store_url: str, claude_api_url: str, **values: Any) -> AsyncIterator[Site]:
    """Run a gateway in this event loop with the given Claude API."""
    settings = GatewaySettings(
        _env_file=None,
        state_dir=folder / "state",
        database_url=store_url,
        claude_api_url=claude_api_url,
        **{"anthropic_api_key": SecretStr(PLATFORM_KEY), **values},
    )
    database = Database(store_url)
    await migrate(database)
    async with database.write() as connection:
        await insert_agent(connection, agent_row(POOL, AgentKind.POOL, AgentState.RUNNING))
        await insert_agent(connection, agent_row(DEDICATED, AgentKind.DEDICATED, AgentState.RUNNING, "eve"))
        await insert_agent(connection, agent_row(STARTING, AgentKind.POOL, AgentState.STARTING))
    app = create_app(settings)
    ring = KeyRingFile(settings.key_path)
    assert KeyRing.load(settings.key_path)
    tokens = Tokens(ring, agent_seconds=600, session_seconds=600)
    try:
        async with serving(app) as url, serving(app.operator) as operator_url, aiohttp.ClientSession() as http:
            yield Site(url, operator_url, app, database, Sealer(ring), tokens, settings, http)
    finally:
        await database.close()
