"""Ranges of inference steps, guidance and epochs -> an Optuna study: stages 2 and 4 of the paper.

The resource of a trial is its images. A trial is scored at each rung (`Settings.rungs()`), reports the CAS, and is pruned
in `run_trial` if it falls behind; a higher rung extends the lower one's images. All trials use the same noise, so they
differ by their settings only (docs/method.md, items 20 and 21).

Repeatable and resumable: every ask is seeded by (seed, search, trial number), and an interrupted trial continues under
its own number (`runs/studies.py`).
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import optuna
from optuna.artifacts import upload_artifact
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from sdlab.data.pixels import save_image_grid
from sdlab.evaluation import deciding_split, load_optimum, summarize, train_and_score_classifiers
from sdlab.generation import generate_set
from sdlab.runs import studies
from sdlab.runs.files import read_json
from sdlab.runs.run import Run
from sdlab.runs.shards import read_shards
from sdlab.runs.stages import search_lineage
from sdlab.sampling_config import SamplingConfig
from sdlab.seeds import derive_seed
from sdlab.settings import Settings
from sdlab.threads import map_in_order

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """The ranges of one search; all bounds inclusive."""

    num_inference_steps: tuple[int, int]
    guidance_scale: tuple[float, float]
    epoch: tuple[int, int]  # of the Class-Encoder in stage 2, of the UNet in stage 4

    def distributions(self) -> dict[str, BaseDistribution]:
        return dict(
            num_inference_steps=IntDistribution(*self.num_inference_steps),
            guidance_scale=FloatDistribution(*self.guidance_scale),
            epoch=IntDistribution(*self.epoch),
        )


@dataclass(frozen=True, kw_only=True)
class Search:
    """One of the two searches: its space, and the config that a trial's parameters mean."""

    name: str  # search_1 or search_2
    space: SearchSpace
    trials: int
    config_of: Callable[..., SamplingConfig]  # of the parameters, by name
    known: SamplingConfig | None = None  # an earlier stage's config: a finalist, too


def first_search_space(settings: Settings) -> SearchSpace:
    """Stage 2: IS in [5, 50], UGS in [0, 7.5], any Class-Encoder epoch."""
    s = settings
    return SearchSpace(
        num_inference_steps=(s.search_min_inference_steps, s.search_max_inference_steps),
        guidance_scale=(0.0, s.search_max_guidance_scale),
        epoch=(s.search_1_min_epoch, s.search_1_max_epoch or s.class_encoder_epochs),
    )


def final_search_space(settings: Settings, optimum: SamplingConfig) -> SearchSpace:
    """Stage 4: IS in [5, IS*], UGS in [0, 2 UGS*], any UNet epoch; * is the optimum of stage 2.

    A range may shrink to one value (IS* = 5, UGS* = 0), which is then used.
    """
    s, steps = settings, optimum.num_inference_steps
    return SearchSpace(
        num_inference_steps=(min(s.search_min_inference_steps, steps), steps),
        guidance_scale=(0.0, 2 * optimum.guidance_scale),
        epoch=(s.search_2_min_epoch, s.search_2_max_epoch or s.unet_epochs),
    )


def search_class_encoder(run: Run) -> dict:
    """Stage 2: the best IS, UGS and Class-Encoder epoch."""
    settings = run.settings

    def config_of(*, epoch: int, **sampling) -> SamplingConfig:
        return SamplingConfig(**sampling, class_encoder_epoch=epoch)

    space = first_search_space(settings)
    return run_search(run, Search(name="search_1", space=space, trials=settings.search_1_trials, config_of=config_of))


def search_unet(run: Run) -> dict:
    """Stage 4: the best IS, UGS and UNet epoch; the Class-Encoder stays that of stage 2's optimum.

    After 3 (that optimum with the last UNet epoch) is a finalist: a few noisy trials may find nothing as good.
    """
    settings, optimum = run.settings, load_optimum(run, "search_1")

    def config_of(*, epoch: int, **sampling) -> SamplingConfig:
        return SamplingConfig(**sampling, class_encoder_epoch=optimum.class_encoder_epoch, unet_epoch=epoch)

    space, known = final_search_space(settings, optimum), replace(optimum, unet_epoch=settings.unet_epochs)
    return run_search(
        run, Search(name="search_2", space=space, trials=settings.search_2_trials, config_of=config_of, known=known)
    )


