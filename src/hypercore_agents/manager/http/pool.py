"""Routes of the pool: its size, set by compare-and-set so that concurrent writers cannot overwrite one another; rolls.

These routes only record a roll; the leader carries it out (`fleet/pool.py`), so it continues after this process ends.
"""

from collections.abc import Callable

from fastapi import APIRouter

from hypercore_agents.api.agents import AgentKind, AgentState
from hypercore_agents.api.errors import Conflict, InvalidRequest, NotFound
from hypercore_agents.api.pool import PoolSize, PoolState, RollRequest, RollStatus, RollView
from hypercore_agents.compute.base import Capabilities
from hypercore_agents.http.routes import CheckedRouter
from hypercore_agents.manager.fleet.pool import PoolShape
from hypercore_agents.manager.http.auth import RequestCaller
from hypercore_agents.store import agents, pools, rolls
from hypercore_agents.store.agents import AgentRow
from hypercore_agents.store.database import Connection, Database
from hypercore_agents.store.rolls import RollRow


def pool_router(
    database: Database,
    shape: PoolShape,
    capabilities: Capabilities,
    wake: Callable[[], None],
    clock: Callable[[], float],
) -> APIRouter:
    """Return the routes under `/v1/pool`. `wake` makes the leader adjust the pool at once."""
    router = CheckedRouter(tags=["pool"])

    async def current() -> tuple[PoolSize, int | None]:
        async with database.read() as connection:
            row = await pools.get_pool(connection)
        version = None if row is None else row.version
        return PoolSize(desired=shape.desired(row), version=version or 0), version

    @router.get("/v1/pool")
    async def get_pool(caller: RequestCaller) -> PoolState:
        """Show the pool's desired size, its agents by state, and the progress of the last roll."""
        caller.needs_admin()
        async with database.read() as connection:
            size = await pools.get_pool(connection)
            rows = await agents.list_agents(connection, kind=AgentKind.POOL)
            roll = await rolls.get_roll(connection)
        states = [row.state for row in rows]
        return PoolState(
            desired=shape.desired(size),
            version=0 if size is None else size.version,
            running=states.count(AgentState.RUNNING),
            starting=states.count(AgentState.PENDING) + states.count(AgentState.STARTING),
            draining=states.count(AgentState.DRAINING),
            roll=None if roll is None else _view(roll, rows),
        )

    @router.put("/v1/pool")
    async def put_pool(body: PoolSize, caller: RequestCaller) -> PoolSize:
        """Set the desired size, if `version` is its current version."""
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
                f"the pool's size was set concurrently: it is at version {now.version}, not {body.version}; "
                "read it again",
                details=now.model_dump(),
            )
        wake()
        return now

    @router.post("/v1/pool/roll", status_code=202)
    async def post_roll(body: RollRequest, caller: RequestCaller) -> RollView:
        """Replace the pool's agents, a few at a time, with agents of another image or configuration."""
        caller.needs_admin()
        if body.image is not None and not capabilities.images:
            raise InvalidRequest("image: the compute backend has no images; omit it", field="image")
        async with database.write(exclusive="pool") as connection:
            last = await rolls.get_roll(connection)
            if last is not None and last.status is RollStatus.ROLLING:
                raise Conflict(
                    f"the pool is rolling to revision {last.revision}; wait until it ends, or DELETE /v1/pool/roll",
                    details={"revision": last.revision},
                )
            roll = _next(last, body, clock())
            await rolls.put_roll(connection, roll)
            view = await view_of(connection, roll)
        wake()
        return view

    @router.delete("/v1/pool/roll")
    async def delete_roll(caller: RequestCaller) -> RollView:
        """Stop a roll. Agents of the previous revision are started again; running agents of the new one stay."""
        caller.needs_admin()
        async with database.write(exclusive="pool") as connection:
            last = await rolls.get_roll(connection)
            stopped = last is not None and await rolls.end_roll(
                connection, last.revision, RollStatus.STOPPED, now=clock(), reason="an operator stopped it"
            )
            roll = await rolls.get_roll(connection)
            if not stopped or roll is None:
                raise NotFound("the pool is not rolling")
            view = await view_of(connection, roll)
        wake()
        return view

    async def view_of(connection: Connection, roll: RollRow) -> RollView:
        return _view(roll, await agents.list_agents(connection, kind=AgentKind.POOL))

    return router


def _next(last: RollRow | None, body: RollRequest, now: float) -> RollRow:
    before_revision, before = 0, dict[str, object]()
    if last is not None and last.status is RollStatus.STOPPED:
        before_revision, before = last.before_revision, last.before_template
    elif last is not None:
        before_revision, before = last.revision, last.template
    overrides = body.model_dump(mode="json", include={"image", "config"}, exclude_none=True)
    return RollRow(
        revision=(0 if last is None else last.revision) + 1,
        template={**before, **overrides},
        before_revision=before_revision,
        before_template=before,
        status=RollStatus.ROLLING,
        at_once=body.at_once,
        reason=None,
        started_at=now,
        ended_at=None,
    )


def _view(roll: RollRow, rows: list[AgentRow]) -> RollView:
    new = [row for row in rows if row.revision == roll.revision]
    return RollView(
        revision=roll.revision,
        status=roll.status,
        image=roll.template.get("image"),
        config=roll.template.get("config"),
        at_once=roll.at_once,
        updated=sum(row.state is AgentState.RUNNING for row in new),
        starting=sum(row.state in (AgentState.PENDING, AgentState.STARTING) for row in new),
        remaining=len(rows) - len(new),
        reason=roll.reason,
        started_at=roll.started_at,
        ended_at=roll.ended_at,
    )
