"""transcripts and workspaces of sessions."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    op.create_table(
        "transcripts",
        sa.Column(
            "entry_id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
            comment="order within a session",
        ),
        sa.Column("session_id", sa.String(length=36), nullable=False),
        sa.Column(
            "subpath", sa.String(length=256), nullable=False, comment="empty: the session's own; else a subagent's"
        ),
        sa.Column(
            "uuid",
            sa.String(length=64),
            nullable=False,
            comment="of the entry; an entry that comes again is the same one",
        ),
        sa.Column("line", sa.Text(), nullable=False, comment="the entry as JSON"),
        sa.PrimaryKeyConstraint("entry_id", name=op.f("pk_transcripts")),
        sa.UniqueConstraint("session_id", "uuid", name=op.f("uq_transcripts_session_id_uuid")),
    )
    op.create_table(
        "workspaces",
        sa.Column("session_id", sa.String(length=36), nullable=False),
        sa.Column(
            "owner",
            sa.String(length=64),
            nullable=False,
            comment="folder of the user's blobs: a digest of the user's id",
        ),
        sa.Column(
            "digest", sa.String(length=64), nullable=False, comment="SHA-256 of the archive, which names its blob"
        ),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("session_id", name=op.f("pk_workspaces")),
    )
    op.create_index(op.f("ix_workspaces_owner_digest"), "workspaces", ["owner", "digest"], unique=False)


def downgrade() -> None:
    """Take this revision back."""
    op.drop_table("workspaces")
    op.drop_table("transcripts")
