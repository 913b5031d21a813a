"""the event logs of sessions."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    op.create_table(
        "events",
        sa.Column("session_id", sa.String(length=36), nullable=False),
        sa.Column(
            "number",
            sa.BigInteger(),
            nullable=False,
            comment="its id as one number: generation * 2^32 + sequence",
        ),
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("data", sa.Text(), nullable=False, comment="JSON"),
        sa.Column(
            "position",
            sa.BigInteger(),
            nullable=False,
            comment="how many the session's log ever had, this one included",
        ),
        sa.Column(
            "total",
            sa.BigInteger(),
            nullable=False,
            comment="characters of data that it ever had, this one's included",
        ),
        sa.Column("at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("session_id", "number", name=op.f("pk_events")),
    )


def downgrade() -> None:
    """Take this revision back."""
    op.drop_table("events")
