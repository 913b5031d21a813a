"""Routes of the pool's size: read it, and set it by compare-and-set, so that two writers cannot fight."""

from collections.abc import Callable

from fastapi import APIRouter

from hypercore_agents.api.errors import Conflict, InvalidRequest
from hypercore_agents.api.pool import PoolSize
from hypercore_agents.manager.fleet.pool import PoolShape
from hypercore_agents.manager.http.auth import Who
from hypercore_agents.store import pools
from hypercore_agents.store.database import Database


def pool_router(
    database: Database, shape: PoolShape, wake: Callable[[], None], clock: Callable[[], float]
) -> APIRouter:
    """Return `GET` and `PUT /v1/pool`. `wake` makes the leader look at the pool at once."""
    router = APIRouter(tags=["pool"])

    async def current() -> tuple[PoolSize, int | None]:
        async with database.read() as connection:
            row = await pools.get_pool(connection)
        version = None if row is None else row.version
        return PoolSize(desired=shape.desired(row), version=version or 0), version

    @router.get("/v1/pool")
    async def get_pool(caller: Who) -> PoolSize:
        """Show the size that the pool shall have."""
        caller.needs_admin()
        return (await current())[0]

    @router.put("/v1/pool")
    async def put_pool(body: PoolSize, caller: Who) -> PoolSize:
        """Set the size, if `version` is the one that it has."""
        caller.needs_admin()
        if not shape.minimum <= body.desired <= shape.maximum:
            raise InvalidRequest(
                f"desired: must be from MIN_AGENTS={shape.minimum} to MAX_AGENTS={shape.maximum}", field="desired"
            )
        async with database.write(exclusive="pool") as connection:
            version = body.version or None
            done = await pools.set_pool(connection, body.desired, version=version, now=clock())
        now, _ = await current()
        if not done:
            raise Conflict(
                f"somebody else set the pool's size first: it is at version {now.version}, not {body.version}; "
                "read it again",
                details=now.model_dump(),
            )
        wake()
        return now

    return router
