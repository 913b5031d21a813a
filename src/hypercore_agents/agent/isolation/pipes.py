"""Streams to and from a command that runs in a session, without storing its input or output.

The command is a coroutine function that takes descriptors and returns the exit status (`Isolation.run_as`, `pack`).
Buffers are bounded on both sides, so the command waits for its reader, and its writer waits for the command. Leaving
the context kills the command.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

CHUNK = 256 * 1024
_MESSAGES = 16 * 1024


class CommandOutput:
    """A command's output. Read all of it, then get the status."""

    def __init__(self, reader: asyncio.StreamReader, command: "asyncio.Task[int]", errors: "asyncio.Task[bytes]"):
        self._reader, self._command, self._errors = reader, command, errors

    async def read(self, seconds: float, size: int = CHUNK) -> bytes:
        """Return up to `size` bytes, none at the end. Raises TimeoutError after `seconds` without output."""
        async with asyncio.timeout(seconds):
            return await _read(self._reader, size)

    async def status(self) -> int:
        """Return the exit status. Raises the command's exception."""
        return await asyncio.shield(self._command)

    async def errors(self) -> bytes:
        """Return the beginning of standard error, after the command's end."""
        return await asyncio.shield(self._errors)


class CommandInput:
    """A command's input."""

    def __init__(self, writer: asyncio.StreamWriter, command: "asyncio.Task[int]", errors: "asyncio.Task[bytes]"):
        self._writer, self._command, self._errors = writer, command, errors

    async def write(self, data: bytes, seconds: float) -> bool:
        """Write; return False if the command no longer reads. Raises TimeoutError after `seconds` without a read."""
        return await _write(self._writer, data, seconds) and not self._command.done()

    async def end(self, seconds: float) -> int:
        """End the input and return the exit status. Raises TimeoutError, and the command's exception."""
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.write_eof()
        async with asyncio.timeout(seconds):
            return await asyncio.shield(self._command)

    async def errors(self) -> bytes:
        """Return the beginning of standard error, after the command's end."""
        return await asyncio.shield(self._errors)


class CommandChannel:
    """Input and output of a command that uses one socket for both."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, command: "asyncio.Task[int]"):
        self._reader, self._writer, self._command = reader, writer, command

    async def read(self, seconds: float, size: int = CHUNK) -> bytes:
        """Return up to `size` bytes, none at the end. Raises TimeoutError after `seconds` without output."""
        async with asyncio.timeout(seconds):
            return await _read(self._reader, size)

    async def line(self, seconds: float) -> bytes:
        """Return the next line, empty at the end. Raises TimeoutError, and the command's exception."""
        async with asyncio.timeout(seconds):
            try:
                line = await self._reader.readline()
            except ConnectionError:
                line = b""
            if not line:  # it has ended; raise its exception, if any
                await asyncio.shield(self._command)
        return line

    async def write(self, data: bytes, seconds: float) -> bool:
        """Write; return False if the command no longer reads. Raises TimeoutError after `seconds` without a read."""
        return await _write(self._writer, data, seconds) and not self._command.done()

    async def finish(self, seconds: float) -> None:
        """End the input, and wait up to `seconds` for the command's end."""
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.write_eof()
        await asyncio.wait((self._command,), timeout=seconds)


@contextlib.asynccontextmanager
async def channel_to(run: Callable[[int], Awaitable[int]]) -> AsyncIterator[CommandChannel]:
    """Run a command with one socket as its standard input and output."""
    async with _running(lambda channel, _: run(channel)) as (reader, writer, command, _):
        yield CommandChannel(reader, writer, command)


@contextlib.asynccontextmanager
async def output_of(run: Callable[[int, int], Awaitable[int]]) -> AsyncIterator[CommandOutput]:
    """Run a command with two descriptors, its standard output and error, and read its output."""
    async with _running(run) as (reader, _, command, errors):
        yield CommandOutput(reader, command, errors)


@contextlib.asynccontextmanager
async def input_of(run: Callable[[int, int], Awaitable[int]]) -> AsyncIterator[CommandInput]:
    """Run a command with two descriptors, its standard input and error, and write its input."""
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
        error_reader, error_writer = await asyncio.open_connection(sock=errors, limit=_MESSAGES)
        writers.append(error_writer)
        command = asyncio.ensure_future(_awaited(run(theirs.fileno(), their_errors.fileno())))
        # These copies keep the streams open while the command runs; the command's own copies close with it.
        command.add_done_callback(_closing(theirs))
        command.add_done_callback(_closing(their_errors))
        reading = asyncio.ensure_future(_beginning(error_reader))
        yield reader, writer, command, reading
    finally:
        for task in filter(None, (command, reading)):
            task.cancel()
            await asyncio.wait((task,))
            _ = task.cancelled() or task.exception()  # callers that need the exception have awaited it
        for writer in writers:
            writer.transport.abort()
        for end in (theirs, their_errors, *(() if len(writers) == 2 else (ours, errors))):
            end.close()


async def _read(reader: asyncio.StreamReader, size: int) -> bytes:
    try:
        return await reader.read(size)
    except ConnectionError:  # the command was killed before it read all of its input
        return b""


async def _write(writer: asyncio.StreamWriter, data: bytes, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            writer.write(data)
            await writer.drain()
    except (ConnectionError, RuntimeError):
        return False
    return True


def _closing(end: socket.socket) -> Callable[[object], None]:
    return lambda _: end.close()


async def _awaited(work: Awaitable[int]) -> int:
    return await work


async def _beginning(reader: asyncio.StreamReader) -> bytes:
    """Return the first bytes of a stream. Read and drop the rest, so that its writer never blocks."""
    beginning = b""
    while piece := await reader.read(_MESSAGES):
        beginning += piece[: _MESSAGES - len(beginning)]
    return beginning
