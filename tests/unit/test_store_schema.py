"""The migrations create exactly the schema that the tables describe."""

from pathlib import Path

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text

from hypercore_agents.store.blobs import owner_of
from hypercore_agents.store.database import Database, sqlite_url
from hypercore_agents.store.schema import migrate
from hypercore_agents.store.stored_bytes import most_stored
from hypercore_agents.store.tables import leases, metadata, sessions, stored_bytes, unused_blobs
from hypercore_agents.store.workspaces import WorkspaceRow, put_workspace


async def test_migrations_create_the_described_schema(tmp_path: Path) -> None:
    database = Database(sqlite_url(tmp_path / "store.db"))
    await migrate(database)

    def difference(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), metadata))

    async with database.read() as connection:
        assert await connection.run_sync(difference) == []
    await database.close()


async def test_a_migration_counts_stored_bytes(tmp_path: Path) -> None:
    database = Database(sqlite_url(tmp_path / "store.db"))
    try:
        await migrate(database)
        async with database.write() as connection:
            for table in (stored_bytes, unused_blobs):
                await connection.run_sync(table.drop)
            await connection.execute(text("UPDATE alembic_version SET version_num = '0014'"))
            for number, (user_id, digest, size) in enumerate(
                [("ada", "a", 5), ("ada", "a", 5), ("ada", "b", 7), ("bob", "a", 9)]
            ):
                session_id = f"s{number}"
                await connection.execute(
                    sessions.insert().values(
                        session_id=session_id, user_id=user_id, kind="pool", generation=1, state="parked", options={},
                        created_at=1.0, last_used_at=1.0,
                    )
                )  # fmt: skip
                await put_workspace(connection, WorkspaceRow(session_id, owner_of(user_id), digest, size), now=1.0)
        await migrate(database)
        async with database.read() as connection:
            assert await most_stored(connection, limit=9) == {"ada": 12, "bob": 9}
    finally:
        await database.close()


async def test_only_its_owner_can_read_the_database_file(tmp_path: Path) -> None:
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
