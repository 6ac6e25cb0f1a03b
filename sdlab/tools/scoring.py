"""`sdlab score`: any labelled images and the real ones they stand for -> a folder with their scorecard."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdlab.data.datasets import load_dataset
from sdlab.devices import choose_device
from sdlab.errors import BadInput
from sdlab.paths import PARAMS, is_file, project_path
from sdlab.report.scorecard import scorecard_page, scorecard_sentences
from sdlab.runs.experiment import Experiment
from sdlab.runs.files import atomic_write, raise_on_write_error, write_json
from sdlab.runs.parameters import parameter_file
from sdlab.settings import Settings
from sdlab.verdict.any_set import chosen_set, read_set
from sdlab.verdict.scorecard import check_enough, score_set

BATCH = 64  # images at 299 px


def score_images(
    images: str, against: str, target: Path | None, inception: str | None, exclude: str, given: Mapping[str, Any]
) -> tuple[Path, list[str]]:
    """Write scorecard.json and scorecard.html to a new folder; returns it and the sentences. Raises `BadInput`."""
    settings, own, path = real_settings(against, given), own_settings(images, given), Path(images)
    if own is None and not path.exists():
        raise BadInput(f"{images} is neither a folder, nor an npz, nor an experiment in params/: give one of these.")
    if own is not None and path.is_dir():
        raise BadInput(
            f"{images} is an experiment and a folder: write ./{images} for the folder, or call from elsewhere."
        )
    target = target or project_path(settings.reports_root) / f"score-{path.stem}"
    if target.exists():
        raise BadInput(f"{target} exists: nothing is overwritten; name another folder by --to.")
    network = (inception_features(inception, settings.device), "InceptionV3, 2048 features") if inception else ()
    real = load_dataset(settings)
    labelled = read_set(path, real, exclude) if own is None else chosen_set(own, real)
    check_enough(path.name, len(labelled.split), real)
    with raise_on_write_error(target):  # before the long part
        target.mkdir(parents=True)
    run = Experiment(settings, real)
    card = score_set(run, labelled, path.name, *network)
    write_json(target / "scorecard.json", card)
    with atomic_write(target / "scorecard.html") as part:
        part.write_text(scorecard_page(card, labelled.split, real), encoding="utf-8")
    return target, scorecard_sentences(card)


def own_settings(images: str, given: Mapping[str, Any]) -> Settings | None:
    """The experiment that IMAGES names, if it does, in the places that are given: what else is, is meant for the real images."""
    places = {name: value for name, value in given.items() if name.endswith("_root")}
    named = "/" not in images and is_file(PARAMS / f"{images}.yaml")
    if named or images.endswith((".yaml", ".yml")):
        return Settings.from_file(parameter_file(images), **places)
    return None


def real_settings(against: str, given: Mapping[str, Any]) -> Settings:
    """Of an experiment, or of a data set with the paper's classifier. Raises `BadInput`."""
    if is_file(PARAMS / f"{against}.yaml") or against.endswith((".yaml", ".yml")):
        return Settings.from_file(parameter_file(against), **given)
    dataset = str(Path(against).resolve()) if Path(against).exists() else against
    return Settings.from_mapping(dict(experiment="score", dataset=dataset) | dict(given))


def inception_features(weights: str, device: str) -> Callable[[np.ndarray], np.ndarray]:
    """The 2048 features of InceptionV3 as torch-fidelity computes them. Raises `BadInput` for other weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        # Tensors only, before torch-fidelity reads the file and would run what it holds.
        torch.load(weights, map_location="cpu", weights_only=True)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    except Exception as error:  # whatever the file holds
        raise BadInput(
            f"{weights} holds no weights of InceptionV3 as torch-fidelity reads them ({type(error).__name__}): take its own file, "
            "weights-inception-2015-12-05-6726825d.pth."
        ) from None
    network = network.to(choose_device(device))

    @torch.no_grad()
    def features(images: np.ndarray) -> np.ndarray:
        batches = torch.from_numpy(images).split(BATCH)
        return torch.cat([network(batch.to(choose_device(device)))[0].cpu() for batch in batches]).numpy()

    return features
