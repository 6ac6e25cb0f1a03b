"""Which search finds the best sampling for the fewest images? The study behind the default of `search_pruner`.

    .venv/bin/python scripts/study_searches.py measure digits    # about an hour on two cores; continues where it stopped
    .venv/bin/python scripts/study_searches.py simulate          # minutes
    .venv/bin/python scripts/study_searches.py parallel          # minutes: what several trials at a time cost and save

`measure` scores a grid of sampling configurations with the checkpoints of a finished experiment: at every rung, and
once more at the last rung with new noise and new classifiers. `simulate` then searches this table with the package's own
samplers and pruners, where the nearest measured point answers a trial. So each strategy can be repeated many times, and
the winner is valued by the second scores, which no search sees.

Both write to runs/searches/. The committed results are in reports/reference/searches/; to replace them, copy the new files.
"""

import dataclasses
import itertools
import json
import math
import warnings
from collections import deque
from functools import partial
from pathlib import Path

import click
import matplotlib.pyplot as plt
import numpy as np
import optuna
import pandas as pd
import yaml
from optuna.trial import TrialState
from scipy.stats import spearmanr
from scipy.stats import t as student
from tqdm import tqdm

from sdlab.base_models import load_base_model
from sdlab.data.datasets import load_dataset
from sdlab.data.images import Split
from sdlab.evaluation import load_optimum, train_and_score_classifiers
from sdlab.generation import generate_images, plan_generation
from sdlab.paths import PROJECT_ROOT
from sdlab.runs.experiment import Experiment
from sdlab.runs.files import write_json
from sdlab.runs.parameters import parameter_file
from sdlab.runs.stages import State, stage_state
from sdlab.sampling_config import SamplingConfig, load_pipeline
from sdlab.search import new_pruner, new_sampler
from sdlab.seeds import derive_seed
from sdlab.settings import Settings

FOLDER = PROJECT_ROOT / "runs" / "searches"
REFERENCE = PROJECT_ROOT / "reports" / "reference" / "searches" / "measured.json"
RUNGS = [125, 250, 500, 1000]  # images
LAST = RUNGS[-1]
STEPS = [5, 7, 10]
GUIDANCE = [0.0, 0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0, 4.5, 7.5]
EPOCHS = [1, 4, 12, 32]
CLASSIFIERS, TRIALS = 2, 50
SILENT = partial(tqdm, disable=True)


@click.group()
def main() -> None:
    """Which search finds the best sampling for the fewest images?"""


@main.command()
@click.argument("experiment")
@click.option("--table", default=FOLDER / "measured.json", type=click.Path(path_type=Path), show_default=False)
def measure(experiment: str, table: Path) -> None:
    """Score every point of the grid with the checkpoints of a finished EXPERIMENT."""
    settings = Settings.from_file(parameter_file(experiment))
    data, base = load_dataset(settings), load_base_model(settings)
    if stage_state(settings, "05").state != State.DONE:
        raise click.ClickException(f"{experiment} is not finished: `sdlab run {experiment}` first.")
    run = Experiment(settings, data, base)
    class_encoder_epoch = load_optimum(run, "search_1").class_encoder_epoch
    measured = json.loads(table.read_text()) if table.exists() else dict(experiment=settings.experiment, points={})
    grid = list(itertools.product(STEPS, GUIDANCE, EPOCHS))
    order = np.random.default_rng(0).permutation(len(grid))  # an incomplete table is still spread over all of it
    for steps, guidance, epoch in tqdm([grid[i] for i in order]):
        name = f"{steps}/{guidance:g}/{epoch}"
        if name in measured["points"]:
            continue
        config = SamplingConfig(
            num_inference_steps=steps,
            guidance_scale=guidance,
            class_encoder_epoch=class_encoder_epoch,
            unet_epoch=epoch,
        )
        pipeline, scores = load_pipeline(run, config), {}
        for noise, rungs in (("search", RUNGS), ("fresh", [LAST])):
            plan = plan_generation(run, config, derive_seed(noise, "study"))
            images = np.concatenate([generate_images(pipeline, plan, range(i, i + 250)) for i in range(0, LAST, 250)])
            for rung in rungs:
                seeds = [derive_seed(noise, "study's classifier", i) for i in range(CLASSIFIERS)]
                train = Split(images[:rung], plan.labels_of(0, rung))
                result = train_and_score_classifiers(run, train, seeds, ["val", "test"], searching=True)
                scores[f"{noise}/{rung}"] = {split: [s.accuracy for s in result[split]] for split in result}
        measured["points"][name] = scores
        write_json(table, measured)


