"""charges by id."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    op.add_column(
        "ledger",
        sa.Column(
            "charge_id",
            sa.String(length=36),
            nullable=True,
            comment="of the charge, which is written once however often it is sent",
        ),
    )
    op.create_index(op.f("ix_ledger_charge_id"), "ledger", ["charge_id"], unique=True)


def downgrade() -> None:
    """Take this revision back."""
    op.drop_index(op.f("ix_ledger_charge_id"), "ledger")
    op.drop_column("ledger", "charge_id")
