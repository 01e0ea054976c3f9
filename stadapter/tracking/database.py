"""The database behind an MLflow store, reached once before MLflow takes over: MLflow makes ten attempts, in 100 s.

Only `store` imports this module, after it prepared MLflow's environment.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy
from mlflow.store.db.db_types import DATABASE_ENGINES


def reach_database(uri: str) -> str | None:
    """Connect to the database of a store once. Raises what SQLAlchemy raises, or OSError if its driver is missing.

    Returns the address of the artifacts: `mlruns` beside a SQLite file, from wherever a server is started; None for
    every other kind of store.
    """
    if uri.partition("://")[0].partition("+")[0] not in DATABASE_ENGINES:
        return None
    url = sqlalchemy.make_url(uri)
    file = Path(url.database).resolve() if url.get_backend_name() == "sqlite" and url.database else None
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
    _connect(url, lock=file is not None)
    return (file.parent / "mlruns").as_uri() if file else None


def _connect(url: sqlalchemy.URL, *, lock: bool) -> None:
    try:
        engine = sqlalchemy.create_engine(url)
    except ModuleNotFoundError as error:
        raise OSError(f"{url.drivername} needs the Python package {error.name}") from None
    try:
        with engine.connect() as connection:
            if lock:
                connection.exec_driver_sql("BEGIN IMMEDIATE")  # fails if it is no database, or cannot be written
    finally:
        engine.dispose()
