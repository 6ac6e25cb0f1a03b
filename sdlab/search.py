"""Ranges of steps, guidance and epochs -> an Optuna study: steps 2 and 4 of the paper.

The resource of a trial is its images: it is scored at each rung (`Settings.rungs()`), reports the CAS, and is pruned
there if it falls behind; a higher rung extends the lower one's images. All trials use the same noise, so they differ
by their settings alone. What a trial saw is kept with it for optuna-dashboard.

Repeatable and resumable: every ask is seeded from (seed, search, trial number), and a trial that was cut short goes on
under its own number.
"""

import contextlib
import copy
import dataclasses
import os
import secrets
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import optuna
import sqlalchemy
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.trial import Trial, TrialState

from sdlab.base_models import BaseModel
from sdlab.evaluation import OperatingPoint, deciding_split, found_point, judge, make_set, sheet, summary
from sdlab.files import alone, cannot_write, read_json, refusal, sha256_of_json, written_beside
from sdlab.images import ImageDataset
from sdlab.run import Run, check_storage
from sdlab.settings import BadInput, Settings
from sdlab.training import derive_seed

optuna.logging.set_verbosity(optuna.logging.WARNING)
POLL = 1.0  # seconds between looks at trials that others are at


@dataclass(frozen=True)
class Ranges:
    """What one search may choose; all bounds inclusive."""

    num_inference_steps: tuple[int, int]
    guidance_scale: tuple[float, float]
    epoch: tuple[int, int]


def first_ranges(settings: Settings) -> Ranges:
    """Step 2: IS in [5, 50], UGS in [0, 7.5], any Class-Encoder epoch."""
    return Ranges(
        (settings.search_min_steps, settings.search_max_steps),
        (0.0, settings.search_max_guidance),
        (settings.search_1_min_epoch, settings.search_1_max_epoch or settings.class_encoder_epochs),
    )


def final_ranges(settings: Settings, optimum: OperatingPoint) -> Ranges:
    """Step 4: IS in [5, IS*], UGS in [0, 2 UGS*], any UNet epoch, * being the optimum of step 2.

    A range may have shrunk to one value (IS* = 5, UGS* = 0): then that value is used.
    """
    return Ranges(
        (min(settings.search_min_steps, optimum.num_inference_steps), optimum.num_inference_steps),
        (0.0, 2 * optimum.guidance_scale),
        (settings.search_2_min_epoch, settings.search_2_max_epoch or settings.unet_epochs),
    )


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
    if settings.storage_url.startswith("sqlite"):
        return optuna.storages.RDBStorage(settings.storage_url, engine_kwargs=dict(connect_args=dict(timeout=120)))
    return optuna.storages.get_storage(settings.storage_url)


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
        if refusal(error):
            raise  # `storing` says it
        raise BadInput(
            f"The study cannot be kept in the `storage` of {settings.experiment} ({str(error).splitlines()[0]})."
        ) from None


def rename_study(settings: Settings, search: str, more: str) -> None:
    """Give a study another name, if there is one, so that the search begins anew; the dashboard shows both."""
    name = study_name(settings, search)
    for lock in sorted((settings.run_folder / ".locks").glob(f"{name}-*")):
        with alone(lock, wait=False) as free:
            if not free:
                raise BadInput(
                    f"A process is at a trial of {name} (`sdlab work`): wait for it, or stop it; nothing was done."
                )
    if not settings.storage and not (settings.run_folder / "searches.db").exists():
        return
    with storing(settings):
        storage = open_storage(settings)
        if name in optuna.study.get_all_study_names(storage):
            optuna.copy_study(
                from_study_name=name, from_storage=storage, to_storage=storage, to_study_name=f"{name} ({more})"
            )
            optuna.delete_study(study_name=name, storage=storage)


def run_search(
    run: Run,
    base: BaseModel,
    data: ImageDataset,
    search: str,
    ranges: Ranges,
    trials: int,
    point_of: Callable[[int, int, float], OperatingPoint],
    known: OperatingPoint | None = None,
) -> dict:
    """Run or go on with a search until `trials` trials are finished; its result is kept in `metrics/<search>.json`.

    `point_of(epoch, num_inference_steps, guidance_scale)` says which checkpoints an epoch means. `known` is a point
    that earlier steps arrived at: where finalists are scored anew, it is one of them.

    Several processes may be at one search, by `Run(..., helping=True)`: each takes trials that no other is at, and a helper
    returns {} when none is left to take. Which trial sees which others' results depends on their pace then, so such a
    search does not repeat.
    """
    path = run.metrics(search)
    if path.exists():
        return read_json(path)
    settings = run.settings
    with storing(settings):
        with alone(run.folder / ".locks" / "storage"):  # one process makes it
            study = open_study(settings, search)
            check_lineage(study, sha256_of_json([run.record["settings"], run.record["upstream"], run.record["inputs"]]))
            check_folder(study, run.folder)
        artifacts = WholePictures(run.folder / "artifacts")
        done = finished(study)
        with run.progress(total=trials, initial=done, desc=search.replace("_", " "), unit="trial") as bar:
            while done < trials:
                with claimed(run, study, trials) as trial:
                    if trial is not None:
                        sampler = new_sampler(settings, search, trial.number)
                        run_trial(run, base, data, study, trial, ranges, sampler, point_of, artifacts)
                if trial is None:  # the rest is at work elsewhere
                    if run.helping:
                        break
                    time.sleep(POLL)
                done, before = finished(study), done
                bar.update(done - before)
        if run.helping:
            return {}
        finalists = score_finalists(run, base, data, study, known)
        return run.keep(search, export(study, settings, ranges, finalists))


