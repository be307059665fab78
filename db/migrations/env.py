"""Alembic's entry: runs migrations on the connection that db/schema.py has opened and locked.

To write a new migration from the changed models, against a database of the last version:
`alembic -x url=sqlite:////tmp/last.db revision --autogenerate --rev-id 0002 -m "what it adds"`.
"""

from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext
from sqlalchemy import Connection, create_engine

from db.models import Base, UtcDateTime


def run(connection: Connection) -> None:
    """Runs whatever command Alembic was given."""
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        # SQLite cannot alter most of a table; and its DDL is transactional as we begin.
        render_as_batch=True,
        transactional_ddl=True,
        render_item=_render,
    )
    with context.begin_transaction():
        context.run_migrations()


def _render(kind: str, item: Any, _autogen: AutogenContext) -> str | Literal[False]:
    """A migration must not change when a model does: it names SQLAlchemy's own types only."""
    is_ours = kind == "type" and isinstance(item, UtcDateTime)
    return "sa.DateTime(timezone=True)" if is_ours else False


if "connection" in context.config.attributes:
    run(context.config.attributes["connection"])
else:
    with create_engine(context.get_x_argument(as_dictionary=True)["url"]).begin() as opened:
        run(opened)