def new_pruner(settings: Settings) -> optuna.pruners.BasePruner:
    """Its resource is a trial's images: rungs at `Settings.rungs()`."""
    s = settings
    if s.search_pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(s.search_first_images, s.search_images, s.search_reduction_factor)
    if s.search_pruner == "successive_halving":
        return optuna.pruners.SuccessiveHalvingPruner(s.search_first_images, s.search_reduction_factor)
    return optuna.pruners.NopPruner()


def new_sampler(settings: Settings, search: str, number: int) -> optuna.samplers.BaseSampler:
    """TPE whose random stream depends on the trial's number only: a restarted search asks the same.

    Of several trials at a time, those that still run count as bad ones ("constant liar"), so that the next goes elsewhere.
    """
    seed, several = derive_seed(settings.seed, search, number) % 2**32, settings.search_parallel > 1
    startup = settings.search_startup_trials
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=several)


# ------------------------------------------------------------------------------------------------- the search


def run_search(run: Run, search: Search) -> dict:
    """Run or continue a search until `search.trials` trials are finished; the result is saved in `metrics/<name>.json`.

    `search_parallel` trials run at a time. Their order in the study does not depend on their pace (`studies.TrialOrder`), so
    the search repeats.
    """
    path, settings = run.metrics_path(search.name), run.settings
    if path.exists():
        return read_json(path)
    with studies.raise_on_storage_error(settings):
        study = studies.open_study(settings, search.name, new_pruner(settings))
        studies.check_lineage(study, search_lineage(run.record))
        studies.check_folder(study, run.folder)
        artifacts = studies.AtomicArtifactStore(run.folder / "artifacts")
        finished, parallel = studies.count_finished(study), settings.search_parallel
        executor = run.executor  # made here, where torch has all its threads
        order = studies.TrialOrder(finished, parallel)
        with run.progress(
            total=search.trials, initial=finished, desc=search.name.replace("_", " "), unit="trial"
        ) as bar:

            def run_one(number: int) -> None:
                run_trial(run, search, study, order, number, artifacts)
                bar.update()

            def stop() -> None:
                order.stop()
                executor.cancel()

            map_in_order(run_one, range(finished, search.trials), parallel, stop)
        finalists = score_finalists(run, search, study)
        return run.save_metrics(search.name, export_search(study, settings, search.space, finalists))


def run_trial(
    run: Run, search: Search, study: optuna.Study, order: studies.TrialOrder, number: int,
    artifacts: studies.AtomicArtifactStore,
) -> None:  # fmt: skip
    """Generate, train, report the CAS at each rung, up to the last one or until pruned."""
    settings, started = run.settings, time.perf_counter()
    with order.asking(number):
        trial = studies.open_trial(study, number)
        sampler = new_sampler(settings, search.name, number)
        space, parallel = search.space.distributions(), settings.search_parallel
        config = search.config_of(**studies.draw_parameters(study, trial, space, sampler, parallel))
    split, name = deciding_split(settings.protocol), f"trial {number}"
    if split == "test":
        run.record_test_reading(f"{study.study_name}, {name}: the paper's protocol maximises test accuracy")
    seed = derive_seed(settings.seed, "search")
    seeds = [derive_seed(settings.seed, "search classifier", i) for i in range(settings.search_classifier_seeds)]
    state = TrialState.COMPLETE
    for rung, images in enumerate(settings.rungs()):
        synthetic_set = generate_set(run, config, images, seed, desc=name, priority=number)
        subset = synthetic_set.split(images)
        scores = train_and_score_classifiers(run, subset, seeds, [split], name, searching=True, priority=number)
        cas = summarize(scores[split])
        with order.judging(number, rung), warnings.catch_warnings():  # of a resumed trial the first report stays
            warnings.simplefilter("ignore")
            trial.report(cas["mean"], step=images)
            pruned = images < settings.search_images and studies.ask_pruner(study, trial, images)
        if pruned:
            state = TrialState.PRUNED
            break
    order.end(number)
    grid = run.folder / "pictures" / f"{study.study_name}-{number:03d}.png"
    save_image_grid(subset.images, grid)
    attributes = dict(
        config=asdict(config),
        images=images,
        split=split,
        synthetic=synthetic_set.folder.name,
        generation_seconds=round(synthetic_set.seconds(images), 2),
        trial_seconds=round(time.perf_counter() - started, 2),
        accuracy=cas["accuracy"],
        balanced_accuracy=cas["balanced"],
        recall=[r if r is None else round(r, 4) for r in cas["recall"]],
    )
    with order.telling(number):
        for key, value in attributes.items():
            trial.set_user_attr(key, value)
        if "artifact" not in trial.user_attrs:
            artifact = upload_artifact(artifact_store=artifacts, file_path=str(grid), study_or_trial=trial)
            trial.set_user_attr("artifact", artifact)
        study.tell(number, cas["mean"] if state == TrialState.COMPLETE else None, state=state)


