"""TODO runs.storage."""

import re
from pathlib import Path

from sdlab.errors import BadInput
from sdlab.settings import Settings


def check_storage(settings: Settings) -> None:
    """Raises `BadInput` for a storage that cannot be reached. Creates nothing."""
    import sqlalchemy

    try:
        if set("{}") & set(settings.storage_url):
            raise ValueError("Optuna formats what stands between braces: write %7B for { and %7D for }")
        engine = sqlalchemy.create_engine(settings.storage_url)
        if engine.dialect.name != "sqlite":
            engine.connect().close()
        elif not Path(engine.url.database or ".").resolve().parent.is_dir():
            raise ValueError(f"there is no folder {Path(engine.url.database).resolve().parent}")
        elif Path(engine.url.database or ".").is_file():
            Path(engine.url.database).open("rb").close()
    except ImportError as error:
        reason = f"its driver is not installed ({error}); for postgresql:// `pip install 'psycopg[binary]'`"
    except (sqlalchemy.exc.SQLAlchemyError, ValueError) as error:
        reason = str(error).splitlines()[0]
    except OSError as error:
        reason = error.strerror
    else:
        return
    url = re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", settings.storage_url)  # no password in a log
    raise BadInput(
        f"The storage {url} cannot be opened ({reason}): check the `storage` setting; empty means SQLite in the "
        "experiment's folder."
    )
