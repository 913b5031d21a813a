"""Alembic's entry: runs revisions on the connection that `store.schema` hands over, inside its transaction."""

from alembic import context

from hypercore_agents.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    transactional_ddl=False,
)
context.run_migrations()
