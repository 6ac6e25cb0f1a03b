"""TODO runs.studies."""

import contextlib
import copy
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import optuna
import sqlalchemy
from optuna.artifacts import FileSystemArtifactStore
from optuna.trial import Trial

from sdlab.errors import BadInput
from sdlab.runs.files import atomic_write, cannot_write, file_lock, write_errno
from sdlab.runs.run import Run
from sdlab.runs.storage import check_storage, sqlite_file, storage_url
from sdlab.settings import Settings
from sdlab.threads import derive_seed

POLL = 1.0  # seconds between looks at trials that others are at


@dataclass(frozen=True)
class SearchSpace:
    """What one search may choose; all bounds inclusive."""

    num_inference_steps: tuple[int, int]
    guidance_scale: tuple[float, float]
    epoch: tuple[int, int]


def new_pruner(settings: Settings) -> optuna.pruners.BasePruner:
    """Of the resource `images`: rungs at `Settings.rungs()`."""
    if settings.search_pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(
            min_resource=settings.search_first_images,
            max_resource=settings.search_images,
            reduction_factor=settings.search_reduction_factor,
        )
    if settings.search_pruner == "successive_halving":
        return optuna.pruners.SuccessiveHalvingPruner(
            min_resource=settings.search_first_images, reduction_factor=settings.search_reduction_factor
        )
    return optuna.pruners.NopPruner()


def new_sampler(settings: Settings, search: str, number: int) -> optuna.samplers.BaseSampler:
    """TPE whose stream depends on the trial's number alone, so a restarted search asks what it would have asked."""
    return optuna.samplers.TPESampler(
        seed=derive_seed(settings.seed, search, number) % 2**32, n_startup_trials=settings.search_startup_trials
    )


def study_name(settings: Settings, search: str) -> str:
    """Fixed, since Hyperband hashes it to choose a trial's bracket."""
    return f"{settings.experiment}-{search}"


def open_storage(settings: Settings) -> optuna.storages.BaseStorage:
    """SQLite lets one process write at a time: others wait for it, longer than its five seconds."""
    url = storage_url(settings)
    if sqlite_file(settings):
        return optuna.storages.RDBStorage(url, engine_kwargs=dict(connect_args=dict(timeout=120)))
    return optuna.storages.get_storage(url)


def open_study(settings: Settings, search: str) -> optuna.Study:
    """Create or load. Raises `BadInput` for a storage that cannot be reached, or not written."""
    check_storage(settings)
    try:
        return optuna.create_study(
            storage=open_storage(settings),
            study_name=study_name(settings, search),
            direction="maximize",
            pruner=new_pruner(settings),
            load_if_exists=True,
        )
    except sqlalchemy.exc.SQLAlchemyError as error:
        if write_errno(error):
            raise  # `storing` says it
        raise BadInput(
            f"The study cannot be kept in the `storage` of {settings.experiment} ({str(error).splitlines()[0]})."
        ) from None


def rename_study(settings: Settings, search: str, more: str) -> None:
    """Give a study another name, if there is one, so that the search begins anew; the dashboard shows both."""
    name = study_name(settings, search)
    for lock in sorted((settings.run_folder / ".locks").glob(f"{name}-*")):
        with file_lock(lock, wait=False) as free:
            if not free:
                raise BadInput(
                    f"A process is at a trial of {name} (`sdlab work`): wait for it, or stop it; nothing was done."
                )
    file = sqlite_file(settings)
    if file and not file.exists():
        return
    with raise_on_storage_error(settings):
        storage = open_storage(settings)
        if name in optuna.study.get_all_study_names(storage):
            optuna.copy_study(
                from_study_name=name, from_storage=storage, to_storage=storage, to_study_name=f"{name} ({more})"
            )
            optuna.delete_study(study_name=name, storage=storage)


@contextlib.contextmanager
def raise_on_storage_error(settings: Settings) -> Iterator[None]:
    """Raises `BadInput` where the studies' storage fails: its disk is full, it cannot be reached any more."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ or error
        if number := write_errno(cause):
            place = sqlite_file(settings) or f"The `storage` of {settings.experiment}"
            raise BadInput(cannot_write(place, number)) from None
        raise BadInput(
            f"The `storage` of {settings.experiment} failed ({str(cause).splitlines()[0]}): when it is there again, the same "
            "command goes on with the trial that was at work."
        ) from None


def check_lineage(study: optuna.Study, lineage: str) -> None:
    """A study goes on only with what it began with. Raises `BadInput` for one of another experiment, or of an older one."""
    if "lineage" not in study.user_attrs and not study.get_trials(deepcopy=False):
        study.set_user_attr("lineage", lineage)
    if study.user_attrs.get("lineage") != lineage:
        raise BadInput(
            f"The storage holds a study {study.study_name} that was begun with other settings or checkpoints: give the "
            "experiment another name, or the `storage` setting another database."
        )


def check_folder(study: optuna.Study, folder: Path) -> None:
    """A study is one run folder's: its trials' locks, shards and pictures lie there. Raises `BadInput` for another's."""
    path = folder / ".locks" / "folder"
    if not path.exists():
        with atomic_write(path) as beside:
            beside.write_text(secrets.token_hex(16))
    ours = path.read_text()
    if "folder" not in study.user_attrs:
        study.set_user_attr("folder", ours)
    if study.user_attrs.get("folder") != ours:
        raise BadInput(
            f"The storage holds a study {study.study_name} of another run folder: let both share the folder (then `sdlab work` "
            "helps), or give the experiment another name, or the `storage` setting another database."
        )


