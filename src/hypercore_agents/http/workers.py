"""A server in several processes: a parent that does not serve, and workers that do.

Each worker has its own listening socket on the same address (SO_REUSEPORT: the kernel distributes connections evenly).
The parent opens the sockets and keeps them open, so connections that arrive while a dead worker is replaced wait and
are not refused. The parent holds a pipe to each worker's standard input; a worker stops when it closes, because then
the parent has ended.

Rejected: one shared socket, because the first worker to wake up takes most connections.
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
_STABLE_SECONDS = 10.0
_BACKLOG = 4096
REFUSED = 2
"""Exit status of a worker with an unusable setting; it has written the reason to standard error."""


def shared_listeners(host: str, port: int, count: int, variable: str) -> list[socket.socket]:
    """Return `count` listening sockets on one address, one for each worker; port 0 selects a free port.

    Raises AddressError, which names the setting `variable`, if the address cannot be used or is in use.
    """
    with contextlib.ExitStack() as stack:
        try:
            # First without SO_REUSEPORT: shared sockets do not detect another server on the address.
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
    """One worker: a listening socket, and the process that serves it, which is replaced when it dies.

    The process is `python -m *module_and_arguments` and inherits the socket under the same descriptor. A process that
    exits with status REFUSED found an unusable setting: it is not restarted, and `on_refusal` is called. `on_death` is
    called with the process id of a process that died.
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

    async def supervise(self) -> None:
        """Run a process and restart it when it dies. After a cancellation the process runs until `stop`."""
        loop = asyncio.get_running_loop()
        pause = _FIRST_PAUSE
        while True:
            started = loop.time()
            try:
                process = await self._start()
            except OSError as error:  # for example no memory; only this worker serves its socket
                status: int | str = f"not started: {error.strerror}"
            else:
                status = await process.wait()
                self._on_death(process.pid)
            if status == REFUSED:
                self._on_refusal()
                return
            pause = _FIRST_PAUSE if loop.time() - started > _STABLE_SECONDS else min(2 * pause, _LONGEST_PAUSE)
            _log.error("worker.died", number=self.number, status=status, again_in_seconds=pause)
            await asyncio.sleep(pause)

    @property
    def running(self) -> bool:
        """Whether a process serves the socket."""
        return self._process is not None and self._process.returncode is None

    async def stop(self, seconds: float, *, final_input: bytes = b"") -> None:
        """Stop the process, by SIGKILL after `seconds`. The kernel gives later connections to the other workers."""
        self._listener.close()
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError, ConnectionError):
            if final_input and process.stdin is not None:
                process.stdin.write(final_input)
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
