"""The migrations make exactly the schema that the tables describe."""

from pathlib import Path

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection

from hypercore_agents.store.database import Database, sqlite_url
from hypercore_agents.store.schema import migrate
from hypercore_agents.store.tables import leases, metadata


async def test_nothing_is_left_to_migrate(tmp_path: Path) -> None:
    database = Database(sqlite_url(tmp_path / "store.db"))
    await migrate(database)

    def difference(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), metadata))

    async with database.read() as connection:
        assert await connection.run_sync(difference) == []
    await database.close()


async def test_nobody_else_can_read_the_file(tmp_path: Path) -> None:
    database = Database(sqlite_url(tmp_path / "store.db"))
    try:
        await migrate(database)
        async with database.write() as connection:
            await connection.execute(leases.insert().values(name="x", holder="y", fence=1, expires_at=0.0))
        assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("store.db*")} == dict.fromkeys(
            ("store.db", "store.db-wal", "store.db-shm"), 0o600
        )
    finally:
        await database.close()