def trial_images(run: Run, trial: dict, count: int) -> np.ndarray:
    """The first images that an exported trial's classifiers saw: uint8 (count, 3, h, w)."""
    return next(read_shards(run.folder / "synthetic" / trial["synthetic"], count))[0]


def score_finalists(run: Run, search: Search, study: optuna.Study) -> list[dict]:
    """The best complete trials, scored again on the deciding split with fresh noise and several classifiers, best first.

    The search's maximum is the luckiest of many; a second look at the best few finds the better one. With one finalist
    there is nothing to choose, and nothing is scored (the paper's way).
    """
    settings, split = run.settings, deciding_split(run.settings.protocol)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    best = sorted(complete, key=lambda t: (-t.value, t.number))[: settings.search_finalists]
    finalists = [dict(number=t.number, value=t.value, config=t.user_attrs["config"]) for t in best]
    if settings.search_finalists == 1:
        return finalists
    if search.known is not None:
        finalists.append(dict(number="known", value=None, config=asdict(search.known)))
    seeds = [derive_seed(settings.seed, "finalist classifier", i) for i in range(settings.classifier_seeds)]

    def score_again(finalist: dict) -> None:
        name, count = f"finalist {finalist['number']}", settings.search_images
        if split == "test":
            run.record_test_reading(f"{study.study_name}, {name}: the paper's protocol chooses by test accuracy")
        config, seed = SamplingConfig(**finalist["config"]), derive_seed(settings.seed, "finalists")
        images = generate_set(run, config, count, seed, desc=name).split(count)
        scores = train_and_score_classifiers(run, images, seeds, [split], name, searching=True)
        finalist["again"] = summarize(scores[split])

    map_in_order(score_again, finalists, run.executor.callers(len(seeds)), run.executor.cancel)
    return sorted(finalists, key=lambda f: -f["again"]["mean"])


def export_search(study: optuna.Study, settings: Settings, space: SearchSpace, finalists: list[dict]) -> dict:
    """A finished search as plain data, which notebooks, importances and tables read."""
    # A database that was away may have kept a trial whose number nobody was told: it never runs.
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    complete = sum(t.state == TrialState.COMPLETE for t in trials)
    return dict(
        study=study.study_name,
        protocol=settings.protocol,
        ranges=asdict(space),
        rungs=settings.rungs(),
        counts=dict(trials=len(trials), complete=complete, pruned=len(trials) - complete),
        images=dict(
            generated=sum(t.user_attrs["images"] for t in trials), without_pruning=len(trials) * settings.search_images
        ),
        best=finalists[0],
        finalists=finalists,
        trials=[
            dict(
                number=t.number,
                state=t.state.name.lower(),
                params=t.params,
                value=t.value,
                intermediate={str(images): cas for images, cas in sorted(t.intermediate_values.items())},
                config=t.user_attrs["config"],
                synthetic=t.user_attrs["synthetic"],
                generation_seconds=t.user_attrs["generation_seconds"],
                trial_seconds=t.user_attrs["trial_seconds"],
            )
            for t in trials
        ],
    )
