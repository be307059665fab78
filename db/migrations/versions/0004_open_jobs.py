"""What the queue asks of open jobs: an index of them, and the slots that each takes."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

IS_OPEN = sa.text("completed_at IS NULL")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("sequences", sa.Integer(), nullable=False, server_default="1"))
    op.create_index("ix_jobs_open", "jobs", ["id"], sqlite_where=IS_OPEN, postgresql_where=IS_OPEN)


def downgrade() -> None:
    op.drop_index("ix_jobs_open", table_name="jobs")
    op.drop_column("jobs", "sequences")
