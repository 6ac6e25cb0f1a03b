"""The judge: a ResNet20 that was trained on the real images. It says which class an image shows, and which images are alike."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from sdlab.classifier import ClassifierRecipe, ResNet20, answers, train_classifier
from sdlab.data.images import Split
from sdlab.devices import choose_device, raise_on_oom
from sdlab.evaluation import save_arrays
from sdlab.runs.experiment import Experiment
from sdlab.runs.records import is_recorded, read_record
from sdlab.runs.run import Run
from sdlab.seeds import derive_seed


class Judge:
    """Logits and features of uint8 images (n, 3, image_size, image_size)."""

    def __init__(self, model: ResNet20):
        self.model = model.eval()

    def logits(self, images: np.ndarray) -> np.ndarray:
        """(n, C)."""
        return answers(self.model, self.model, images)

    def features(self, images: np.ndarray) -> np.ndarray:
        """What its last layer reads: (n, 4 * classifier_filters)."""
        return answers(self.model, self.model.features, images)

    @property
    def filters(self) -> int:
        """Of its first stage."""
        return self.model.stem.out_channels

    def accuracy(self, split: Split) -> float:
        return float((self.logits(split.images).argmax(1) == split.labels).mean())


def make_judge(run: Run) -> Judge | None:
    """Stage 00's part: the experiment's judge, saved as `judge/judge.safetensors`. None if a finished stage has none."""
    path = judge_path(run)
    if not path.exists() and run.finished:
        return None
    if not path.exists():
        save_arrays(path, **train_judge(run))
    return judge_of(run, load_file(path))


def load_judge(run: Experiment) -> Judge:
    """The experiment's judge. Where stage 00 has left none (it is older than judges, or not run), one is trained.

    Raises `BadInput` if stage 00's was altered, or the memory is too small for training.
    """
    path, record = judge_path(run), read_record(run.settings, "00")
    of_these_images = record is not None and record.inputs.get("data") == run.data.fingerprint()
    if of_these_images and is_recorded(run.settings, "00", path):
        return judge_of(run, load_file(path))
    path = run.work_folder and run.work_folder / "judge.safetensors"  # until the stage is finished
    weights = load_file(path) if path and path.exists() else train_judge(run)
    if path and not path.exists():
        save_arrays(path, **weights)
    return judge_of(run, weights)


def judge_of(run: Experiment, weights: dict[str, np.ndarray]) -> Judge:
    model = ResNet20(run.data.num_classes, len(weights["stem.weight"]))  # the settings may have changed since stage 00
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    return Judge(model.to(choose_device(run.settings.device), memory_format=torch.channels_last))


def judge_path(run: Experiment) -> Path:
    return run.folder / "judge" / "judge.safetensors"


def train_judge(run: Experiment) -> dict[str, np.ndarray]:
    """The weights of a classifier that is trained on the real images, where the experiment's tasks run."""
    recipe, made = ClassifierRecipe.from_settings(run.settings), []
    call = (derive_seed(run.settings.seed, "judge"), recipe)
    with run.progress(total=recipe.epochs, desc="judge", unit="epoch") as bar:
        run.executor.each(train_weights, run, [call], lambda _, w: made.append(w), bar.update, steps=recipe.epochs)
    return made[0]


def train_weights(run: Experiment, seed: int, recipe: ClassifierRecipe, on_progress: Callable) -> dict[str, np.ndarray]:
    """One classifier's weights. Raises `BadInput` if the memory is too small."""
    data, device = run.data, choose_device(run.settings.device)
    with raise_on_oom(
        f"a classifier's training step of {recipe.batch_size} images", "take a smaller `classifier_batch_size`"
    ):
        trained = train_classifier(data.train, data.val, data.num_classes, recipe, seed, device, on_progress)
    return {name: tensor.cpu().numpy() for name, tensor in trained.model.state_dict().items()}
