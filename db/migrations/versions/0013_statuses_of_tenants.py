"""Jobs of a tenant by their status, however many others have it."""

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(op.f("ix_jobs_tenant_status_id"), "jobs", ["tenant", "status", "id"])


def downgrade() -> None:
    op.drop_index(op.f("ix_jobs_tenant_status_id"), table_name="jobs")