# name -> pruner, images of the first rung, reduction factor, finalists
STRATEGIES = {
    "no pruning": ("none", 1000, 2, 1),
    "Hyperband, eta 2 (the paper's)": ("hyperband", 125, 2, 1),
    "Hyperband, eta 4": ("hyperband", 125, 4, 1),
    "successive halving, eta 2": ("successive_halving", 125, 2, 1),
    "successive halving, eta 4": ("successive_halving", 125, 4, 1),
    "successive halving, eta 8": ("successive_halving", 125, 8, 1),
    "successive halving, eta 4, from 250": ("successive_halving", 250, 4, 1),
    "no pruning, 3 finalists": ("none", 1000, 2, 3),
    "Hyperband, eta 2, 3 finalists": ("hyperband", 125, 2, 3),
    "successive halving, eta 2, 3 finalists": ("successive_halving", 125, 2, 3),
    "successive halving, eta 4, 3 finalists": ("successive_halving", 125, 4, 3),
    "successive halving, eta 8, 3 finalists": ("successive_halving", 125, 8, 3),
    "successive halving, eta 4, from 250, 3 finalists": ("successive_halving", 250, 4, 3),
}


class Table:
    """The measured points. Any other point is answered by the nearest."""

    def __init__(self, path: Path):
        points = json.loads(path.read_text())["points"]
        self.names, self.scores = list(points), list(points.values())
        self.noise = {rung: deviation(self.pairs(f"search/{rung}", "val")) for rung in RUNGS}
        self.places = np.array([self.place(*map(float, name.split("/"))) for name in self.names])

    def pairs(self, scores: str, split: str) -> list[tuple[float, float]]:
        """Scores that differ in the classifier's seed only, of all points that have learned something."""
        return [s[scores][split] for s in self.scores if np.mean(s[f"fresh/{LAST}"]["val"]) > 0.5]

    @staticmethod
    def place(steps: float, guidance: float, epoch: float) -> tuple[float, float, float]:
        """Coordinates with comparable distances: guidance and epochs act by their ratios."""
        return np.log(steps), np.log(guidance + 0.5), np.log(epoch) / 2

    def nearest(self, steps: int, guidance: float, epoch: int) -> int:
        return int(np.square(self.places - self.place(steps, guidance, epoch)).sum(1).argmin())

    def trial_score(self, index: int, rung: int, rng: np.random.Generator) -> float:
        """Score of a trial near this point on validation images: the point's mean, and the noise of one classifier.

        Without the noise, all trials that one point answers would tie, and a pruner promotes ties.
        """
        return float(np.mean(self.scores[index][f"search/{rung}"]["val"]) + rng.normal(0, self.noise[rung]))

    def finalist_score(self, index: int, classifiers: int, rng: np.random.Generator) -> float:
        """Score of a finalist: new noise, the mean of several classifiers."""
        mean = np.mean([self.scores[index][f"{noise}/{LAST}"]["val"] for noise in ("search", "fresh")])
        return float(mean + rng.normal(0, self.noise[LAST] / math.sqrt(classifiers)))

    def worth(self, index: int) -> float:
        """Value of a point: test accuracy of classifiers that no search saw, on images of new noise."""
        return float(np.mean(self.scores[index][f"fresh/{LAST}"]["test"]))


def deviation(pairs: list[tuple[float, float]]) -> float:
    """Standard deviation of one score, pooled over pairs of equal expectation."""
    return math.sqrt(np.mean([(a - b) ** 2 / 2 for a, b in pairs]))


def simulate_search(
    table: Table, settings: Settings, finalists: int, repetition: int
) -> list[tuple[int, float, float]]:
    """(images generated so far, the incumbent's own score, its worth) after each trial, and after the finalists."""
    rng, images, complete, path = np.random.default_rng(repetition), 0, [], []
    study = optuna.create_study(study_name=f"study-{repetition}", direction="maximize", pruner=new_pruner(settings))
    untold = deque()  # trials that the sampler still sees as running
    for number in range(TRIALS):
        while len(untold) >= settings.search_parallel:
            study.tell(*untold.popleft())
        study.sampler = new_sampler(settings, "study", number)
        trial = study.ask()
        steps, guidance = (
            trial.suggest_int("num_inference_steps", 5, 10),
            trial.suggest_float("guidance_scale", 0.0, 7.5),
        )
        index, state = table.nearest(steps, guidance, trial.suggest_int("epoch", 1, 32)), TrialState.COMPLETE
        for rung in settings.rungs():
            score = table.trial_score(index, rung, rng)
            trial.report(score, rung)
            if rung < settings.search_images and trial.should_prune():
                state = TrialState.PRUNED
                break
        images += rung
        untold.append((trial, score if state == TrialState.COMPLETE else None, state))
        complete += [(score, -number, index)] if state == TrialState.COMPLETE else []
        if complete:
            best_score, _, best = max(complete)
            path.append((images, best_score, table.worth(best)))
    if finalists > 1:
        best_few = list(dict.fromkeys(index for _, _, index in sorted(complete, reverse=True)))[:finalists]
        images += len(best_few) * LAST
        scores = {index: table.finalist_score(index, settings.classifier_seeds, rng) for index in best_few}
        best = max(best_few, key=scores.get)
        path.append((images, scores[best], table.worth(best)))
    return path


@main.command()
@click.option("--table", "path", default=REFERENCE, type=click.Path(exists=True, path_type=Path), show_default=False)
@click.option("--folder", default=FOLDER, type=click.Path(path_type=Path), show_default=False)
@click.option("--repetitions", default=60, show_default=True)
def simulate(path: Path, folder: Path, repetitions: int) -> None:
    """Search the measured table with each strategy; write searches.md and searches.png."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    table, paths = Table(path), {}
    for name, (pruner, first, eta, finalists) in tqdm(STRATEGIES.items()):
        paths[name] = []
        for repetition in range(repetitions):
            settings = Settings.from_mapping(dict(
                experiment="study", dataset="digits", seed=repetition, search_pruner=pruner, search_first_images=first,
                search_images=LAST, search_reduction_factor=eta, shard_size=125))  # fmt: skip
            paths[name].append(simulate_search(table, settings, finalists, repetition))
    best = max(table.worth(index) for index in range(len(table.names)))
    text = "\n\n".join([
        f"# {TRIALS}-trial searches, {repetitions} repetitions each",
        f"CAS in %, mean and 95 % interval of the mean. {len(table.names)} points of digits were measured; the nearest one answers a "
        "trial, on validation images, with the noise of one classifier at that rung. The worth of a winner was measured on test images, "
        f"with noise and classifiers that no trial saw (highest of the table: {100 * best:.1f}).",
        strategies_table(paths), noise_floor(table), rank_correlations(table),
        "Made by `python scripts/study_searches.py measure digits` and `... simulate`.",
    ])  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "searches.md").write_text(text + "\n")
    draw(paths, folder / "searches.png")
    print(text)


DEVICES = (1, 2, 4, 8, 16, 64)


@main.command()
@click.option("--table", "path", default=REFERENCE, type=click.Path(exists=True, path_type=Path), show_default=False)
@click.option("--folder", default=FOLDER, type=click.Path(path_type=Path), show_default=False)
@click.option("--repetitions", default=60, show_default=True)
@click.option(
    "--experiment", default="digits", show_default=True, help="Whose costs, measured here, the times come from."
)
def parallel(path: Path, folder: Path, repetitions: int, experiment: str) -> None:
    """What k trials at a time cost in CAS, and save in time on n devices; write parallel.md."""
    from sdlab.data.datasets import dataset_facts
    from sdlab.tools.fan_out import Durations, measure_driver, search_seconds
    from sdlab.tools.measuring import measure as measure_costs

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    table, given, worths, times = Table(path), dict(search_images=LAST, search_first_images=125, shard_size=125), {}, {}
    plain = Settings.from_mapping(yaml.safe_load(parameter_file(experiment).read_text()) | given)
    facts = dataset_facts(plain)
    costs, driver = measure_costs(plain, facts, load_base_model(plain)), measure_driver(plain, facts)
    for k in tqdm((1, 4, 8, 16)):
        settings = dataclasses.replace(plain, search_parallel=k)
        ends = [
            simulate_search(table, dataclasses.replace(settings, seed=r), settings.search_finalists, r)[-1]
            for r in range(repetitions)
        ]
        worths[k] = 100 * np.array([worth for *_, worth in ends])
        times[k] = [search_seconds(n, Durations(settings, facts, costs, driver), "search_1", TRIALS) for n in DEVICES]
    shown = pd.DataFrame([
        {"k": k, "worth": interval(worths[k]), "compared with k = 1": "" if k == 1 else interval(worths[k] - worths[1]),
         **{f"{n} devices": f"{times[1][0] / seconds:.1f}" for n, seconds in zip(DEVICES, times[k], strict=True)}}
        for k in worths
    ])  # fmt: skip
    text = "\n\n".join([
        f"# {TRIALS}-trial searches with k trials at a time, {repetitions} repetitions each",
        f"CAS in %, mean and 95 % interval of the mean, of the search that `simulate` describes ({plain.search_pruner}, eta "
        f"{plain.search_reduction_factor}, rungs {plain.rungs()}, {plain.search_finalists} finalists). Columns of devices: how many times "
        f"faster the trials are than on one device, simulated with the costs of {experiment} on {costs.device} "
        "(`sdlab/tools/fan_out.py`).",
        shown.to_markdown(index=False, disable_numparse=True),
        "Made by `python scripts/study_searches.py parallel`.",
    ])  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "parallel.md").write_text(text + "\n")
    print(text)


def strategies_table(paths: dict[str, list]) -> str:
    lines = [
        "| strategy | images, median | times fewer | winner's own score | its worth | compared with no pruning |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    ends = {name: np.array([path[-1] for path in runs]) * [1, 100, 100] for name, runs in paths.items()}
    unpruned = ends["no pruning"][:, 2]
    for name, (images, own, worth) in ((name, end.T) for name, end in ends.items()):
        difference = "" if name == "no pruning" else interval(worth - unpruned)
        lines.append(
            f"| {name} | {np.median(images):,.0f} | {np.median(TRIALS * LAST / images):.1f} | {own.mean():.1f} | "
            f"{interval(worth)} | {difference} |"
        )
    return "\n".join(lines)


def interval(values: np.ndarray) -> str:
    """Mean and 95 % interval of the mean."""
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return f"{values.mean():.2f} ({values.mean() - half:.2f} to {values.mean() + half:.2f})"


def noise_floor(table: Table) -> str:
    """Deviation of one score when the same trial is repeated."""
    lines = ["| images | validation, new classifier seed | test, new classifier seed |", "| --- | --- | --- |"]
    for rung in RUNGS:
        val, test = (100 * deviation(table.pairs(f"search/{rung}", split)) for split in ("val", "test"))
        lines.append(f"| {rung} | {val:.2f} | {test:.2f} |")
    again = {
        split: np.stack([table.pairs(f"{noise}/{LAST}", split) for noise in ("search", "fresh")], -1).reshape(-1, 2)
        for split in ("val", "test")
    }
    lines.append(
        f"| {LAST}, new noise too | {100 * deviation(again['val']):.2f} | {100 * deviation(again['test']):.2f} |"
    )
    return (
        f"## Noise floor\n\nStandard deviation, in points, of one classifier's CAS when the same trial is repeated ("
        f"{len(again['val']) // CLASSIFIERS} points that have learned something; the validation and test images stay the same).\n\n"
    ) + "\n".join(lines)


def rank_correlations(table: Table) -> str:
    """Correlation of one classifier's score at each rung with the second scores at the last."""
    fresh = np.array([np.mean(s[f"fresh/{LAST}"]["val"]) for s in table.scores])
    better = fresh >= np.median(fresh)
    lines = ["| images | all points | the better half |", "| --- | --- | --- |"]
    for rung in RUNGS:
        scores = np.array([s[f"search/{rung}"]["val"][0] for s in table.scores])
        lines.append(
            f"| {rung} | {spearmanr(scores, fresh)[0]:.2f} | {spearmanr(scores[better], fresh[better])[0]:.2f} |"
        )
    return (
        "## Do small sets rank as large ones do?\n\nSpearman's correlation of one classifier's CAS at a rung with the mean of two at "
        f"{LAST} images of new noise (validation images).\n\n"
    ) + "\n".join(lines)


