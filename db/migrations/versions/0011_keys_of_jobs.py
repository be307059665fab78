"""Whose limits a job that was accepted counts for."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("key_id", sa.String(), nullable=False, server_default=""))


def downgrade() -> None:
    op.drop_column("jobs", "key_id")
