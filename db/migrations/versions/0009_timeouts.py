"""How long a job may take in all."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("timeout_s", sa.Double(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "timeout_s")
