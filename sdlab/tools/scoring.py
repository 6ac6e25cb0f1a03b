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
from sdlab.runs.files import atomic_write, write_json
from sdlab.runs.parameters import parameter_file
from sdlab.settings import Settings
from sdlab.verdict.any_set import chosen_set, read_set
from sdlab.verdict.scorecard import score_set

BATCH = 64  # images at 299 px


def score_images(
    images: str, against: str, target: Path | None, inception: str | None, given: Mapping[str, Any]
) -> tuple[Path, list[str]]:
    """Write scorecard.html and scorecard.json to a new folder; returns it and the sentences. Raises `BadInput`."""
    settings = real_settings(against, given)
    target = target or project_path(settings.reports_root) / f"score-{Path(images).stem}"
    if target.exists():
        raise BadInput(f"{target} exists: nothing is overwritten; name another folder by --to.")
    is_path = Path(images).exists()
    if not is_path and not is_file(PARAMS / f"{images}.yaml"):
        raise BadInput(f"{images} is neither a folder, nor an npz, nor an experiment in params/: give one of these.")
    own = None if is_path else Settings.from_file(parameter_file(images), **given)
    real = load_dataset(settings)
    made = read_set(Path(images), real, settings) if is_path else chosen_set(own)
    if made.images.shape[1:] != real.train.images.shape[1:]:
        raise BadInput(
            f"The set of {images} has images of {made.images.shape[-1]} px, {against} of {real.image_size} px: score it against an "
            "experiment of its own size."
        )
    run = Experiment(settings, real)
    network = (inception_features(inception, settings.device), "InceptionV3, 2048 features") if inception else ()
    card = score_set(run, made, Path(images).name, *network)
    page = scorecard_page(card, made, real)
    with atomic_write(target / "scorecard.html") as part:
        part.write_text(page, encoding="utf-8")
    write_json(target / "scorecard.json", card)
    return target, scorecard_sentences(card)


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
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    except Exception as error:  # whatever the file holds
        raise BadInput(
            f"{weights} holds no weights of InceptionV3 as torch-fidelity reads them ({type(error).__name__}): take its own file, "
            "pt_inception-2015-12-05-6726825d.pth."
        ) from None
    network = network.to(choose_device(device))

    @torch.no_grad()
    def features(images: np.ndarray) -> np.ndarray:
        batches = torch.from_numpy(images).split(BATCH)
        return torch.cat([network(batch.to(choose_device(device)))[0].cpu() for batch in batches]).numpy()

    return features
