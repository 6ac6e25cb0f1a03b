"""How many points does `protocol: paper` flatter? What choosing by the test images does to the number that is then printed.

    python scripts/ablate_protocol.py digits [--halves 2000] [-p runs_root /tmp/runs]

For a finished experiment. Its test images and its classifiers are split at random into two halves each, many times. The
paper's protocol chooses by the one half of the classifiers on the one half of the images, and prints what they score
there (the search's maximum; Table 2's best size) or what other classifiers score there (After 4). Honest is what others
score on the other half, by which nobody chose. The sealed choice, by the same classifiers on validation images, is scored
honestly, too. With all test images, flattery by images is about 0.7 times as much: it falls with the square root of their
number.

Classifiers are trained on the complete trials of the final search, and on x1 ... xk if notebook 05 has kept no answers.
Nothing is saved; the test images are read, and no record is kept of it.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import click
import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from sdlab.base_models import load_base_model
from sdlab.data.datasets import load_dataset
from sdlab.data.images import Split
from sdlab.errors import BadInput
from sdlab.evaluation import classifier_seeds, load_cells, logits_path, train_and_score_classifiers
from sdlab.runs.experiment import Experiment
from sdlab.runs.files import read_json
from sdlab.runs.shards import read_shards
from sdlab.runs.stages import STAGES, State, stage_state
from sdlab.settings import Settings
from sdlab.tools.cli import with_settings


def flattery(right: np.ndarray, val: np.ndarray, halves: int, seed: int = 0) -> pd.DataFrame:
    """A row for each random halving of test images and classifiers, in percent.

    Args:
        right: right answers of each candidate's classifiers to the test images, (candidates, classifiers, n), bool.
        val: their accuracies on validation images, (candidates, classifiers).
    """
    rng, rows, (_, classifiers, n) = np.random.default_rng(seed), [], right.shape
    for _ in range(halves):
        seen, order = rng.permutation(n) < n // 2, rng.permutation(classifiers)
        chosen_by, rest = order[: classifiers // 2], order[classifiers // 2 :]
        first, others = right[:, chosen_by].mean(1), right[:, rest].mean(1)
        sealed = int(val[:, chosen_by].mean(1).argmax())
        best = int(first[:, seen].mean(1).argmax())
        rows.append(
            {
                "printed": first[best, seen].mean(),
                "others, same images": others[best, seen].mean(),
                "honest": others[best, ~seen].mean(),
                "sealed": others[sealed, ~seen].mean(),
            }
        )
    return 100 * pd.DataFrame(rows)


def trials_answers(run: Experiment) -> tuple[np.ndarray, np.ndarray]:
    """Of the final search's complete trials: what `flattery` takes."""
    complete = [t for t in read_json(run.metrics_path("search_2"))["trials"] if t["state"] == "complete"]
    return together(train(run, images_of(run, t["synthetic"], run.settings.search_images), True) for t in complete)


def sizes_answers(run: Experiment) -> tuple[np.ndarray, np.ndarray]:
    """Of x1 ... xk: what `flattery` takes."""
    pool, found = read_json(run.metrics_path("scaling"))["pool"]["synthetic"], []
    for k in range(1, run.settings.scaling_max + 1):
        kept, (cell,) = logits_path(run, f"x{k:02d}"), load_cells(run, f"x{k:02d}")
        if kept.exists():
            found.append((load_file(kept)["logits"].argmax(2) == run.data.test.labels, cell["val"]["accuracy"]))
        else:
            found.append(train(run, images_of(run, pool, cell["images"]), False))
    return together(found)


def together(found: Iterable[tuple]) -> tuple[np.ndarray, np.ndarray]:
    right, val = zip(*found, strict=True)
    return np.array(right), np.array(val)


def images_of(run: Experiment, synthetic: str, count: int) -> Split:
    """The first images of one of the run's sets."""
    return Split(*map(np.concatenate, zip(*read_shards(run.folder / "synthetic" / synthetic, count), strict=True)))


def train(run: Experiment, made: Split, searching: bool) -> tuple[np.ndarray, list[float]]:
    """The cells' classifiers, trained on `made`: right answers to test images (classifiers, n), and validation accuracies."""
    with tempfile.TemporaryDirectory() as temporary:
        kept = Path(temporary) / "logits.safetensors"
        scores = train_and_score_classifiers(
            run, made, classifier_seeds(run), ("val", "test"), searching=searching, keep_logits=kept
        )
        right = load_file(kept)["logits"].argmax(2) == run.data.test.labels
    return right, [score.accuracy for score in scores["val"]]


@click.command()
@with_settings
@click.option("--halves", default=2000, show_default=True, help="Random halves of the test images.")
def main(settings: Settings, halves: int) -> None:
    """Print what each decision flatters, in points of accuracy."""
    run = Experiment(settings, load_dataset(settings), load_base_model(settings))
    if (state := stage_state(settings, "05").state) != State.DONE:
        raise BadInput(f"{settings.experiment} is not finished: {STAGES['05'].stem} is {state}.")
    if settings.classifier_seeds < 2:
        raise BadInput("`classifier_seeds` is 1: one classifier cannot be chosen by and checked by another.")
    answers = {"final search": trials_answers(run), "size of the set": sizes_answers(run)}
    found = {f"{name}, {len(right)} candidates": flattery(right, val, halves) for name, (right, val) in answers.items()}
    table = pd.DataFrame({name: rows.mean() for name, rows in found.items()}).T
    table["flattery"] = table.printed - table.honest
    table["after others"] = table["others, same images"] - table.honest
    click.echo(
        f"{settings.experiment}: {len(run.data.test) // 2} test images to choose by, as many that nobody chose by.\n"
    )
    click.echo(table.round(2).to_markdown())


if __name__ == "__main__":
    main()
