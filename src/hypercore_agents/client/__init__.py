"""A small typed client of the platform's HTTP API, asynchronous and synchronous.

    from hypercore_agents.client import Client

    for piece in Client().stream("Tell me a story.", user_id="ada").text():
        print(piece, end="", flush=True)

Both faces make the same calls (`calls.py`), retry by the same rule (`retrying.py`) and read streams by the same reader
(`streams.py`); they differ in who waits. `Client` stands on the standard library alone; `AsyncClient` imports aiohttp
when it first connects. Importing this package brings pydantic and the standard library, nothing else.
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
