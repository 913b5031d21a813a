"""How long starts of Claude CLIs wait, in heartbeats."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    op.add_column("heartbeats", sa.Column("start_wait_seconds", sa.Float(), nullable=True))


def downgrade() -> None:
    """Take this revision back."""
    op.drop_column("heartbeats", "start_wait_seconds")
