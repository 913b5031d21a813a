"""Inspects a store without changing it: its schema, its clock, its key ring and where its agents run."""

import asyncio
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from hypercore_agents.api.errors import Unavailable
from hypercore_agents.kit.linux.state_location import StateLocation
from hypercore_agents.security.sealing import SealingError
from hypercore_agents.store.database import Database
from hypercore_agents.store.ownership import key_ring_fault, stored_state_location
from hypercore_agents.store.schema import alembic_config, one_line

_SECONDS = 5.0


@dataclass(frozen=True)
class StoreFacts:
    """Facts about a store. `schema`: `new` (empty), `older`, `current` or `newer`. `clock`: the server's, in Unix
    seconds; None for SQLite. `key_ring`: what is wrong with the key ring, None if nothing is."""

    schema: str
    clock: float | None = None
    key_ring: str | None = None
    state_location: StateLocation | None = None


async def inspect_store(url: str, key_file: Path) -> StoreFacts:
    """Return the facts. Raises DatabaseUrlError, or Unavailable with the driver's message."""
    database = Database(url)
    try:
        async with asyncio.timeout(_SECONDS):
            return await _inspect(database, key_file)
    except TimeoutError:
        raise Unavailable(f"no answer within {_SECONDS:.0f} s") from None
    except (DBAPIError, sqlite3.Error) as error:
        raise Unavailable(one_line(error)) from None
    finally:
        await database.close()


async def _inspect(database: Database, key_file: Path) -> StoreFacts:
    async with database.engine.connect() as connection:  # not `read`, which would log the error that the command prints
        schema = await connection.run_sync(_schema)
        clock = None
        if not database.is_sqlite:
            clock = float((await connection.execute(text("SELECT extract(epoch FROM clock_timestamp())"))).scalar_one())
    if schema != "current":
        return StoreFacts(schema, clock)
    try:
        fault = await key_ring_fault(database, key_file)
    except SealingError as error:
        fault = str(error)
    return StoreFacts(schema, clock, fault, await stored_state_location(database))


def _schema(connection: Connection) -> str:
    found = MigrationContext.configure(connection).get_current_revision()
    if found is None:
        return "new"
    script = ScriptDirectory.from_config(alembic_config())
    if found == script.get_current_head():
        return "current"
    return "older" if found in {revision.revision for revision in script.walk_revisions()} else "newer"
