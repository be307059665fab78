"""Usage by tenant, day and model, which no scan of the ledger has to find."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

COUNTS = ("jobs", "failed_jobs", "prompt_tokens", "cached_tokens", "completion_tokens")


def upgrade() -> None:
    op.create_table(
        "usage_days",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in COUNTS),
        sa.PrimaryKeyConstraint("tenant", "day", "model"),
    )


def downgrade() -> None:
    op.drop_table("usage_days")
