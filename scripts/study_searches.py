"""Which search finds the most for the fewest images: pruners compared on one table of measured points, many times over.

    .venv/bin/python scripts/study_searches.py measure runs/digits     # an hour of two cores; goes on where it was cut
    .venv/bin/python scripts/study_searches.py simulate                # minutes: table, figure

`measure` scores a grid of operating points of a finished experiment at every rung, and once more at the last one with
fresh noise and classifiers. `simulate` lets the package's own samplers and pruners search that table (a point is the
nearest one measured), so that each strategy can be repeated a hundred times; what its winner is worth is read from the
fresh scores, which no search sees.
"""

import itertools
import json
import math
from pathlib import Path

import click
import matplotlib.pyplot as plt
import numpy as np
import optuna
from compare_samplers import Experiment, silent
from optuna.trial import TrialState
from scipy.stats import spearmanr
from scipy.stats import t as student
from tqdm import tqdm

from sdlab.base_models import load_base_model
from sdlab.data.datasets import load_dataset
from sdlab.data.images import Split
from sdlab.evaluation import train_and_score_classifiers
from sdlab.generation import GenerationPlan, SamplingConfig, generate_images, load_pipeline, uniform_labels
from sdlab.runs.files import read_json, write_json
from sdlab.runs.studies import new_pruner, new_sampler
from sdlab.seeds import derive_seed
from sdlab.settings import Settings

TABLE = Path(__file__).resolve().parents[1] / "reports" / "reference" / "searches" / "measured.json"
RUNGS = [125, 250, 500, 1000]
STEPS = [5, 7, 10]
GUIDANCE = [0.0, 0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0, 4.5, 7.5]
EPOCHS = [1, 4, 12, 32]
CLASSIFIERS, TRIALS = 2, 50


@click.group()
def main() -> None:
    pass


# ------------------------------------------------------------------------------------------------------ measure


@main.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--table", default=TABLE, type=click.Path(path_type=Path))
def measure(folder: Path, table: Path) -> None:
    """Score every point of the grid with the checkpoints of the experiment in FOLDER."""
    run = Experiment(folder)
    data, base = load_dataset(run.settings), load_base_model(run.settings)
    class_encoder_epoch = read_json(folder / "metrics" / "search_1.json")["best"]["point"]["class_encoder_epoch"]
    kept = json.loads(table.read_text()) if table.exists() else dict(experiment=run.settings.experiment, points={})
    grid = list(itertools.product(STEPS, GUIDANCE, EPOCHS))
    np.random.default_rng(0).shuffle(grid)  # a table that was cut is still spread over all of it
    for number, (steps, guidance, epoch) in enumerate(grid):
        name = f"{int(steps)}/{guidance:g}/{int(epoch)}"
        if name in kept["points"]:
            continue
        point = SamplingConfig(class_encoder_epoch, int(epoch), int(steps), float(guidance))
        pipeline = load_pipeline(run, base, point)
        scores = {}
        for noise, rungs in (("search", RUNGS), ("fresh", RUNGS[-1:])):
            images = made(run, pipeline, point, data.num_classes, noise)
            for rung in rungs:
                seeds = [derive_seed(noise, "study's classifier", i) for i in range(CLASSIFIERS)]
                scored = train_and_score_classifiers(
                    head(images, rung), data, run.settings, seeds, ["val", "test"], silent, searching=True
                )
                scores[f"{noise}/{rung}"] = {split: [s.accuracy for s in scored[split]] for split in scored}
        kept["points"][name] = scores
        write_json(table, kept)
        print(f"{number + 1} of {len(grid)}: {name}, {scores['fresh/1000']['test']}", flush=True)


def head(split: Split, count: int) -> Split:
    return Split(split.images[:count], split.labels[:count])


def made(run: Experiment, pipeline, point: SamplingConfig, num_classes: int, noise: str) -> Split:
    s, labels = run.settings, uniform_labels(num_classes)
    plan = GenerationPlan("", s.scheduler, point.num_inference_steps, point.guidance_scale, (0.0, 1.0), labels,
                          derive_seed(noise, "study"), s.base_image_size, s.image_size, s.shard_size)  # fmt: skip
    shards = [generate_images(pipeline, plan, range(first, first + 250)) for first in range(0, RUNGS[-1], 250)]
    return Split(np.concatenate(shards), plan.labels_of(0, RUNGS[-1]))


# ----------------------------------------------------------------------------------------------------- simulate

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
CHOSEN = "successive halving, eta 8, 3 finalists"


