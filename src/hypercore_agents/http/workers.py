"""Several processes behind one address: a parent that serves nothing, and workers that do.

Each worker has its own listening socket on the one address (SO_REUSEPORT: the kernel spreads connections evenly). The
parent opened them and keeps them open, so connections that arrive while a dead worker is being replaced wait instead
of being refused. A worker's standard input is its lifeline: when the pipe closes, the parent is gone.

Rejected: one shared socket, where the first worker to wake takes most connections.
"""

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence

import structlog

from hypercore_agents.http.serve import AddressError

_log = structlog.get_logger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0
_SETTLED = 10.0
_BACKLOG = 4096
REFUSED = 2
"""Exit status of a worker whose settings cannot be used; it has written the reason to standard error."""


def shared_listeners(host: str, port: int, count: int, variable: str) -> list[socket.socket]:
    """Return `count` listening sockets on one address, for a worker each; port 0 takes a free one.

    Raises AddressError, which names the setting `variable`, when the address cannot be used or is in use.
    """
    with contextlib.ExitStack() as stack:
        try:
            # Alone first: sockets that share an address would not notice a server that already runs there.
            with _bound(host, port) as probe:
                port = probe.getsockname()[1]
            listeners = [stack.enter_context(_bound(host, port, shared=True)) for _ in range(count)]
            for listener in listeners:
                listener.listen(_BACKLOG)
        except OSError as error:
            raise AddressError(
                f"cannot listen on {host}:{port} ({error.strerror}); set {variable} to a free address"
            ) from error
        stack.pop_all()
    return listeners


class Worker:
    """One place among the workers: a socket, and whichever process serves it now.

    A process that ends with status REFUSED has found a setting that it cannot use: it is not started again, and
    `on_refusal` is called. The process is `python -m *module_and_arguments` with the socket inherited under the same
    descriptor. `on_death` is
    told the process id of one that died.
    """

    def __init__(
        self,
        number: int,
        listener: socket.socket,
        module_and_arguments: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        on_death: Callable[[int], None] = lambda _: None,
        on_refusal: Callable[[], None] = lambda: None,
    ) -> None:
        self.number = number
        self._listener = listener
        self._command = (sys.executable, "-m", *module_and_arguments)
        self._environment = {**os.environ, **(environment or {})}
        self._on_death = on_death
        self._on_refusal = on_refusal
        self._process: asyncio.subprocess.Process | None = None

    async def keep_alive(self) -> None:
        """Run a process, and another one whenever it dies. Cancelled, it leaves the process to `stop`."""
        loop = asyncio.get_running_loop()
        pause = _FIRST_PAUSE
        while True:
            started = loop.time()
            try:
                process = await self._start()
            except OSError as error:  # no memory, say; nobody else would serve what waits at this socket
                status: int | str = f"not started: {error.strerror}"
            else:
                status = await process.wait()
                self._on_death(process.pid)
            if status == REFUSED:
                self._on_refusal()
                return
            pause = _FIRST_PAUSE if loop.time() - started > _SETTLED else min(2 * pause, _LONGEST_PAUSE)
            _log.error("worker.died", number=self.number, status=status, again_in_seconds=pause)
            await asyncio.sleep(pause)

    @property
    def lives(self) -> bool:
        """Whether a process serves the socket."""
        return self._process is not None and self._process.returncode is None

    async def stop(self, seconds: float, *, last_words: bytes = b"") -> None:
        """Have the process end, by force after `seconds`; the kernel then gives its connections to the others."""
        self._listener.close()
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError, ConnectionError):
            if last_words and process.stdin is not None:
                process.stdin.write(last_words)
                await process.stdin.drain()
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), seconds)
        except TimeoutError:
            _log.error("worker.killed", number=self.number, after_seconds=seconds)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _start(self) -> asyncio.subprocess.Process:
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            pass_fds=(self._listener.fileno(),),
            env=self._environment,
        )
        return self._process


def _bound(host: str, port: int, *, shared: bool = False) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound
