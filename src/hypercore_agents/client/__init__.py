"""Typed client of the platform's HTTP API, synchronous and asynchronous.

    from hypercore_agents.client import Client

    for piece in Client().stream("Tell me a story.", user_id="ada").text():
        print(piece, end="", flush=True)

Both clients share the calls (`calls.py`), the retry policy (`retry_policy.py`) and the stream reader (`streams.py`).
`Client` uses only the standard library; `AsyncClient` imports aiohttp with its first call. Importing this package
imports only pydantic and the standard library.
"""

from hypercore_agents.client.asynchronous import AsyncClient, AsyncStream
from hypercore_agents.client.calls import ChatOptions, SpawnOptions
from hypercore_agents.client.errors import ClientError, ServerError, StreamLost, Unreachable
from hypercore_agents.client.retry_policy import Retrying
from hypercore_agents.client.streams import Event
from hypercore_agents.client.synchronous import Client, Stream

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "ChatOptions",
    "Client",
    "ClientError",
    "Event",
    "Retrying",
    "ServerError",
    "SpawnOptions",
    "Stream",
    "StreamLost",
    "Unreachable",
]
