"""Upgrades a store to the current schema.

Migrations are Alembic revisions inside the package. If several processes start at once, one migrates; the others wait
for it and then have nothing to do.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, select

from hypercore_agents.api.errors import Unavailable
from hypercore_agents.kit.environment import SettingError
from hypercore_agents.store.database import Database

MIGRATIONS = Path(__file__).parent / "migrations"


class StoreError(SettingError):
    """The store that `DATABASE_URL` names cannot be used; the message says why and contains no password."""


async def migrate(database: Database) -> None:
    """Upgrade the store to the newest schema, if necessary. Raises Unavailable or StoreError."""
    async with database.write(exclusive="migration") as connection:
        await connection.execute(select(1))  # takes SQLite's lock: Alembic's context is global to the process
        await connection.run_sync(_upgrade)


async def require_store(url: str) -> None:
    """Connect to the store once and upgrade its schema. Raises DatabaseUrlError or StoreError."""
    database = Database(url)
    try:
        await migrate(database)
    except Unavailable as error:
        raise StoreError(
            f"DATABASE_URL: cannot use the store {database.shown_url}: {one_line(error.__cause__ or error)}"
        ) from None
    finally:
        await database.close()


def alembic_config() -> Config:
    """Return the configuration with which Alembic's commands find the revisions."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config


def _upgrade(connection: Connection) -> None:
    config = alembic_config()
    found = MigrationContext.configure(connection).get_current_revision()
    script = ScriptDirectory.from_config(config)
    known = {revision.revision for revision in script.walk_revisions()}
    if found is not None and found not in known:
        raise StoreError(
            f"DATABASE_URL: the store has schema {found}, written by a newer version of this program; this version "
            f"supports schemas up to {script.get_current_head()}. Run the newer version, or restore a backup from "
            "before the upgrade"
        )
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def one_line(error: BaseException) -> str:
    """Return the driver's message on one line."""
    original = getattr(error, "orig", None) or error
    return " ".join(str(original).split())[:300] or type(original).__name__
