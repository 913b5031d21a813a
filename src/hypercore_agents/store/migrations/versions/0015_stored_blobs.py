"""blobs to be deleted, and bytes of archives by user."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    op.create_table(
        "unused_blobs",
        sa.Column("owner", sa.String(length=64), nullable=False, comment="folder of the user's blobs"),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("noted_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("owner", "digest", name=op.f("pk_unused_blobs")),
    )
    op.create_index(op.f("ix_unused_blobs_noted_at"), "unused_blobs", ["noted_at"], unique=False)
    op.create_table(
        "stored_bytes",
        sa.Column("owner", sa.String(length=64), nullable=False, comment="folder of the user's blobs"),
        sa.Column("user_id", sa.String(length=128), nullable=False),
        sa.Column(
            "size_bytes", sa.BigInteger(), nullable=False, comment="of the archives of all of the user's sessions"
        ),
        sa.PrimaryKeyConstraint("owner", name=op.f("pk_stored_bytes")),
    )
    op.create_index(op.f("ix_stored_bytes_size_bytes"), "stored_bytes", ["size_bytes"], unique=False)
    op.execute(
        "INSERT INTO stored_bytes (owner, user_id, size_bytes) "
        "SELECT each_blob.owner, MIN(sessions.user_id), SUM(each_blob.size) FROM ("
        "SELECT owner, digest, MAX(size_bytes) AS size, MIN(session_id) AS session_id "
        "FROM workspaces GROUP BY owner, digest) AS each_blob "
        "JOIN sessions ON sessions.session_id = each_blob.session_id GROUP BY each_blob.owner"
    )


def downgrade() -> None:
    """Take this revision back."""
    op.drop_index(op.f("ix_unused_blobs_noted_at"), table_name="unused_blobs")
    op.drop_table("unused_blobs")
    op.drop_index(op.f("ix_stored_bytes_size_bytes"), table_name="stored_bytes")
    op.drop_table("stored_bytes")
