"""Optuna's bookkeeping: where a study is stored, who runs which trial, and asks that an interruption cannot change.

A trial's parameters and a pruner's answers are kept in one piece before they act: Optuna writes them one by one, and a
sampler or pruner that is asked again in between answers differently.
"""

import contextlib
import copy
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import optuna
import sqlalchemy
from optuna.artifacts import FileSystemArtifactStore
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import Trial

from sdlab.errors import BadInput
from sdlab.runs.files import atomic_write, cannot_write, file_lock, write_errno
from sdlab.runs.storage import check_storage, sqlite_file, storage_url
from sdlab.settings import Settings


def study_name(settings: Settings, search: str) -> str:
    """Fixed, since Hyperband hashes it to choose a trial's bracket."""
    return f"{settings.experiment}-{search}"


def open_storage(settings: Settings) -> optuna.storages.BaseStorage:
    """SQLite lets one process write at a time; the others wait longer than its default of five seconds."""
    url = storage_url(settings)
    if sqlite_file(settings):
        return optuna.storages.RDBStorage(url, engine_kwargs=dict(connect_args=dict(timeout=120)))
    return optuna.storages.get_storage(url)


def open_study(settings: Settings, search: str, pruner: optuna.pruners.BasePruner) -> optuna.Study:
    """Create or load a study. Raises `BadInput` for a storage that cannot be reached or written."""
    check_storage(settings)
    try:
        return optuna.create_study(
            storage=open_storage(settings),
            study_name=study_name(settings, search),
            direction="maximize",
            pruner=pruner,
            load_if_exists=True,
        )
    except sqlalchemy.exc.SQLAlchemyError as error:
        if write_errno(error):
            raise  # `raise_on_storage_error` reports it
        raise BadInput(
            f"The study cannot be kept in the `storage` of {settings.experiment} ({str(error).splitlines()[0]})."
        ) from None


def rename_study(settings: Settings, search: str, suffix: str) -> None:
    """Give an existing study another name, so that the search starts from nothing; the dashboard shows both."""
    name = study_name(settings, search)
    for lock in sorted((settings.run_folder / ".locks").glob(f"{name}-*")):
        with file_lock(lock, wait=False) as free:
            if not free:
                raise BadInput(
                    f"A process runs a trial of {name} (`sdlab work`): wait for it, or stop it; nothing was changed."
                )
    if (file := sqlite_file(settings)) and not file.exists():
        return
    with raise_on_storage_error(settings):
        storage = open_storage(settings)
        if name in optuna.study.get_all_study_names(storage):
            new_name = f"{name} ({suffix})"
            optuna.copy_study(from_study_name=name, from_storage=storage, to_storage=storage, to_study_name=new_name)
            optuna.delete_study(study_name=name, storage=storage)


@contextlib.contextmanager
def raise_on_storage_error(settings: Settings) -> Iterator[None]:
    """Raises `BadInput` if the studies' storage fails in the block: its disk is full, its server is gone."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ or error
        if number := write_errno(cause):
            place = sqlite_file(settings) or f"The `storage` of {settings.experiment}"
            raise BadInput(cannot_write(place, number)) from None
        raise BadInput(
            f"The `storage` of {settings.experiment} failed ({str(cause).splitlines()[0]}): when it is available again, "
            "repeat the command, which continues with the interrupted trial."
        ) from None


def check_lineage(study: optuna.Study, lineage: str) -> None:
    """A study continues only with the inputs it began with. Raises `BadInput` for one of other inputs."""
    if "lineage" not in study.user_attrs and not study.get_trials(deepcopy=False):
        study.set_user_attr("lineage", lineage)
    if study.user_attrs.get("lineage") != lineage:
        raise BadInput(
            f"The storage holds a study {study.study_name} that was begun with other settings or checkpoints: give the "
            "experiment another name, or the `storage` setting another database."
        )


def check_folder(study: optuna.Study, folder: Path) -> None:
    """A study belongs to one run folder, which has its trials' locks and shards. Raises `BadInput` for another folder's."""
    path = folder / ".locks" / "folder"
    if not path.exists():
        with atomic_write(path) as partial:
            partial.write_text(secrets.token_hex(16))
    token = path.read_text()
    if "folder" not in study.user_attrs:
        study.set_user_attr("folder", token)
    if study.user_attrs.get("folder") != token:
        raise BadInput(
            f"The storage holds a study {study.study_name} of another run folder: let both share the folder (then `sdlab work` "
            "helps), or give the experiment another name, or the `storage` setting another database."
        )


class AtomicArtifactStore(FileSystemArtifactStore):
    """The folder of the trials' pictures, for optuna-dashboard; each is written whole or not at all."""

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        with atomic_write(self._get_filepath(artifact_id)) as partial, partial.open("wb") as file:
            shutil.copyfileobj(content_body, file)


