"""Standard input and output of a command that runs in a session, as streams: nothing is stored on the way.

The command is a coroutine function that gets descriptors and returns the exit status (`Quarters.run_as`, `pack`). Both
sides hold bounded buffers, so the command waits for whoever reads, and whoever writes waits for the command. Leaving
the context kills the command.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

CHUNK = 256 * 1024
_MESSAGES = 16 * 1024


class CommandOutput:
    """What a command writes. Read it to its end, then ask for the status."""

    def __init__(self, reader: asyncio.StreamReader, command: "asyncio.Task[int]", errors: "asyncio.Task[bytes]"):
        self._reader, self._command, self._errors = reader, command, errors

    async def read(self, seconds: float, size: int = CHUNK) -> bytes:
        """Return the next bytes, at most `size`; none at the end. Raises TimeoutError after `seconds` of silence."""
        async with asyncio.timeout(seconds):
            return await _read(self._reader, size)

    async def status(self) -> int:
        """Return the exit status. Raises what running the command raised."""
        return await asyncio.shield(self._command)

    async def errors(self) -> bytes:
        """Return the beginning of the standard error, once the command has ended."""
        return await asyncio.shield(self._errors)


class CommandInput:
    """What a command reads."""

    def __init__(self, writer: asyncio.StreamWriter, command: "asyncio.Task[int]", errors: "asyncio.Task[bytes]"):
        self._writer, self._command, self._errors = writer, command, errors

    async def write(self, data: bytes, seconds: float) -> bool:
        """Write; False when the command reads no more. Raises TimeoutError when it does not read for `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                self._writer.write(data)
                await self._writer.drain()
        except (ConnectionError, RuntimeError):
            return False
        return not self._command.done()

    async def end(self, seconds: float) -> int:
        """End the input and return the exit status. Raises TimeoutError, and what running the command raised."""
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.write_eof()
        async with asyncio.timeout(seconds):
            return await asyncio.shield(self._command)

    async def errors(self) -> bytes:
        """Return the beginning of the standard error, once the command has ended."""
        return await asyncio.shield(self._errors)


class CommandChannel:
    """What a command that speaks on one socket says and hears. It ends by itself; leaving the context kills it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, command: "asyncio.Task[int]"):
        self._reader, self._writer, self._command = reader, writer, command

    async def read(self, seconds: float, size: int = CHUNK) -> bytes:
        """Return the next bytes, at most `size`; none at the end. Raises TimeoutError after `seconds` of silence."""
        async with asyncio.timeout(seconds):
            return await _read(self._reader, size)

    async def line(self, seconds: float) -> bytes:
        """Return the next line; nothing when there is no more. Raises TimeoutError, and what running it raised."""
        async with asyncio.timeout(seconds):
            try:
                line = await self._reader.readline()
            except ConnectionError:
                line = b""
            if not line:  # it has ended without a word
                await asyncio.shield(self._command)
        return line

    async def write(self, data: bytes, seconds: float) -> bool:
        """Write; False when the command reads no more. Raises TimeoutError when it does not read for `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                self._writer.write(data)
                await self._writer.drain()
        except (ConnectionError, RuntimeError):
            return False
        return not self._command.done()

    async def leave(self, seconds: float) -> None:
        """Say no more, and give the command so long to end in order."""
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.write_eof()
        await asyncio.wait((self._command,), timeout=seconds)


@contextlib.asynccontextmanager
async def channel_to(run: Callable[[int], Awaitable[int]]) -> AsyncIterator[CommandChannel]:
    """Run a command with this socket as its standard input and output."""
    async with _running(lambda channel, _: run(channel)) as (reader, writer, command, _):
        yield CommandChannel(reader, writer, command)


@contextlib.asynccontextmanager
async def output_of(run: Callable[[int, int], Awaitable[int]]) -> AsyncIterator[CommandOutput]:
    """Run a command with these descriptors as its standard output and error, and read what it writes."""
    async with _running(run) as (reader, _, command, errors):
        yield CommandOutput(reader, command, errors)


@contextlib.asynccontextmanager
async def input_of(run: Callable[[int, int], Awaitable[int]]) -> AsyncIterator[CommandInput]:
    """Run a command with these descriptors as its standard input and error, and write what it reads."""
    async with _running(run) as (_, writer, command, errors):
        yield CommandInput(writer, command, errors)


@contextlib.asynccontextmanager
async def _running(
    run: Callable[[int, int], Awaitable[int]],
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter, "asyncio.Task[int]", "asyncio.Task[bytes]"]]:
    ours, theirs = socket.socketpair()
    errors, their_errors = socket.socketpair()
    command: asyncio.Task[int] | None = None
    reading: asyncio.Task[bytes] | None = None
    writers: list[asyncio.StreamWriter] = []
    try:
        reader, writer = await asyncio.open_connection(sock=ours, limit=CHUNK)
        writers.append(writer)
        writer.transport.set_write_buffer_limits(CHUNK)
        said, said_writer = await asyncio.open_connection(sock=errors, limit=_MESSAGES)
        writers.append(said_writer)
        command = asyncio.ensure_future(_awaited(run(theirs.fileno(), their_errors.fileno())))
        # Our copies keep the streams open for as long as the command runs; its own end with it.
        command.add_done_callback(_closing(theirs))
        command.add_done_callback(_closing(their_errors))
        reading = asyncio.ensure_future(_beginning(said))
        yield reader, writer, command, reading
    finally:
        for task in filter(None, (command, reading)):
            task.cancel()
            await asyncio.wait((task,))
            _ = task.cancelled() or task.exception()  # whoever wanted to know has asked for it
        for held in writers:
            held.transport.abort()
        for end in (theirs, their_errors, *(() if len(writers) == 2 else (ours, errors))):
            end.close()


async def _read(reader: asyncio.StreamReader, size: int) -> bytes:
    try:
        return await reader.read(size)
    except ConnectionError:  # it was killed before it read everything
        return b""


def _closing(end: socket.socket) -> Callable[[object], None]:
    return lambda _: end.close()


async def _awaited(work: Awaitable[int]) -> int:
    return await work


async def _beginning(reader: asyncio.StreamReader) -> bytes:
    """Return the first bytes of a stream; the rest is read and dropped, so that nobody waits for it."""
    kept = b""
    while piece := await reader.read(_MESSAGES):
        kept += piece[: _MESSAGES - len(kept)]
    return kept
