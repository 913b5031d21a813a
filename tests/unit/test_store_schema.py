"""The migrations make exactly the schema that the tables describe."""

from pathlib import Path

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection

from hypercore_agents.store.database import Database, sqlite_url
from hypercore_agents.store.schema import migrate
from hypercore_agents.store.tables import metadata


async def test_nothing_is_left_to_migrate(tmp_path: Path) -> None:
    database = Database(sqlite_url(tmp_path / "store.db"))
    await migrate(database)

    def difference(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), metadata))

    async with database.read() as connection:
        assert await connection.run_sync(difference) == []
    await database.close()
