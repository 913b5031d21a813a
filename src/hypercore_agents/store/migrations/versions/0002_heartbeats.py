"""heartbeats of agents."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    op.create_table(
        "heartbeats",
        sa.Column("agent_id", sa.String(length=64), nullable=False),
        sa.Column("at", sa.Float(), nullable=False, comment="when the gateway heard it"),
        sa.Column("ready", sa.Boolean(), nullable=False),
        sa.Column("sessions", sa.Integer(), nullable=False),
        sa.Column("live", sa.Integer(), nullable=False, comment="sessions with a Claude CLI process"),
        sa.Column("running", sa.Integer(), nullable=False, comment="turns running"),
        sa.Column("waiting", sa.Integer(), nullable=False, comment="turns that wait for a process"),
        sa.Column("memory_mb", sa.Integer(), nullable=False),
        sa.Column("memory_limit_mb", sa.Integer(), nullable=False),
        sa.Column("cpu", sa.Float(), nullable=True, comment="share of the agent's cores in use"),
        sa.Column(
            "queue_wait_seconds", sa.Float(), nullable=True, comment="95th percentile of the last minute's turns"
        ),
        sa.ForeignKeyConstraint(
            ["agent_id"], ["agents.agent_id"], name=op.f("fk_heartbeats_agent_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("agent_id", name=op.f("pk_heartbeats")),
    )


def downgrade() -> None:
    """Take this revision back."""
    op.drop_table("heartbeats")
