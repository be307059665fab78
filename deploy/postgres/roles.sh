#!/bin/sh
# Runs once, when the database is made: the owner of Sluice's tables, and who reads statistics for
# Prometheus. Neither is a superuser, who could run programs where PostgreSQL runs.
psql --no-psqlrc --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<'SQL'
\set sluice `cat /run/secrets/postgres_password`
\set exporter `cat /run/secrets/postgres_exporter`
CREATE ROLE sluice LOGIN PASSWORD :'sluice';
CREATE ROLE exporter LOGIN PASSWORD :'exporter' IN ROLE pg_monitor;
SELECT format('ALTER DATABASE %I OWNER TO sluice', current_database()) \gexec
SQL
