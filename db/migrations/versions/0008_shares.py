"""What a job's tenant is charged, and by which weight."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("weight", sa.Double(), nullable=False, server_default="1"))
    op.add_column("jobs", sa.Column("max_tokens", sa.Integer(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "max_tokens")
    op.drop_column("jobs", "weight")
