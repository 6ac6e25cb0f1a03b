"""Optuna's bookkeeping: where a study is stored, in which order its trials are asked, judged and told, and asks that an
interruption cannot change.

A trial's parameters and a pruner's answers are kept in one piece before they act: Optuna writes them one by one, and a
sampler or pruner that is asked again in between answers differently.
"""

import contextlib
import copy
import math
import secrets
import shutil
import threading
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, BinaryIO

import optuna
import sqlalchemy
from optuna.artifacts import FileSystemArtifactStore
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from sdlab.errors import BadInput
from sdlab.runs.files import atomic_write, cannot_write, write_errno
from sdlab.runs.patient_storage import PatientStorage
from sdlab.runs.storage import check_storage, sqlite_file, storage_url
from sdlab.settings import Settings


def study_name(settings: Settings, search: str) -> str:
    """Fixed, since Hyperband hashes it to choose a trial's bracket."""
    return f"{settings.experiment}-{search}"


def open_storage(settings: Settings) -> optuna.storages.BaseStorage:
    """SQLite lets one process write at a time; the others wait longer than its default of five seconds. A server may be away."""
    url = storage_url(settings)
    if sqlite_file(settings):
        return optuna.storages.RDBStorage(url, engine_kwargs=dict(connect_args=dict(timeout=120)))
    return optuna.storages.get_storage(PatientStorage(url))


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
    """A study belongs to one run folder, which has its trials' shards. Raises `BadInput` for another folder's."""
    path = folder / ".locks" / "folder"
    if not path.exists():
        with atomic_write(path) as partial:
            partial.write_text(secrets.token_hex(16))
    token = path.read_text()
    if "folder" not in study.user_attrs:
        study.set_user_attr("folder", token)
    if study.user_attrs.get("folder") != token:
        raise BadInput(
            f"The storage holds a study {study.study_name} of another run folder: give the "
            "experiment another name, or the `storage` setting another database."
        )


class AtomicArtifactStore(FileSystemArtifactStore):
    """The folder of the trials' pictures, for optuna-dashboard; each is written whole or not at all."""

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        with atomic_write(self._get_filepath(artifact_id)) as partial, partial.open("wb") as file:
            shutil.copyfileobj(content_body, file)


def count_finished(study: optuna.Study) -> int:
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))


class TrialOrder:
    """The order in which trials that run at a time are asked, judged and told: it does not depend on their pace.

    Trials are asked and told in order; trial n is asked once trial n - `parallel` is told. Rung r of a trial is judged after
    rung r of each earlier trial that is still alive. With one trial at a time this is the usual order.
    """

    def __init__(self, told: int, parallel: int):
        self.asked = self.told = told
        self.parallel = parallel
        self.rungs: dict[
            int, float
        ] = {}  # trial that is not told yet -> rungs that it has passed; infinite once it ended
        self.changed, self.stopped = threading.Condition(), False

    @contextlib.contextmanager
    def turn(self, has_come: Callable[[], bool]) -> Iterator[None]:
        """The block runs alone, once its turn has come. Raises `CancelledError` after `stop`."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or has_come())
            if self.stopped:
                raise CancelledError
            yield
            self.changed.notify_all()

    @contextlib.contextmanager
    def asking(self, number: int) -> Iterator[None]:
        with self.turn(lambda: self.asked == number and self.told > number - self.parallel):
            yield
            self.asked += 1
            self.rungs[number] = 0

    @contextlib.contextmanager
    def judging(self, number: int, rung: int) -> Iterator[None]:
        with self.turn(lambda: all(self.rungs[before] > rung for before in range(self.told, number))):
            yield
            self.rungs[number] = rung + 1

    def end(self, number: int) -> None:
        """The trial passes no further rung."""
        with self.turn(lambda: True):
            self.rungs[number] = math.inf

    @contextlib.contextmanager
    def telling(self, number: int) -> Iterator[None]:
        with self.turn(lambda: self.told == number):
            yield
            self.told += 1

    def stop(self) -> None:
        """Nobody's turn comes any more: a trial failed, or was interrupted."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()


def open_trial(study: optuna.Study, number: int) -> Trial:
    """An interrupted trial of that number, or a new one."""
    if number >= len(study.get_trials(deepcopy=False)):
        study.ask()  # a server whose answer was lost is asked again, and may have two trials then
    return Trial(study, study.get_trials(deepcopy=False)[number]._trial_id)


class BufferedStorage:
    """A storage that collects what would be written of a trial instead of writing it.

    Trials from number `running` on are shown as running, even if their scores are here already.
    """

    def __init__(self, storage, running: float):
        self.storage, self.running, self.written = storage, running, {}

    def __getattr__(self, name: str):
        return getattr(self.storage, name)

    def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list:
        trials = self.storage.get_all_trials(study_id, deepcopy=False)
        trials = [as_running(trial) if trial.number >= self.running else trial for trial in trials]
        return [trial for trial in trials if states is None or trial.state in states]

    def set_trial_system_attr(self, _: int, key: str, value) -> None:
        self.written[key] = value

    def set_trial_param(self, *_) -> None:
        pass


def as_running(trial: FrozenTrial) -> FrozenTrial:
    shown = copy.copy(trial)
    shown.state, shown.values = TrialState.RUNNING, None
    return shown


def without_writing(study: optuna.Study, running: float = math.inf) -> optuna.Study:
    """The same study; it reads the storage, and writes nothing of a trial to it."""
    reader = copy.copy(study)
    reader._storage = BufferedStorage(study._storage, running)
    return reader


def draw_parameters(
    study: optuna.Study,
    trial: Trial,
    distributions: Mapping[str, BaseDistribution],
    sampler: optuna.samplers.BaseSampler,
    parallel: int = 1,
) -> dict[str, Any]:
    """The trial's parameters, by name. The sampler sees the `parallel` - 1 trials before it as running.

    They are drawn together and kept with the trial in one piece before the first is written: a sampler would draw the
    others differently for a trial that already has one, such as a trial interrupted in between.
    """
    if "drawn" not in trial.user_attrs:
        reader = without_writing(study, trial.number - parallel + 1)
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