@contextlib.contextmanager
def storing(settings: Settings) -> Iterator[None]:
    """Raises `BadInput` where the studies' storage fails: its disk is full, it cannot be reached any more."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ or error
        if number := refusal(cause):
            place = (
                f"The `storage` of {settings.experiment}" if settings.storage else settings.run_folder / "searches.db"
            )
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
        with written_beside(path) as beside:
            beside.write_text(secrets.token_hex(16))
    ours = path.read_text()
    if "folder" not in study.user_attrs:
        study.set_user_attr("folder", ours)
    if study.user_attrs.get("folder") != ours:
        raise BadInput(
            f"The storage holds a study {study.study_name} of another run folder: let both share the folder (then `sdlab work` "
            "helps), or give the experiment another name, or the `storage` setting another database."
        )


class WholePictures(FileSystemArtifactStore):
    """Where the trials' pictures lie, for optuna-dashboard; each written whole or not at all."""

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        with written_beside(self._get_filepath(artifact_id)) as beside, beside.open("wb") as file:
            shutil.copyfileobj(content_body, file)


def finished(study: optuna.Study) -> int:
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))


@contextlib.contextmanager
def claimed(run: Run, study: optuna.Study, trials: int) -> Iterator[Trial | None]:
    """The lowest trial that is neither finished nor at work: one that was cut short, else a new one; None if there is none.

    It is this process's for the block. Where that ends with its process, the next one to ask goes on with the trial.
    """
    locks = run.folder / ".locks"
    with contextlib.ExitStack() as held:
        trial = None
        with alone(locks / study.study_name):  # one process asks at a time
            existing = study.get_trials(deepcopy=False)
            for number in range(trials):
                known = existing[number] if number < len(existing) else None
                if known is not None and known.state.is_finished():
                    continue
                if not held.enter_context(alone(locks / f"{study.study_name}-{number:03d}", wait=False)):
                    continue
                # Its process may have told it, and let it go, since it was read.
                if known is None or not study._storage.get_trial(known._trial_id).state.is_finished():
                    trial = study.ask() if known is None else Trial(study, known._trial_id)
                    break
        yield trial


def run_trial(run, base, data, study, trial, ranges: Ranges, sampler, point_of, artifacts) -> None:
    """Generate, train, report at each rung, until the last one or until pruned."""
    settings, started = run.settings, time.perf_counter()
    point = point_of(*drawn(study, trial, ranges, sampler))
    split = deciding_split(settings.protocol)
    if split == "test":
        run.note_test_reading(f"{study.study_name}, trial {trial.number}: the paper's protocol maximises test accuracy")
    seed = derive_seed(settings.seed, "search")
    seeds = [derive_seed(settings.seed, "search classifier", i) for i in range(settings.search_classifier_seeds)]
    state, name = TrialState.COMPLETE, f"trial {trial.number}"
    for images in settings.rungs():
        made = make_set(run, base, data, point, images, seed, desc=name)
        scored = judge(
            made.split(images), data, settings, seeds, [split], run.progress, name, True, run.begun / "classifiers"
        )
        cas = summary(scored[split])
        value = cas["mean"]
        with warnings.catch_warnings():  # a resumed trial reports its first rungs again; the first report stays
            warnings.simplefilter("ignore")
            trial.report(value, step=images)
        if images < settings.search_images and is_pruned(study, trial, images):
            state = TrialState.PRUNED
            break
    picture = sheet(made.split(images), run.folder / "pictures" / f"{study.study_name}-{trial.number:03d}.png")
    kept = dict(
        point=asdict(point),
        images=images,
        split=split,
        synthetic=made.folder.name,
        generation_seconds=round(made.seconds(images), 2),
        trial_seconds=round(time.perf_counter() - started, 2),
        process=f"{os.getpid()} on {socket.gethostname()}",
        accuracy=cas["accuracy"],
        balanced_accuracy=cas["balanced"],
        recall=[r if r is None else round(r, 4) for r in cas["recall"]],
    )
    for name, attribute in kept.items():
        trial.set_user_attr(name, attribute)
    if "artifact" not in trial.user_attrs:
        trial.set_user_attr(
            "artifact", upload_artifact(artifact_store=artifacts, file_path=str(picture), study_or_trial=trial)
        )
    study.tell(trial.number, value if state == TrialState.COMPLETE else None, state=state)


class HeldStorage:
    """A storage that keeps to itself what would be written of a trial."""

    def __init__(self, storage):
        self.storage, self.written = storage, {}

    def __getattr__(self, name: str):
        return getattr(self.storage, name)

    def set_trial_system_attr(self, _: int, key: str, value) -> None:
        self.written[key] = value

    def set_trial_param(self, *_) -> None:
        pass


