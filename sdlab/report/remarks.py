"""The sentences under the tables, as plain text: measurement, protocol, result, and every deviation from the paper."""

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from sdlab.importance import LABELS, PARAMETERS
from sdlab.report import paper
from sdlab.report.tables import FinishedExperiment, cas_text, gains, table_2

METRICS_NOTE = (
    "CAS: top-1 accuracy (%) on real test images of a ResNet20 trained on generated images only; its plateau, early stopping and "
    "choice of weights watch real validation images. Mean ± deviation over classifier seeds. To read it against: the binomial "
    "standard errors of the test and the validation set (s.e., the largest of the line) and the accuracy of always answering the "
    "most frequent class (majority)."
)


def table_remarks(experiments: Sequence[FinishedExperiment], table: pd.DataFrame) -> list[str]:
    """All remarks under both tables; `table` is Table 1 of these experiments."""
    of_experiments = [sentence for experiment in experiments for sentence in experiment_remarks(experiment)]
    ranges = [gains_sentence("Ours", gains(table)), gains_sentence("Paper", paper.TEXT_RANGES)]
    return [METRICS_NOTE, *of_experiments, *ranges]


def experiment_remarks(experiment: FinishedExperiment) -> list[str]:
    """The result, the protocol, the findings about the data, and the settings that are not the paper's."""
    data, settings, name = experiment.metrics("data"), experiment.settings, experiment.name
    file = settings.run_folder / "test_readings.jsonl"
    readings = f"{len(file.read_text().splitlines())} readings" if file.exists() else "the file is missing: no readings"
    seen = {
        "sealed": "validation images; the test set only filled the tables",
        "paper": "the test set, as in the paper",
    }
    protocol = (
        f"{name}: protocol {settings.protocol}: every decision of the run (trials, epochs, early stopping, size) saw "
        f"{seen[settings.protocol]} ({readings} of the test set on record). Base model {data['base_model']}; "
        f"{sum(data['counts']['test'])} test images; always answering the most frequent class scores "
        f"{100 * data['majority_share_test']:.1f} %; classifier images {settings.image_size} px."
    )
    ceiling = [round_trips_sentence(experiment)] if experiment.has_metrics("round_trips") else []
    cuts = ", ".join(f"{key} {value} ({papers})" for key, (value, papers) in settings.deviations().items())
    deviations = [f"{name}: settings that differ from the paper's (in brackets): {cuts}."] if cuts else []
    return [chosen_sentence(experiment), *ceiling, protocol, f"{name}: data: {' '.join(data['findings'])}", *deviations]


def round_trips_sentence(experiment: FinishedExperiment) -> str:
    """The most that the base model's VAE allows, on test images."""
    cell, real = (experiment.metrics(name)["test"] for name in ("round_trips", "real"))
    error = 100 * math.hypot(cell["standard_error"], real["standard_error"])
    return (
        f"{experiment.name}: trained on the real images after a round trip through the base model's VAE, the classifier scores "
        f"{percent(cell)} %, {100 * (cell['mean'] - real['mean']):+.2f} points to the real ones (standard error of the "
        f"difference at most {error:.2f}): what the VAE alone changes, before anything is generated."
    )


def ceiling_sentence(ceiling: Mapping | None) -> str:
    """What `sdlab.evaluation.score_ceiling` found, by the deciding split."""
    if ceiling is None:
        return "What the VAE costs was not measured when this stage ran."
    images = {"val": "validation images", "test": "test images"}[ceiling["split"]]
    error = "" if ceiling["standard_error"] is None else f" (standard error {100 * ceiling['standard_error']:.1f})"
    resizing = ceiling.get("resizing_error", 0)  # a former ceiling has none
    resized = f" ({resizing:.1f} by resizing to {ceiling['base_image_size']} px and back alone)" if resizing else ""
    return (
        f"This base model's VAE costs {100 * ceiling['cost']:.1f} points here{error}: classifiers trained on the real images "
        f"score {percent(ceiling['real'])} % on {ceiling['real']['n']} {images}, on their round trips "
        f"{percent(ceiling['round_trips'])} %; mean error of a pixel {ceiling['error']:.1f} of 255{resized}."
    )


def percent(score: Mapping) -> str:
    """Mean and deviation over classifier seeds, of `sdlab.metrics.summarize`."""
    deviation = "" if score["std"] is None else f" ± {100 * score['std']:.2f}"
    return f"{100 * score['mean']:.2f}{deviation}"


def chosen_sentence(experiment: FinishedExperiment) -> str:
    """The result of an experiment: the size that was chosen without its test score, compared with the real training set."""
    table = table_2([experiment]).set_index("cell")
    real, chosen = table.loc["real"], table[table.chosen].iloc[0]
    split = {"sealed": "validation images", "paper": "the test set"}[chosen.protocol]
    error = math.hypot(chosen.standard_error, real.standard_error)
    return (
        f"{experiment.name}: chosen on {split}: {chosen.name}, CAS {cas_text(chosen)} %; real images {cas_text(real)} % "
        f"({chosen.cas - real.cas:+.2f} points; {chosen.seeds} classifier seeds each; standard error of the difference on "
        f"{chosen.test_images} test images at most {error:.2f})."
    )


def gains_sentence(who: str, ranges: Mapping) -> str:
    """`ranges` as `sdlab.report.tables.gains` returns them."""
    pairs = [ranges["after_2"], ranges["after_4"]]
    after_2, after_4 = (f"{low:+.2f}" if low == high else f"{low:+.2f} to {high:+.2f}" for low, high in pairs)
    return (
        f"{who}: since stage 1, CAS changes by {after_2} points after stage 2 and by {after_4} after stage 4; stage 2 saves up to "
        f"{ranges['time_saved_after_2_percent']:.1f} % of the generation time."
    )


def importance_sentence(name: str, found: Mapping) -> str:
    """Of a search's importances: is UGS the most important parameter, as the paper says? One sentence."""
    word = {None: "undetermined", "guidance_scale": "confirmed"}.get(found["first"], "refuted")
    mains = ", ".join(f"{LABELS[p]} {found['main_effects'][p]['mean']:.2f}" for p in PARAMETERS)
    agree = f"{found['forests_that_agree']} of {found['forests']} forests agree"
    return f"{name}: UGS as the most important parameter is {word} ({mains}; {agree}; {found['n']} trials at {found['images']} images)."
