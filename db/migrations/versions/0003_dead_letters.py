"""Why jobs failed, and which were given up."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("died_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index(op.f("ix_jobs_died_at"), "jobs", ["died_at"])
    op.add_column("job_events", sa.Column("reason", sa.String(), nullable=True))


def downgrade() -> None:
    op.drop_column("job_events", "reason")
    op.drop_index(op.f("ix_jobs_died_at"), table_name="jobs")
    op.drop_column("jobs", "died_at")