def unwritten(study: optuna.Study) -> optuna.Study:
    """The same study, which reads the storage and writes nothing of a trial to it."""
    asked = copy.copy(study)
    asked._storage = HeldStorage(study._storage)
    return asked


def drawn(
    study: optuna.Study, trial: Trial, ranges: Ranges, sampler: optuna.samplers.BaseSampler
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
        asked = unwritten(study)
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


def is_pruned(study: optuna.Study, trial: Trial, images: int) -> bool:
    """The pruner's answer at a rung, asked once.

    It writes down that it was asked, and would answer otherwise the next time. So its answer and what it writes are kept
    with the trial in one piece first: a trial that was cut at any point reads them there.
    """
    name = f"answer_{images}"
    if name not in trial.user_attrs:
        asked = unwritten(study)
        pruned = study.pruner.prune(asked, trial._get_latest_trial())
        trial.set_user_attr(name, dict(pruned=bool(pruned), written=asked._storage.written))
    answer = trial.user_attrs[name]
    for key, value in answer["written"].items():
        study._storage.set_trial_system_attr(trial._trial_id, key, value)
    return answer["pruned"]


def score_finalists(
    run: Run, base: BaseModel, data: ImageDataset, study: optuna.Study, known: OperatingPoint | None
) -> list[dict]:
    """The best complete trials, best first, scored anew on the deciding split: fresh noise, several classifiers.

    The search's own maximum is the luckiest of many; among the few best, a second look finds the better one. With
    one finalist there is nothing to choose, and nothing is scored (the paper's way).
    """
    settings, split = run.settings, deciding_split(run.settings.protocol)
    complete = sorted(
        study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)), key=lambda t: (-t.value, t.number)
    )
    finalists = [
        dict(number=t.number, value=t.value, point=t.user_attrs["point"]) for t in complete[: settings.search_finalists]
    ]
    if settings.search_finalists == 1:
        return finalists
    if known is not None:
        finalists.append(dict(number="known", value=None, point=asdict(known)))
    seeds = [derive_seed(settings.seed, "finalist classifier", i) for i in range(settings.classifier_seeds)]
    for finalist in finalists:
        name = f"finalist {finalist['number']}"
        if split == "test":
            run.note_test_reading(f"{study.study_name}, {name}: the paper's protocol chooses by test accuracy")
        seed, point = derive_seed(settings.seed, "finalists"), OperatingPoint(**finalist["point"])
        made = make_set(run, base, data, point, settings.search_images, seed, desc=name)
        scored = judge(
            made.split(settings.search_images),
            data,
            settings,
            seeds,
            [split],
            run.progress,
            name,
            True,
            run.begun / "classifiers",
        )
        finalist["again"] = summary(scored[split])
    return sorted(finalists, key=lambda f: -f["again"]["mean"])


def export(study: optuna.Study, settings: Settings, ranges: Ranges, finalists: list[dict]) -> dict:
    """A finished search as plain data: what the notebooks, the importances and the tables read."""
    trials = study.get_trials(deepcopy=False)
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    seen = sum(t.user_attrs["images"] for t in trials)
    return dict(
        study=study.study_name,
        protocol=settings.protocol,
        ranges=asdict(ranges),
        rungs=settings.rungs(),
        counts=dict(trials=len(trials), complete=len(complete), pruned=len(trials) - len(complete)),
        images=dict(generated=seen, without_pruning=len(trials) * settings.search_images),
        best=finalists[0],
        finalists=finalists,
        trials=[
            dict(
                number=t.number,
                state=t.state.name.lower(),
                params=t.params,
                value=t.value,
                intermediate={str(k): v for k, v in sorted(t.intermediate_values.items())},
                generation_seconds=t.user_attrs["generation_seconds"],
                trial_seconds=t.user_attrs["trial_seconds"],
            )
            for t in trials
        ],
    )


def search_class_encoder(run: Run, base: BaseModel, data: ImageDataset) -> dict:
    """Step 2: the best Class-Encoder epoch, IS and UGS."""
    settings = run.settings
    return run_search(
        run, base, data, "search_1", first_ranges(settings), settings.search_1_trials,
        lambda epoch, steps, guidance: OperatingPoint(epoch, 0, steps, guidance),
    )  # fmt: skip


def search_unet(run: Run, base: BaseModel, data: ImageDataset) -> dict:
    """Step 4: the best UNet epoch, IS and UGS, the Class-Encoder staying that of step 2's optimum.

    After 3 (that optimum with the last epoch) is a finalist: few noisy trials may find nothing as good.
    """
    settings, optimum = run.settings, found_point(run, "search_1")
    return run_search(
        run, base, data, "search_2", final_ranges(settings, optimum), settings.search_2_trials,
        lambda epoch, steps, guidance: OperatingPoint(optimum.class_encoder_epoch, epoch, steps, guidance),
        known=dataclasses.replace(optimum, unet_epoch=settings.unet_epochs),
    )  # fmt: skip
