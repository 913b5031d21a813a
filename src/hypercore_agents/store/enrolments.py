"""Queries on enrolments: the one-use secrets that agents start with. Only digests are stored."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.store.tables import enrolments


@dataclass(frozen=True)
class EnrolmentRow:
    """One enrolment. Times in Unix seconds."""

    secret_digest: str
    agent_id: str
    created_at: float
    expires_at: float
    configuration: dict[str, Any] | None
    public_key: str | None
    used_at: float | None


async def add_enrolment(
    connection: AsyncConnection,
    *,
    secret_digest: str,
    agent_id: str,
    now: float,
    expires_at: float,
    configuration: dict[str, Any] | None = None,
) -> None:
    """Allow one enrolment of the agent, in place of any earlier one.

    `configuration` is the AgentConfiguration (as a dict) that the agent receives from the gateway.
    """
    await connection.execute(delete(enrolments).where(enrolments.c.agent_id == agent_id))
    await connection.execute(
        insert(enrolments).values(
            secret_digest=secret_digest,
            agent_id=agent_id,
            created_at=now,
            expires_at=expires_at,
            configuration=configuration,
        )
    )


async def get_enrolment(connection: AsyncConnection, secret_digest: str) -> EnrolmentRow | None:
    """Return the enrolment with this digest."""
    row = (
        await connection.execute(select(enrolments).where(enrolments.c.secret_digest == secret_digest))
    ).one_or_none()
    return None if row is None else EnrolmentRow(**row._asdict())


async def use_enrolment(connection: AsyncConnection, secret_digest: str, public_key: str, *, now: float) -> bool:
    """Mark an enrolment as used by this key; return False if it was already used."""
    statement = (
        update(enrolments)
        .where(enrolments.c.secret_digest == secret_digest, enrolments.c.used_at.is_(None))
        .values(public_key=public_key, used_at=now)
    )
    return (await connection.execute(statement)).rowcount == 1
