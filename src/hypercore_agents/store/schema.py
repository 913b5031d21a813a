"""Bringing a store to the present schema, whoever comes first.

Migrations are Alembic revisions inside the package. Several processes may start at once: one migrates, the
others wait for it and find nothing to do.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, select

from hypercore_agents.store.database import Database

MIGRATIONS = Path(__file__).parent / "migrations"


async def migrate(database: Database) -> None:
    """Upgrade the store to the newest schema; does nothing when it is there."""
    async with database.write(exclusive="migration") as connection:
        await connection.execute(select(1))  # SQLite's lock comes with it; Alembic's context is the whole process's
        await connection.run_sync(_upgrade)


def alembic_config() -> Config:
    """Return the configuration under which Alembic's commands find our revisions."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config


def _upgrade(connection: Connection) -> None:
    config = alembic_config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
