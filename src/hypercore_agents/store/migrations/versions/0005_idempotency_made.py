"""what an idempotent request made before it was answered."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    op.add_column(
        "idempotency",
        sa.Column("made", sa.String(length=64), nullable=True, comment="agent or session that the first request made"),
    )


def downgrade() -> None:
    """Take this revision back."""
    op.drop_column("idempotency", "made")
