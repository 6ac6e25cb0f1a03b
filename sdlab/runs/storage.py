"""TODO runs.storage."""

import re
from pathlib import Path
from urllib.parse import quote

from sdlab.errors import BadInput
from sdlab.settings import Settings


def storage_url(settings: Settings) -> str:
    """Optuna's URL. Quoted, since a `?` would begin the URL's options, and Optuna formats text between braces."""
    return settings.storage or f"sqlite:///{quote(str(settings.run_folder / 'searches.db'))}"


def check_storage(settings: Settings) -> None:
    """Raises `BadInput` for a storage that cannot be reached. Creates nothing."""
    import sqlalchemy

    try:
        if set("{}") & set(storage_url(settings)):
            raise ValueError("Optuna formats what stands between braces: write %7B for { and %7D for }")
        engine = sqlalchemy.create_engine(storage_url(settings))
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
    url = re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", storage_url(settings))  # no password in a log
    raise BadInput(
        f"The storage {url} cannot be opened ({reason}): check the `storage` setting; empty means SQLite in the "
        "experiment's folder."
    )