class AtomicArtifactStore(FileSystemArtifactStore):
    """Where the trials' pictures lie, for optuna-dashboard; each written whole or not at all."""

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        with atomic_write(self._get_filepath(artifact_id)) as beside, beside.open("wb") as file:
            shutil.copyfileobj(content_body, file)


def count_finished(study: optuna.Study) -> int:
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))


@contextlib.contextmanager
def claim_trial(run: Run, study: optuna.Study, trials: int) -> Iterator[Trial | None]:
    """The lowest trial that is neither finished nor at work: one that was cut short, else a new one; None if there is none.

    It is this process's for the block. Where that ends with its process, the next one to ask goes on with the trial.
    """
    locks = run.folder / ".locks"
    with contextlib.ExitStack() as held:
        trial = None
        with file_lock(locks / study.study_name):  # one process asks at a time
            existing = study.get_trials(deepcopy=False)
            for number in range(trials):
                known = existing[number] if number < len(existing) else None
                if known is not None and known.state.is_finished():
                    continue
                if not held.enter_context(file_lock(locks / f"{study.study_name}-{number:03d}", wait=False)):
                    continue
                # Its process may have told it, and let it go, since it was read.
                if known is None or not study._storage.get_trial(known._trial_id).state.is_finished():
                    trial = study.ask() if known is None else Trial(study, known._trial_id)
                    break
        yield trial


class BufferedStorage:
    """A storage that keeps to itself what would be written of a trial."""

    def __init__(self, storage):
        self.storage, self.written = storage, {}

    def __getattr__(self, name: str):
        return getattr(self.storage, name)

    def set_trial_system_attr(self, _: int, key: str, value) -> None:
        self.written[key] = value

    def set_trial_param(self, *_) -> None:
        pass


def without_writing(study: optuna.Study) -> optuna.Study:
    """The same study, which reads the storage and writes nothing of a trial to it."""
    asked = copy.copy(study)
    asked._storage = BufferedStorage(study._storage)
    return asked


def draw_parameters(
    study: optuna.Study, trial: Trial, ranges: SearchSpace, sampler: optuna.samplers.BaseSampler
) -> tuple[int, int, float]:
    """The trial's epoch, steps and guidance.

    They are drawn together and kept with the trial in one piece before any of them is written as its parameter: a sampler
    would draw the others differently for a trial that has one already, as one that was cut in between.
    """
    kinds = dict(
        num_inference_steps=optuna.distributions.IntDistribution(*ranges.num_inference_steps),
        guidance_scale=optuna.distributions.FloatDistribution(*ranges.guidance_scale),
        epoch=optuna.distributions.IntDistribution(*ranges.epoch),
    )
    if "drawn" not in trial.user_attrs:
        asked = without_writing(study)
        asked.sampler = sampler
        drawing = Trial(asked, trial._trial_id)
        trial.set_user_attr(
            "drawn",
            dict(
                num_inference_steps=drawing.suggest_int("num_inference_steps", *ranges.num_inference_steps),
                guidance_scale=drawing.suggest_float("guidance_scale", *ranges.guidance_scale),
                epoch=drawing.suggest_int("epoch", *ranges.epoch),
            ),
        )
    values = trial.user_attrs["drawn"]
    for name, kind in kinds.items():
        if name not in trial.params:
            study._storage.set_trial_param(trial._trial_id, name, kind.to_internal_repr(values[name]), kind)
    return values["epoch"], values["num_inference_steps"], values["guidance_scale"]


def ask_pruner(study: optuna.Study, trial: Trial, images: int) -> bool:
    """The pruner's answer at a rung, asked once.

    It writes down that it was asked, and would answer otherwise the next time. So its answer and what it writes are kept
    with the trial in one piece first: a trial that was cut at any point reads them there.
    """
    name = f"answer_{images}"
    if name not in trial.user_attrs:
        asked = without_writing(study)
        pruned = study.pruner.prune(asked, trial._get_latest_trial())
        trial.set_user_attr(name, dict(pruned=bool(pruned), written=asked._storage.written))
    answer = trial.user_attrs[name]
    for key, value in answer["written"].items():
        study._storage.set_trial_system_attr(trial._trial_id, key, value)
    return answer["pruned"]
