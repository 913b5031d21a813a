"""Route of the ledger: tokens and cost by day, user, agent and model."""

import datetime

from fastapi import APIRouter

from hypercore_agents.api.chat import Usage
from hypercore_agents.api.errors import InvalidRequest
from hypercore_agents.api.ids import UserId
from hypercore_agents.api.usage import UsageReport
from hypercore_agents.http.routes import CheckedRouter
from hypercore_agents.manager.http.auth import RequestCaller
from hypercore_agents.store import ledger, stored_bytes
from hypercore_agents.store.blobs import owner_of
from hypercore_agents.store.database import Database

ROWS = 10_000


def usage_router(database: Database, stored_bytes_per_user: int) -> APIRouter:
    """Return the route `GET /v1/usage`."""
    router = CheckedRouter(tags=["usage"])

    @router.get("/v1/usage")
    async def usage(
        caller: RequestCaller,
        user_id: UserId | None = None,
        since: datetime.date | None = None,
        until: datetime.date | None = None,
    ) -> UsageReport:
        """Return tokens and cost by day (UTC), user, agent and model. `since` and `until` are days, both inclusive."""
        user = caller.acting_for(user_id)
        if since is not None and until is not None and since > until:
            raise InvalidRequest("since is after until", field="since")
        async with database.read() as connection:
            rows = await ledger.usage_rows(
                connection,
                user_id=user,
                since=since.isoformat() if since else None,
                until=until.isoformat() if until else None,
                limit=ROWS + 1,
            )
            stored = None if user is None else await stored_bytes.stored_of(connection, owner_of(user))
        if len(rows) > ROWS:
            raise InvalidRequest(f"more than {ROWS} rows; request fewer days or one user", field="since")
        input_tokens, output_tokens = sum(row.input_tokens for row in rows), sum(row.output_tokens for row in rows)
        total = Usage(
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            total_tokens=input_tokens + output_tokens,
            cost_usd=round(sum(row.cost_usd for row in rows), 6),
        )
        return UsageReport(
            user_id=user,
            total=total,
            rows=rows,
            stored_bytes=stored,
            stored_bytes_limit=None if user is None else stored_bytes_per_user,
        )

    return router
