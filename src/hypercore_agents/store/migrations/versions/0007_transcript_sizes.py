"""sizes of transcripts."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    op.create_table(
        "transcript_sizes",
        sa.Column("session_id", sa.String(length=36), nullable=False),
        sa.Column(
            "size_bytes", sa.BigInteger(), nullable=False, comment="of its entries, each with what it costs besides"
        ),
        sa.PrimaryKeyConstraint("session_id", name=op.f("pk_transcript_sizes")),
    )


def downgrade() -> None:
    """Take this revision back."""
    op.drop_table("transcript_sizes")
