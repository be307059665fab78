"""The trace that a job belongs to."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("traceparent", sa.String(), nullable=False, server_default=""))


def downgrade() -> None:
    op.drop_column("jobs", "traceparent")
