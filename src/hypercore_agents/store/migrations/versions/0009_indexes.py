"""indexes for what is read in pages, by age or by state."""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    op.create_index(op.f("ix_transcripts_session_id_entry_id"), "transcripts", ["session_id", "entry_id"])
    op.create_index(op.f("ix_sessions_state_ended_at"), "sessions", ["state", "ended_at"])
    op.create_index(op.f("ix_idempotency_created_at"), "idempotency", ["created_at"])
    op.create_index(op.f("ix_ledger_day"), "ledger", ["day"])


def downgrade() -> None:
    """Take this revision back."""
    op.drop_index(op.f("ix_ledger_day"), "ledger")
    op.drop_index(op.f("ix_idempotency_created_at"), "idempotency")
    op.drop_index(op.f("ix_sessions_state_ended_at"), "sessions")
    op.drop_index(op.f("ix_transcripts_session_id_entry_id"), "transcripts")
