"""Queries on sealed Claude API keys. An owner is `user:ID`, `agent:ID` or `platform`."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import case, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.store.tables import api_keys

PLATFORM = "platform"


@dataclass(frozen=True)
class KeyRow:
    """One sealed key."""

    owner: str
    sealed: bytes
    created_at: float


def user_owner(user_id: str) -> str:
    """Return the owner string of a user's key."""
    return f"user:{user_id}"


def agent_owner(agent_id: str) -> str:
    """Return the owner string of the key that a dedicated agent was spawned with."""
    return f"agent:{agent_id}"


async def put_key(connection: AsyncConnection, owner: str, sealed: bytes, *, now: float) -> None:
    """Store an owner's key; replace an existing one."""
    await delete_key(connection, owner)
    await connection.execute(insert(api_keys).values(owner=owner, sealed=sealed, created_at=now))


async def first_key(connection: AsyncConnection, owners: Sequence[str]) -> KeyRow | None:
    """Return the key of the first of these owners that has one."""
    rows = await connection.execute(select(api_keys).where(api_keys.c.owner.in_(owners)))
    found = {row.owner: KeyRow(**row._asdict()) for row in rows}
    return next((found[owner] for owner in owners if owner in found), None)


async def list_keys(connection: AsyncConnection) -> list[KeyRow]:
    """Return every stored key, by owner."""
    rows = await connection.execute(select(api_keys).order_by(api_keys.c.owner))
    return [KeyRow(**row._asdict()) for row in rows]


async def oldest_keys(connection: AsyncConnection) -> dict[str, float]:
    """Return when the oldest key of each kind of owner (`user`, `agent`, `platform`) was stored, in Unix seconds."""
    owner = api_keys.c.owner
    kind = case((owner == PLATFORM, PLATFORM), (owner.startswith("user:"), "user"), else_="agent").label("kind")
    rows = await connection.execute(select(kind, func.min(api_keys.c.created_at)).group_by(kind))
    return {str(row[0]): float(row[1]) for row in rows}


async def replace_sealed(connection: AsyncConnection, owner: str, old: bytes, new: bytes) -> bool:
    """Replace a key by its re-wrapped form; return whether the old one was still stored."""
    statement = update(api_keys).where(api_keys.c.owner == owner, api_keys.c.sealed == old).values(sealed=new)
    return (await connection.execute(statement)).rowcount == 1


async def delete_key(connection: AsyncConnection, owner: str) -> bool:
    """Delete an owner's key; return whether there was one."""
    return (await connection.execute(delete(api_keys).where(api_keys.c.owner == owner))).rowcount == 1