def count_finished(study: optuna.Study) -> int:
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))


@contextlib.contextmanager
def claim_trial(folder: Path, study: optuna.Study, trials: int) -> Iterator[Trial | None]:
    """Claim the next trial for the block: an interrupted one first, otherwise a new one; None if none is left.

    The claim is a file lock. If this process dies, the next process to ask continues the trial.
    """
    locks = folder / ".locks"
    with contextlib.ExitStack() as claims:
        claimed = None
        with file_lock(locks / study.study_name):  # one process asks at a time
            existing = study.get_trials(deepcopy=False)
            for number in range(trials):
                known = existing[number] if number < len(existing) else None
                if known is not None and known.state.is_finished():
                    continue
                if not claims.enter_context(file_lock(locks / f"{study.study_name}-{number:03d}", wait=False)):
                    continue
                # Its process may have finished it and released the lock since it was read.
                if known is None or not study._storage.get_trial(known._trial_id).state.is_finished():
                    claimed = study.ask() if known is None else Trial(study, known._trial_id)
                    break
        yield claimed


class BufferedStorage:
    """A storage that collects what would be written of a trial instead of writing it."""

    def __init__(self, storage):
        self.storage, self.written = storage, {}

    def __getattr__(self, name: str):
        return getattr(self.storage, name)

    def set_trial_system_attr(self, _: int, key: str, value) -> None:
        self.written[key] = value

    def set_trial_param(self, *_) -> None:
        pass


def without_writing(study: optuna.Study) -> optuna.Study:
    """The same study; it reads the storage and writes nothing of a trial to it."""
    reader = copy.copy(study)
    reader._storage = BufferedStorage(study._storage)
    return reader


def draw_parameters(
    study: optuna.Study,
    trial: Trial,
    distributions: Mapping[str, BaseDistribution],
    sampler: optuna.samplers.BaseSampler,
) -> dict[str, Any]:
    """The trial's parameters, by name.

    They are drawn together and kept with the trial in one piece before the first is written: a sampler would draw the
    others differently for a trial that already has one, such as a trial interrupted in between.
    """
    if "drawn" not in trial.user_attrs:
        reader = without_writing(study)
        reader.sampler = sampler
        draft = Trial(reader, trial._trial_id)
        drawn = {
            name: (draft.suggest_int if isinstance(d, IntDistribution) else draft.suggest_float)(name, d.low, d.high)
            for name, d in distributions.items()
        }
        trial.set_user_attr("drawn", drawn)
    parameters = trial.user_attrs["drawn"]
    for name, distribution in distributions.items():
        if name not in trial.params:
            value = distribution.to_internal_repr(parameters[name])
            study._storage.set_trial_param(trial._trial_id, name, value, distribution)
    return {name: parameters[name] for name in distributions}


def ask_pruner(study: optuna.Study, trial: Trial, images: int) -> bool:
    """The pruner's answer at a rung, asked once.

    The pruner records that it was asked and would answer differently the next time. So its answer and its records are
    kept with the trial in one piece first; an interrupted trial reads them there.
    """
    name = f"answer_{images}"
    if name not in trial.user_attrs:
        reader = without_writing(study)
        pruned = study.pruner.prune(reader, trial._get_latest_trial())
        trial.set_user_attr(name, dict(pruned=bool(pruned), written=reader._storage.written))
    answer = trial.user_attrs[name]
    for key, value in answer["written"].items():
        study._storage.set_trial_system_attr(trial._trial_id, key, value)
    return answer["pruned"]
