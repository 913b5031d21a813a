"""Queries on notes: JSON values by name that the platform stores about the store itself."""

import json
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from hypercore_agents.store.tables import installation


async def get_note(connection: AsyncConnection, name: str) -> dict[str, Any] | None:
    """Return a note, None if there is none."""
    query = select(installation.c.value).where(installation.c.name == name)
    value = (await connection.execute(query)).scalar_one_or_none()
    return None if value is None else json.loads(value)


async def notes_under(connection: AsyncConnection, prefix: str) -> dict[str, dict[str, Any]]:
    """Return all notes whose names begin with a prefix, by their names without it."""
    query = select(installation.c.name, installation.c.value).where(installation.c.name.startswith(prefix))
    return {name.removeprefix(prefix): json.loads(value) for name, value in await connection.execute(query)}


async def put_note(connection: AsyncConnection, name: str, value: dict[str, Any], *, now: float) -> None:
    """Write a note; replace an existing one."""
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    written = {"value": json.dumps(value), "updated_at": now}
    statement = insert(installation).values(name=name, **written)
    await connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_=written))


async def replace_note(connection: AsyncConnection, name: str, value: dict[str, Any], *, now: float) -> None:
    """Change a note; do nothing if there is none."""
    statement = update(installation).where(installation.c.name == name)
    await connection.execute(statement.values(value=json.dumps(value), updated_at=now))


async def delete_note(connection: AsyncConnection, name: str) -> None:
    """Delete a note. Deleting a missing note succeeds."""
    await connection.execute(delete(installation).where(installation.c.name == name))