def draw(paths: dict[str, list], file: Path) -> None:
    """Worth of the incumbent against images generated, mean over repetitions; the end with and without finalists."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    ends = {
        name: (np.median([path[-1][0] for path in runs]), 100 * np.mean([path[-1][2] for path in runs]))
        for name, runs in paths.items()
    }
    for number, name in enumerate(n for n in paths if "finalists" not in n):
        at = np.linspace(2000, max(path[-1][0] for path in paths[name]), 100)
        curve = [
            [next((worth for i, _, worth in reversed(path) if i <= images), path[0][2]) for images in at]
            for path in paths[name]
        ]
        axes.plot(at, 100 * np.mean(curve, 0), lw=1, color=f"C{number}", alpha=0.7)
        axes.plot(*ends[name], "o", color=f"C{number}", label=name)
        with_finalists = name.removesuffix(" (the paper's)") + ", 3 finalists"
        if with_finalists in ends:
            axes.plot(*ends[with_finalists], "s", color=f"C{number}", ms=9, mfc="none", mew=2)
    axes.plot([], [], "s", color="black", ms=9, mfc="none", mew=2, label="the same with 3 finalists")
    axes.set(xscale="log", xlabel="images generated", ylabel="worth of the incumbent (test CAS, %)")
    axes.set_ylim(ends["no pruning"][1] - 3)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
