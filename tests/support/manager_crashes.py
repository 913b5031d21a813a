"""Managers in this process that can crash as if killed by SIGKILL: nothing is released, written, sent or stopped.

A `Life` of a manager owns the tasks that it started, found by a context variable. `crash` first disconnects it from the
store and from agents, so that no `finally` of its tasks can reach them, then ends the tasks and closes its sockets, as
the kernel would. Hosts keep running: `OwnHost` starts and stops sandboxes independently of the caller.
"""

import asyncio
import contextlib
import contextvars
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar
from unittest import mock

import aiohttp
import uvicorn

from hypercore_agents.api.errors import Unavailable
from hypercore_agents.compute.base import ComputeBackend, Sandbox, SandboxRequest
from hypercore_agents.http.serve import bind
from hypercore_agents.http.write_coalescing import CoalescingProtocol
from hypercore_agents.manager.app import create_app
from hypercore_agents.manager.composition import Manager
from hypercore_agents.manager.settings import ManagerSettings

T = TypeVar("T")
_OWNER: contextvars.ContextVar["Life | None"] = contextvars.ContextVar("owner", default=None)
Plant = Callable[[Manager], None]
"""Modifies a new manager, to plant a defect."""


class OwnHost(ComputeBackend):
    """Delegates to `inner`. An operation that has begun on the host completes, even if its caller dies."""

    def __init__(self, inner: ComputeBackend) -> None:
        self._inner = inner
        self.name = inner.name
        self.capabilities = inner.capabilities
        self._busy: set[asyncio.Task[Any]] = set()

    async def start(self, request: SandboxRequest) -> Sandbox:
        return await self._apart(self._inner.start(request))

    async def stop(self, agent_id: str, *, grace: float = 10.0) -> None:
        await self._apart(self._inner.stop(agent_id, grace=grace))

    async def inspect(self, agent_id: str) -> Sandbox | None:
        return await self._inner.inspect(agent_id)

    async def list(self) -> list[Sandbox]:
        return await self._inner.list()

    async def logs(self, agent_id: str, *, limit: int = 65536) -> bytes:
        return await self._inner.logs(agent_id, limit=limit)

    async def _apart(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._busy.add(task)
        task.add_done_callback(self._busy.discard)
        return await asyncio.shield(task)


class Life:
    """One manager, served on loopback from its start to its normal end (`stop`) or its crash (`crash`)."""

    def __init__(
        self,
        settings: ManagerSettings,
        backend: ComputeBackend,
        clock: Callable[[], float],
        plant: Plant = lambda _: None,
    ) -> None:
        self._settings = settings
        self._backend = backend
        self._clock = clock
        self._plant = plant
        self.tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> str:
        """Start the manager; return its URL."""
        loop = asyncio.get_running_loop()
        loop.set_task_factory(_owned)
        with mock.patch("hypercore_agents.manager.app.Manager", self._build):
            app = create_app(self._settings, backend=self._backend, base_url="http://127.0.0.1:8080", clock=self._clock)
        self._listener = bind("127.0.0.1", 0, "PORT")
        self._server = uvicorn.Server(
            uvicorn.Config(
                app, http=CoalescingProtocol, log_config=None, access_log=False, lifespan="on", ws="none",
                timeout_graceful_shutdown=2,
            )
        )  # fmt: skip
        context = contextvars.copy_context()
        context.run(_OWNER.set, self)
        self._serving = loop.create_task(self._server.serve(sockets=[self._listener]), context=context)
        async with asyncio.timeout(20):
            while not self._server.started:
                assert not self._serving.done(), "the manager did not start"
                await asyncio.sleep(0)
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    async def stop(self) -> None:
        """Stop normally."""
        self._server.should_exit = True
        await self._serving
        self._listener.close()

    async def crash(self) -> None:
        """Crash now."""
        manager = self._manager
        close_database, close_relay = manager.database.close, manager.relay.close
        manager.stop = _nothing  # type: ignore[method-assign]
        for part, names in (
            (manager.database, ("read", "write", "write_one", "close")),
            (manager.relay, ("open", "relay", "close")),
        ):
            for name in names:
                setattr(part, name, _dead)
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        for server in self._server.servers:
            server.close()
        self._listener.close()
        async with asyncio.timeout(20):
            # Running transactions finish, as if the crash came a little later. If cancelled, they would leave
            # connections open that only the end of the process closes.
            while manager.database.engine.pool.checkedout():  # type: ignore[attr-defined]
                await asyncio.sleep(0.001)
            while left := [task for task in self.tasks if not task.done()]:
                for task in left:
                    task.cancel()
                await asyncio.wait(left, timeout=0.1)
        await close_relay()
        await close_database()

    def _build(self, *given: Any) -> Manager:
        self._manager = Manager(*given)
        self._plant(self._manager)
        return self._manager


async def _nothing() -> None: ...


def _dead(*_: Any, **__: Any) -> Any:
    raise Unavailable("this manager is dead")


def _owned(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
    context = options.get("context")
    owner = _OWNER.get() if context is None else context.get(_OWNER)
    task: asyncio.Task[Any] = asyncio.Task(work, loop=loop, **options)
    if owner is not None:
        owner.tasks.add(task)
        task.add_done_callback(owner.tasks.discard)
    return task


async def cut_short(
    asking: Awaitable[T], moment: int | Callable[[], bool], end: Callable[[], Awaitable[None]]
) -> T | None:
    """Start a request, and call `end` after a number of turns of the event loop, or when a condition holds.

    Returns the response, or None if there is none.
    """
    task = asyncio.ensure_future(asking)
    if callable(moment):
        while not moment() and not task.done():
            await asyncio.sleep(0.001)
    else:
        for turn in range(moment):
            await asyncio.sleep(0 if turn % 4 else 0.001)
    await end()
    with contextlib.suppress(aiohttp.ClientError):
        return await task
    return None
