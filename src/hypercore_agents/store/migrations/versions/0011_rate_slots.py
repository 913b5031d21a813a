"""rates by slots."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    op.add_column(
        "rates", sa.Column("slots", sa.Text(), nullable=True, comment="requests in each slot, the newest first")
    )


def downgrade() -> None:
    """Take this revision back."""
    op.drop_column("rates", "slots")
