"""Runs a scenario against a manager, without retries: every failure that a user would see counts.

At the end, also after an interrupt, the run deletes its sessions and the agents that it spawned.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from hypercore_agents.client import AsyncClient, ClientError, Retrying, ServerError, SpawnOptions, Unreachable
from hypercore_agents.loadtest.report import Report
from hypercore_agents.loadtest.scenario import Scenario

_PROGRESS_SECONDS = 1.0
_CONCURRENT_DELETIONS = 20


class Runner:
    """One run. Set `stop` to end it early."""

    def __init__(
        self, scenario: Scenario, url: str | None, *, token: str | None = None, key: str | None = None
    ) -> None:
        self.scenario = scenario
        self.report = Report(scenario.planned)
        self.stop = asyncio.Event()
        self.seconds = 0.0
        self._client = AsyncClient(url, token, retrying=Retrying(attempts=1))
        self._key = key
        self._run_id = uuid.uuid4().hex[:8]
        self._active = 0
        self._sessions: list[str] = []
        self._started = 0.0

    async def run(self, on_progress: Callable[[str], None]) -> Report:
        """Run until all users are done or `stop` is set. Raises ClientError if the run cannot start."""
        async with self._client, contextlib.AsyncExitStack() as stack:
            agents = [await stack.enter_async_context(self._spawned_agent()) for _ in range(self.scenario.agents)]
            self._started = time.monotonic()
            try:
                await self._run_users(agents, on_progress)
            finally:
                self.seconds = time.monotonic() - self._started
                await self._end_sessions()
        return self.report

    async def _run_users(self, agents: list[str], on_progress: Callable[[str], None]) -> None:
        users = [
            asyncio.create_task(self._user(number, agents[number % len(agents)] if agents else None))
            for number in range(self.scenario.users)
        ]
        stopped = asyncio.create_task(self.stop.wait())
        all_users = asyncio.gather(*users)
        ends: set[asyncio.Future[Any]] = {all_users, stopped}
        try:
            while not all_users.done() and not stopped.done():
                await asyncio.wait(ends, timeout=_PROGRESS_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                on_progress(self.report.line(time.monotonic() - self._started, self._active))
            if all_users.done():
                await all_users
        finally:
            stopped.cancel()
            all_users.cancel()
            await asyncio.gather(*users, stopped, return_exceptions=True)
            with contextlib.suppress(asyncio.CancelledError):
                await all_users

    async def _user(self, number: int, agent_id: str | None) -> None:
        scenario = self.scenario
        user_id = f"loadtest-{self._run_id}" + ("" if agent_id else f"-{number}")
        session_id: str | None = None
        await self._until(scenario.start_of(number))
        self._active += 1
        try:
            for request in range(scenario.requests):
                due = scenario.due(number, request)
                if due is not None:
                    await self._until(due)
                since = time.monotonic() if due is None else self._started + due
                session_id = await self._turn(user_id, session_id, agent_id, since)
        finally:
            self._active -= 1

    async def _turn(self, user_id: str, session_id: str | None, agent_id: str | None, since: float) -> str | None:
        report = self.report
        stream = self._client.stream(self.scenario.prompt, user_id=user_id, session_id=session_id, agent_id=agent_id)
        has_text = False
        try:
            async with asyncio.timeout(self.scenario.timeout), stream:
                async for event in stream:
                    if event.text and not has_text:
                        has_text = True
                        report.first_text.add(time.monotonic() - since)
                result = await stream.result()
        except (ClientError, TimeoutError) as error:
            report.errors[_error_type(error)] += 1
        else:
            report.turns.add(time.monotonic() - since)
            report.tokens += result.usage.total_tokens
            report.cost_usd += result.usage.cost_usd
            if result.status == "completed":
                report.succeeded += 1
            else:
                report.errors[f"status_{result.status}"] += 1
        finally:
            if session_id is None and stream.session_id is not None:
                self._sessions.append(stream.session_id)
        return stream.session_id or session_id

    async def _until(self, offset: float) -> None:
        await asyncio.sleep(max(0.0, self._started + offset - time.monotonic()))

    @contextlib.asynccontextmanager
    async def _spawned_agent(self) -> AsyncIterator[str]:
        scenario = self.scenario
        options: SpawnOptions = {
            "cores": scenario.cores,
            "memory": scenario.memory,
            "max_concurrent": scenario.sessions_per_agent,
            "tags": {"purpose": "loadtest"},
        }
        if self._key:
            options["anthropic_api_key"] = self._key
        agent = await self._client.spawn(f"loadtest-{self._run_id}", **options)
        try:
            yield agent.agent_id
        finally:
            with contextlib.suppress(ClientError):
                await self._client.delete_agent(agent.agent_id)

    async def _end_sessions(self) -> None:
        slots = asyncio.Semaphore(_CONCURRENT_DELETIONS)

        async def end(session_id: str) -> None:
            async with slots:
                with contextlib.suppress(ClientError):
                    await self._client.delete_session(session_id)

        await asyncio.gather(*(end(session_id) for session_id in self._sessions))


def _error_type(error: Exception) -> str:
    if isinstance(error, ServerError):
        return error.type
    if isinstance(error, TimeoutError):
        return "timeout"
    return "unreachable" if isinstance(error, Unreachable) else "stream_lost"
