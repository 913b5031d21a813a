"""HTTP client for small JSON documents of other services. Every failure is a domain error that names the service."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import aiohttp

from hypercore_agents.api.errors import Conflict, DeadlineExceeded, Forbidden, Unauthenticated, Unavailable

_MOST_BYTES = 4 * 1024 * 1024
_BY_STATUS = {401: Unauthenticated, 403: Forbidden, 409: Conflict}


class JsonClient:
    """Client of one service. Error messages contain its `name` and the `remedy`; `timeout` is in seconds."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        base_url: str,
        *,
        name: str,
        remedy: str,
        timeout: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._http = http
        self._base_url = base_url
        self._name = name
        self._remedy = remedy
        self._timeout = timeout
        self._headers = dict(headers or {})

    async def request(
        self, method: str, path: str, *, query: Mapping[str, str] | None = None, body: Any = None
    ) -> dict[str, Any]:
        """Send a request and return the JSON object of the answer.

        Raises DeadlineExceeded, Unavailable (unreachable, an error status, not a JSON object), Unauthenticated,
        Forbidden, Conflict.
        """
        try:
            async with asyncio.timeout(self._timeout):
                pending = self._http.request(
                    method, self._base_url + path, params=query, json=body, headers=self._headers, allow_redirects=False
                )
                async with pending as answer:
                    raw = await self._bounded(answer)
        except TimeoutError:
            raise DeadlineExceeded(
                f"{self._name} did not answer within {self._timeout:g} s; {self._remedy}", retryable=True
            ) from None
        except aiohttp.ClientError as error:
            raise Unavailable(f"{self._name} cannot be reached ({type(error).__name__}); {self._remedy}") from error
        if answer.status >= 300:
            fault = _BY_STATUS.get(answer.status, Unavailable)
            raise fault(f"{self._name} answered {answer.status} to {method} {path}; {self._remedy}")
        try:
            document = json.loads(raw)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise Unavailable(f"{self._name} did not answer with a JSON object to {method} {path}; {self._remedy}")
        return document

    async def _bounded(self, answer: aiohttp.ClientResponse) -> bytes:
        pieces, size = [], 0
        async for piece in answer.content.iter_any():
            size += len(piece)
            if size > _MOST_BYTES:
                raise Unavailable(f"{self._name} answered more than {_MOST_BYTES} bytes; {self._remedy}")
            pieces.append(piece)
        return b"".join(pieces)
