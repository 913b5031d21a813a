"""turns that wait for their session."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    op.create_table(
        "waiting_turns",
        sa.Column(
            "ticket",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
            comment="who has the lowest is next",
        ),
        sa.Column("session_id", sa.String(length=36), nullable=False),
        sa.Column("holder", sa.String(length=64), nullable=False, comment="manager process in which it waits"),
        sa.Column("joined_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("ticket", name=op.f("pk_waiting_turns")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_waiting_turns_session_id_ticket"), "waiting_turns", ["session_id", "ticket"])
    op.create_index(op.f("ix_waiting_turns_joined_at"), "waiting_turns", ["joined_at"])


def downgrade() -> None:
    """Take this revision back."""
    op.drop_table("waiting_turns")
