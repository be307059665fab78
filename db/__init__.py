"""What must last, in SQL: SQLite in a file by default, PostgreSQL by URL.

May import nothing of ours. Open `models.py` first (the tables), then `session.py` (how they are
read and written) and `jobs.py`. A change to a table is a new file in migrations/versions/, which
Alembic drafts (migrations/env.py shows how); a test keeps tables and migrations in step.
"""

from db.schema import migrate, reach
from db.session import get_engine, reading, writing

__all__ = ["get_engine", "migrate", "reach", "reading", "writing"]
