"""The receivers of webhooks: few calls at once go to one receiver."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

IS_WAITING = sa.text("next_at IS NOT NULL")


def upgrade() -> None:
    receiver = sa.Column("receiver", sa.String(), nullable=False, server_default="?")
    op.add_column("webhook_deliveries", receiver)
    op.create_index(
        "ix_webhook_deliveries_waiting",
        "webhook_deliveries",
        ["receiver", "next_at"],
        sqlite_where=IS_WAITING,
        postgresql_where=IS_WAITING,
    )


def downgrade() -> None:
    op.drop_index("ix_webhook_deliveries_waiting", table_name="webhook_deliveries")
    op.drop_column("webhook_deliveries", "receiver")