class Table:
    """Measured points; any other is answered by the nearest."""

    def __init__(self, path: Path):
        points = json.loads(path.read_text())["points"]
        self.names = list(points)
        self.scores = list(points.values())
        self.noises = {rung: self.noise(rung) for rung in RUNGS}
        self.places = np.array([self.place(*map(float, name.split("/"))) for name in self.names])

    @staticmethod
    def place(steps: float, guidance: float, epoch: float) -> tuple[float, float, float]:
        """Comparable distances: guidance and epochs act by their ratios."""
        return np.log(steps), np.log(guidance + 0.5), np.log(epoch) / 2

    def nearest(self, steps: int, guidance: float, epoch: int) -> int:
        return int(np.square(self.places - self.place(steps, guidance, epoch)).sum(1).argmin())

    def noisy(self, index: int, rung: int, rng: np.random.Generator) -> float:
        """What a trial near this point would have scored on validation images: the point's mean, and noise of one classifier.

        Without it all trials that are answered by one point would tie, and a pruner promotes ties.
        """
        return float(np.mean(self.scores[index][f"search/{rung}"]["val"]) + rng.normal(0, self.noises[rung]))

    def again(self, index: int, classifiers: int, rng: np.random.Generator) -> float:
        """A finalist's second look: fresh noise, the mean of several classifiers."""
        known = np.mean([self.scores[index][f"{noise}/1000"]["val"] for noise in ("search", "fresh")])
        return float(known + rng.normal(0, self.noises[RUNGS[-1]] / math.sqrt(classifiers)))

    def noise(self, rung: int) -> float:
        """Deviation of one classifier's reading at a rung, the seed alone being drawn anew."""
        learned = [s[f"search/{rung}"]["val"] for s in self.scores if np.mean(s["fresh/1000"]["val"]) > 0.5]
        return math.sqrt(np.mean([(a - b) ** 2 / 2 for a, b in learned]))


def one_search(table: Table, settings: Settings, finalists: int, repetition: int) -> list[tuple[int, float, float]]:
    """(images generated so far, incumbent's own score, what it is worth) after each trial; the last after the finalists."""
    rng, images, complete, path = np.random.default_rng(repetition), 0, [], []
    study = optuna.create_study(study_name=f"study-{repetition}", direction="maximize", pruner=new_pruner(settings))
    for number in range(TRIALS):
        study.sampler = new_sampler(settings, "study", number)
        trial = study.ask()
        asked = (trial.suggest_int("num_inference_steps", 5, 10), trial.suggest_float("guidance_scale", 0.0, 7.5),
                 trial.suggest_int("epoch", 1, 32))  # fmt: skip
        index, state = table.nearest(*asked), TrialState.COMPLETE
        for rung in settings.rungs():
            value = table.noisy(index, rung, rng)
            trial.report(value, rung)
            if rung < settings.search_images and trial.should_prune():
                state = TrialState.PRUNED
                break
        images += rung
        study.tell(trial, value if state == TrialState.COMPLETE else None, state=state)
        complete += [(value, -number, index)] if state == TrialState.COMPLETE else []
        if complete:
            best = max(complete)
            path.append((images, best[0], worth(table, best[2])))
    few = list(dict.fromkeys(index for _, _, index in sorted(complete, reverse=True)))[:finalists]
    if finalists > 1:
        images += len(few) * RUNGS[-1]
        again = {index: table.again(index, settings.classifier_seeds, rng) for index in few}
        best = max(few, key=again.get)
        path.append((images, again[best], worth(table, best)))
    return path


def worth(table: Table, index: int) -> float:
    """Of a point: classifiers that no search saw, on fresh noise and test images."""
    return float(np.mean(table.scores[index]["fresh/1000"]["test"]))


