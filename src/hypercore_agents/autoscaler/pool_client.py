"""Client of the pool's desired size in the manager's API, with compare-and-set."""

from pydantic import ValidationError

from hypercore_agents.api.errors import Unavailable
from hypercore_agents.api.pool import PoolSize
from hypercore_agents.autoscaler.json_client import JsonClient

_PATH = "/v1/pool"


class PoolClient:
    """Calls `GET` and `PUT /v1/pool`."""

    def __init__(self, client: JsonClient) -> None:
        self._client = client

    async def get(self) -> PoolSize:
        """Return the current size and its version. Raises HypercoreError if the manager does not answer it."""
        answer = await self._client.request("GET", _PATH)
        return self._size({name: answer[name] for name in PoolSize.model_fields if name in answer})

    async def put(self, desired: int, version: int) -> PoolSize:
        """Set the size if `version` is still current and return the new one. Raises Conflict otherwise."""
        size = PoolSize(desired=desired, version=version)
        return self._size(await self._client.request("PUT", _PATH, body=size.model_dump()))

    def _size(self, document: object) -> PoolSize:
        try:
            return PoolSize.model_validate(document)
        except ValidationError as error:
            fields = ", ".join(str(fault["loc"][0]) for fault in error.errors() if fault["loc"])
            raise Unavailable(f"the manager's answer to {_PATH} has no usable {fields or 'form'}") from error
