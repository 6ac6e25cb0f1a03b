"""The Optuna storage of an experiment: its URL, its SQLite file, and whether it can be reached."""

import contextlib
import json
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote

from sdlab.errors import BadInput
from sdlab.settings import Settings

SQLITE = re.compile(r"(sqlite(?:\+\w+)?:///)([^?]*)(.*)")
StoredTrial = tuple[int, str, dict, dict, float | None]  # number, state, parameters, score at each rung, value


def sqlite_file(settings: Settings) -> Path | None:
    """The SQLite file of the studies, `searches.db` by default; None for a database server.

    A relative path starts at the experiment's folder, whatever the working directory. Raises `BadInput` for a database
    in memory, which no other process sees and nothing survives in.
    """
    storage = settings.storage or "sqlite:///searches.db"
    if not storage.startswith("sqlite"):
        return None
    match = SQLITE.fullmatch(storage)
    name = unquote(match[2]) if match else ""
    with contextlib.suppress(RuntimeError):  # the home of nobody
        if name and not name.startswith((":", "file:")):
            file = settings.run_folder / Path(name).expanduser()
            return file.resolve() if ".." in Path(name).parts else file
    raise unreachable(settings, "it names no file on a disk")


def storage_url(settings: Settings) -> str:
    """The URL for Optuna: SQLite with its absolute path, anything else as the setting gives it. Raises `BadInput`."""
    file = sqlite_file(settings)
    if file is None:
        return settings.storage
    driver, _, options = SQLITE.fullmatch(settings.storage or "sqlite:///searches.db").groups()
    # Quoted: a `?` would begin the URL's options, and Optuna formats text in braces.
    return f"{driver}{quote(str(file))}{options}"


def check_storage(settings: Settings) -> None:
    """Raises `BadInput` for a storage that cannot be reached. Creates nothing."""
    import sqlalchemy

    file, url = sqlite_file(settings), storage_url(settings)
    try:
        if "@" in url and sqlalchemy.engine.make_url(url).password:
            raise ValueError(
                "it has a password, which would be written to files of the run: leave it out, and give it in PGPASSWORD or "
                "~/.pgpass, or as your driver reads it"
            )
        if set("{}") & set(url):
            raise ValueError("Optuna formats text in braces: write %7B for { and %7D for }")
        engine = sqlalchemy.create_engine(url)
        if file is None:
            engine.connect().close()
        elif file.parent != settings.run_folder and not file.parent.is_dir():
            raise ValueError(f"there is no folder {file.parent}")
        elif file.exists():
            file.open("rb").close()
    except ImportError as error:
        reason = f"its driver is not installed ({error}); for postgresql:// `pip install 'psycopg[binary]'`"
    except (sqlalchemy.exc.SQLAlchemyError, ValueError) as error:
        reason = str(error).splitlines()[0]
    except OSError as error:
        reason = error.strerror
    else:
        return
    raise unreachable(settings, reason)


def unreachable(settings: Settings, reason: str) -> BadInput:
    url = re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", settings.storage)  # no password in a log
    return BadInput(
        f"The storage {url or sqlite_file(settings)} cannot be opened ({reason}): check the `storage` setting; empty means "
        "SQLite in the experiment's folder, and sqlite:///name.db another file there."
    )


def stored_trials(file: Path, study: str) -> Iterator[StoredTrial]:
    """The trials of a study, read without Optuna.

    Raises `sqlite3.Error`, or `KeyError`, `TypeError`, ... for tables with other content than Optuna's.
    """
    with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:

        def rows(query: str, *values: object) -> list[tuple]:
            return database.execute(query, values).fetchall()

        if (answer := rows("pragma integrity_check")[0][0]) != "ok":
            raise sqlite3.DatabaseError(answer)
        trials = rows(
            "select trial_id, number, state from trials join studies using (study_id) where study_name = ? order by number",
            study,
        )
        for trial, number, state in trials:
            params = {
                name: int(value) if json.loads(kind)["name"] == "IntDistribution" else value
                for name, value, kind in rows(
                    "select param_name, param_value, distribution_json from trial_params where trial_id = ?", trial
                )
            }
            rungs = rows("select step, intermediate_value from trial_intermediate_values where trial_id = ?", trial)
            value = rows("select value from trial_values where trial_id = ?", trial)
            yield number, state.lower(), params, dict(sorted(rungs)), value[0][0] if value else None


def exported_trial(trial: dict) -> StoredTrial:
    """A trial of `metrics/search_N.json` in the form of `stored_trials`. Raises `KeyError`, ... for other content."""
    rungs = {int(images): score for images, score in trial["intermediate"].items()}
    return trial["number"], trial["state"], trial["params"], rungs, trial["value"]
