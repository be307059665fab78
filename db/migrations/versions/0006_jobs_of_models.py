"""A list of one model's jobs is looked up, however many jobs others have."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_jobs_tenant_model_id", "jobs", ["tenant", "model", "id"])


def downgrade() -> None:
    op.drop_index("ix_jobs_tenant_model_id", table_name="jobs")
