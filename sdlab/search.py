"""Ranges of steps, guidance and epochs -> an Optuna study: steps 2 and 4 of the paper.

The resource of a trial is its images: it is scored at each rung (`Settings.rungs()`), reports the CAS, and is pruned
there if it falls behind; a higher rung extends the lower one's images. All trials use the same noise, so they differ
by their settings alone. What a trial saw is kept with it for optuna-dashboard.

Repeatable and resumable: every ask is seeded from (seed, search, trial number), and a trial that was cut short goes on
under its own number.
"""

import dataclasses
import os
import socket
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict

import optuna
from optuna.artifacts import upload_artifact
from optuna.trial import TrialState

from sdlab.base_models import BaseModel
from sdlab.data.images import ImageDataset
from sdlab.data.pixels import save_image_grid
from sdlab.evaluation import deciding_split, load_optimum, summarize, train_and_score_classifiers
from sdlab.generation import SamplingConfig, generate_set
from sdlab.runs.files import file_lock, read_json
from sdlab.runs.records import search_lineage
from sdlab.runs.run import Run
from sdlab.runs.studies import (
    POLL,
    AtomicArtifactStore,
    SearchSpace,
    ask_pruner,
    check_folder,
    check_lineage,
    claim_trial,
    count_finished,
    draw_parameters,
    new_sampler,
    open_study,
    raise_on_storage_error,
)
from sdlab.settings import Settings
from sdlab.threads import derive_seed

optuna.logging.set_verbosity(optuna.logging.WARNING)


def first_search_space(settings: Settings) -> SearchSpace:
    """Step 2: IS in [5, 50], UGS in [0, 7.5], any Class-Encoder epoch."""
    return SearchSpace(
        (settings.search_min_steps, settings.search_max_steps),
        (0.0, settings.search_max_guidance),
        (settings.search_1_min_epoch, settings.search_1_max_epoch or settings.class_encoder_epochs),
    )


def final_search_space(settings: Settings, optimum: SamplingConfig) -> SearchSpace:
    """Step 4: IS in [5, IS*], UGS in [0, 2 UGS*], any UNet epoch, * being the optimum of step 2.

    A range may have shrunk to one value (IS* = 5, UGS* = 0): then that value is used.
    """
    return SearchSpace(
        (min(settings.search_min_steps, optimum.num_inference_steps), optimum.num_inference_steps),
        (0.0, 2 * optimum.guidance_scale),
        (settings.search_2_min_epoch, settings.search_2_max_epoch or settings.unet_epochs),
    )


def run_search(
    run: Run,
    base: BaseModel,
    data: ImageDataset,
    search: str,
    ranges: SearchSpace,
    trials: int,
    point_of: Callable[[int, int, float], SamplingConfig],
    known: SamplingConfig | None = None,
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
    with raise_on_storage_error(settings):
        with file_lock(run.folder / ".locks" / "storage"):  # one process makes it
            study = open_study(settings, search)
            check_lineage(study, search_lineage(run.record))
            check_folder(study, run.folder)
        artifacts = AtomicArtifactStore(run.folder / "artifacts")
        done = count_finished(study)
        with run.progress(total=trials, initial=done, desc=search.replace("_", " "), unit="trial") as bar:
            while done < trials:
                with claim_trial(run, study, trials) as trial:
                    if trial is not None:
                        sampler = new_sampler(settings, search, trial.number)
                        run_trial(run, base, data, study, trial, ranges, sampler, point_of, artifacts)
                if trial is None:  # the rest is at work elsewhere
                    if run.helping:
                        break
                    time.sleep(POLL)
                done, before = count_finished(study), done
                bar.update(done - before)
        if run.helping:
            return {}
        finalists = score_finalists(run, base, data, study, known)
        return run.keep(search, export_search(study, settings, ranges, finalists))


def run_trial(run, base, data, study, trial, ranges: SearchSpace, sampler, point_of, artifacts) -> None:
    """Generate, train, report at each rung, until the last one or until pruned."""
    settings, started = run.settings, time.perf_counter()
    point = point_of(*draw_parameters(study, trial, ranges, sampler))
    split = deciding_split(settings.protocol)
    if split == "test":
        run.note_test_reading(f"{study.study_name}, trial {trial.number}: the paper's protocol maximises test accuracy")
    seed = derive_seed(settings.seed, "search")
    seeds = [derive_seed(settings.seed, "search classifier", i) for i in range(settings.search_classifier_seeds)]
    state, name = TrialState.COMPLETE, f"trial {trial.number}"
    for images in settings.rungs():
        made = generate_set(run, base, data, point, images, seed, desc=name)
        scored = train_and_score_classifiers(
            made.split(images), data, settings, seeds, [split], run.progress, name, True, run.begun / "classifiers"
        )
        cas = summarize(scored[split])
        value = cas["mean"]
        with warnings.catch_warnings():  # a resumed trial reports its first rungs again; the first report stays
            warnings.simplefilter("ignore")
            trial.report(value, step=images)
        if images < settings.search_images and ask_pruner(study, trial, images):
            state = TrialState.PRUNED
            break
    picture = save_image_grid(
        made.split(images).images, run.folder / "pictures" / f"{study.study_name}-{trial.number:03d}.png"
    )
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


def score_finalists(
    run: Run, base: BaseModel, data: ImageDataset, study: optuna.Study, known: SamplingConfig | None
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
        seed, point = derive_seed(settings.seed, "finalists"), SamplingConfig(**finalist["point"])
        made = generate_set(run, base, data, point, settings.search_images, seed, desc=name)
        scored = train_and_score_classifiers(
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
        finalist["again"] = summarize(scored[split])
    return sorted(finalists, key=lambda f: -f["again"]["mean"])


def export_search(study: optuna.Study, settings: Settings, ranges: SearchSpace, finalists: list[dict]) -> dict:
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
        run, base, data, "search_1", first_search_space(settings), settings.search_1_trials,
        lambda epoch, steps, guidance: SamplingConfig(epoch, 0, steps, guidance),
    )  # fmt: skip


def search_unet(run: Run, base: BaseModel, data: ImageDataset) -> dict:
    """Step 4: the best UNet epoch, IS and UGS, the Class-Encoder staying that of step 2's optimum.

    After 3 (that optimum with the last epoch) is a finalist: few noisy trials may find nothing as good.
    """
    settings, optimum = run.settings, load_optimum(run, "search_1")
    return run_search(
        run, base, data, "search_2", final_search_space(settings, optimum), settings.search_2_trials,
        lambda epoch, steps, guidance: SamplingConfig(optimum.class_encoder_epoch, epoch, steps, guidance),
        known=dataclasses.replace(optimum, unet_epoch=settings.unet_epochs),
    )  # fmt: skip