@main.command()
@click.option("--table", "path", default=TABLE, type=click.Path(exists=True, path_type=Path))
@click.option("--repetitions", default=60, show_default=True)
def simulate(path: Path, repetitions: int) -> None:
    """Search the table with each strategy, `repetitions` times; table and figure beside it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    table, rows, paths = Table(path), [], {}
    for name, (pruner, first, eta, finalists) in tqdm(STRATEGIES.items()):
        paths[name] = []
        for repetition in range(repetitions):
            settings = Settings.from_mapping(dict(
                experiment="study", dataset="digits", seed=repetition, search_pruner=pruner, search_first_images=first,
                search_images=RUNGS[-1], search_reduction_factor=eta, shard_size=125))  # fmt: skip
            paths[name].append(one_search(table, settings, finalists, repetition))
        ends = np.array([p[-1] for p in paths[name]])
        rows.append(dict(strategy=name, images=ends[:, 0], claimed=100 * ends[:, 1], worth=100 * ends[:, 2]))
    unpruned = rows[0]
    lines = [
        "| strategy | images, median | times fewer | winner's own score | what it is worth | against no pruning |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        against = interval(row["worth"] - unpruned["worth"]) if row is not unpruned else ""
        lines.append(
            f"| {row['strategy']} | {np.median(row['images']):,.0f} | {np.median(TRIALS * RUNGS[-1] / row['images']):.1f} | "
            f"{row['claimed'].mean():.1f} | {interval(row['worth'])} | {against} |"
        )
    best = max(range(len(table.names)), key=lambda i: np.mean(table.scores[i]["fresh/1000"]["test"]))
    text = "\n\n".join([
        f"# {TRIALS}-trial searches, {repetitions} repetitions each",
        f"CAS in %, mean and 95 % interval of the mean. {len(table.names)} points of digits were measured; a search's trial is answered by "
        "the nearest, on validation images. Its score is the point's mean and the noise of one classifier at that rung; what a winner "
        "is worth was read on test images with noise and classifiers that no trial saw (the table's best: "
        f"{100 * worth(table, best):.1f}).",
        "\n".join(lines), noise_floor(table), rank_correlations(table),
        "Made by `python scripts/study_searches.py measure runs/digits` and `... simulate`.",
    ])  # fmt: skip
    path.with_name("searches.md").write_text(text + "\n")
    draw(paths, path.with_name("searches.png"))
    chosen = next(row for row in rows if row["strategy"] == CHOSEN)
    ratios = TRIALS * RUNGS[-1] / chosen["images"]
    write_json(path.with_name("row.json"), dict(
        part=f"{TRIALS}-trial search, images made ({CHOSEN}; CAS {interval(chosen['worth'] - unpruned['worth'])} against unpruned)",
        alternative=f"every trial at {RUNGS[-1]} images", ours=float(np.median(chosen["images"])), theirs=TRIALS * RUNGS[-1],
        ratio=float(np.median(ratios)), lowest=float(ratios.min()), highest=float(ratios.max()), repetitions=repetitions,
        command="python scripts/study_searches.py simulate"))  # fmt: skip
    print(text)


def interval(values: np.ndarray) -> str:
    """Mean and 95 % interval of the mean."""
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return f"{values.mean():.2f} ({values.mean() - half:.2f} to {values.mean() + half:.2f})"


def noise_floor(table: Table) -> str:
    """Deviation of one reading when the same trial is repeated, pooled over points that have learned something."""
    points = [s for s in table.scores if np.mean(s["fresh/1000"]["val"]) > 0.5]

    def pooled(pairs) -> float:
        return 100 * math.sqrt(np.mean([(a - b) ** 2 / 2 for a, b in pairs]))

    lines = ["| images | validation, classifier seed anew | test, classifier seed anew |", "| --- | --- | --- |"]
    for rung in RUNGS:
        found = [pooled([s[f"search/{rung}"][split] for s in points]) for split in ("val", "test")]
        lines.append(f"| {rung} | {found[0]:.2f} | {found[1]:.2f} |")
    both = [pooled([(s["search/1000"][split][c], s["fresh/1000"][split][c]) for s in points for c in range(CLASSIFIERS)])
            for split in ("val", "test")]  # fmt: skip
    lines.append(f"| 1000, noise anew too | {both[0]:.2f} | {both[1]:.2f} |")
    return (
        f"## Noise floor\n\nStandard deviation, in points, of one classifier's CAS when the same trial is repeated ({len(points)} points that "
        "have learned something; the images that judge stay the same).\n\n" + "\n".join(lines)
    )


def rank_correlations(table: Table) -> str:
    """Of one classifier's reading at each rung with the fresh one at the last, over all points and over the better half."""
    fresh = np.array([np.mean(s["fresh/1000"]["val"]) for s in table.scores])
    better = fresh >= np.median(fresh)
    lines = ["| images | all points | the better half |", "| --- | --- | --- |"]
    for rung in RUNGS:
        at = np.array([s[f"search/{rung}"]["val"][0] for s in table.scores])
        lines.append(f"| {rung} | {spearmanr(at, fresh)[0]:.2f} | {spearmanr(at[better], fresh[better])[0]:.2f} |")
    return (
        "## Do small sets rank as large ones do?\n\nSpearman's correlation of one classifier's CAS at a rung with the mean of two at 1000 images of "
        "fresh noise (validation images).\n\n" + "\n".join(lines)
    )


def draw(paths: dict, path: Path) -> None:
    """What the incumbent is worth against images generated, mean over repetitions; where it ends, without and with finalists."""
    figure, axes = plt.subplots(figsize=(9, 5))
    ends = {
        name: (np.median([run[-1][0] for run in runs]), 100 * np.mean([run[-1][2] for run in runs]))
        for name, runs in paths.items()
    }
    for number, name in enumerate(n for n in paths if "finalists" not in n):
        at = np.linspace(2000, max(run[-1][0] for run in paths[name]), 100)
        curve = [
            [next((w for i, _, w in reversed(run) if i <= images), run[0][2]) for images in at] for run in paths[name]
        ]
        axes.plot(at, 100 * np.mean(curve, 0), lw=1, color=f"C{number}", alpha=0.7)
        axes.plot(*ends[name], "o", color=f"C{number}", label=name)
        again = name.removesuffix(" (the paper's)") + ", 3 finalists"
        if again in ends:
            axes.plot(*ends[again], "s", color=f"C{number}", ms=9, mfc="none", mew=2)
    axes.plot([], [], "s", color="black", ms=9, mfc="none", mew=2, label="the same with 3 finalists")
    axes.set(xscale="log", xlabel="images generated", ylabel="what the incumbent is worth (test CAS, %)")
    axes.set_ylim(ends["no pruning"][1] - 3)
    axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
