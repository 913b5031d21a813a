"""rolls of the pool; image and revision of agents."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    op.create_table(
        "rolls",
        sa.Column("name", sa.String(length=64), nullable=False, comment="the pool's; one row: the last roll"),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("template", sa.JSON(), nullable=False, comment="image and config that new agents get"),
        sa.Column("before_revision", sa.Integer(), nullable=False),
        sa.Column("before_template", sa.JSON(), nullable=False, comment="what they get again when the roll stops"),
        sa.Column("status", sa.String(length=16), nullable=False, comment="rolling, done or stopped"),
        sa.Column("at_once", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True, comment="why it stopped"),
        sa.Column("started_at", sa.Float(), nullable=False),
        sa.Column("ended_at", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_rolls")),
    )
    with op.batch_alter_table("agents", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column(
                "image",
                sa.String(length=255),
                nullable=True,
                comment="what its sandbox is made from; null: the backend's own choice",
            )
        )
        batch_op.add_column(
            sa.Column(
                "revision",
                sa.Integer(),
                server_default="0",
                nullable=False,
                comment="roll of the pool that it was started for",
            )
        )


def downgrade() -> None:
    """Take this revision back."""
    with op.batch_alter_table("agents", schema=None) as batch_op:
        batch_op.drop_column("revision")
        batch_op.drop_column("image")
    op.drop_table("rolls")
