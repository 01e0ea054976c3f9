"""A single attempt to reach the database of an MLflow store, before MLflow makes ten of its own, in 100 s.

Only `store` imports this module, after it prepared MLflow's environment.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy
from mlflow.store.db.db_types import DATABASE_ENGINES


def reach_database(uri: str) -> str | None:
    """Connect once to a store's database, and return the address of its artifacts.

    The address is `mlruns` beside a SQLite file, so that it does not depend on the folder in which a server is started.
    Every other kind of store gives None. Raises SQLAlchemyError if the database cannot be reached, or OSError if its
    driver is missing.
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
                connection.exec_driver_sql("BEGIN IMMEDIATE")  # fails if the file is no database or is read-only
    finally:
        engine.dispose()
