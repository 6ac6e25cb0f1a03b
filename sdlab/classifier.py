"""Images -> trained ResNet20: the same classifier for every set, real or synthetic (section 3 of the paper).

docs/method.md, items 4 and 16.
"""

import copy
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sdlab.data.images import Split
from sdlab.seeds import derive_seed
from sdlab.settings import Settings

GLOBAL_GENERATOR = threading.Lock()  # initial weights are drawn from torch's one generator for all threads


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; where the shape changes, the shortcut is a 3x3 max-pool and zero-padded channels."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.stride, self.padding = stride, channels - channels_in
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels, eps=1e-5, momentum=0.1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels, eps=1e-5, momentum=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = F.max_pool2d(x, 3, self.stride, padding=1) if self.stride > 1 else x
        if self.padding:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.padding))
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet20(nn.Module):
    """Depth 20: three stages of three blocks, `initial_filters` doubling. (n, 3, h, w) in [0, 1] -> logits (n, C).

    The authors start at 64 filters (4.3 M parameters), the CIFAR ResNet20 of He et al. 2016 at 16 (0.27 M).
    """

    def __init__(self, num_classes: int, initial_filters: int = 64):
        super().__init__()
        self.stem = nn.Conv2d(3, initial_filters, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(initial_filters, eps=1e-5, momentum=0.1)
        blocks, channels_in = [], initial_filters
        for stage in range(3):
            channels = initial_filters * 2**stage
            for block in range(3):
                blocks.append(ResidualBlock(channels_in, channels, stride=2 if stage and not block else 1))
                channels_in = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, h, w) in [0, 1] -> what the last layer reads: (n, 4 * initial_filters)."""
        return self.blocks(F.relu(self.bn(self.stem(x)))).mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


@dataclass(frozen=True)
class ClassifierRecipe:
    """How ResNet20 is trained. The same for real and synthetic images."""

    filters: int
    epochs: int
    train_steps: int  # in all, in `epochs` equal parts; 0: whole passes over the images
    batch_size: int
    learning_rate: float
    label_smoothing: float
    patience: int
    stop_patience: int
    min_learning_rate: float = 1e-5
    augmentation: str = "none"  # of a batch: the paper has none

    @classmethod
    def from_settings(cls, settings: Settings, searching: bool = False) -> "ClassifierRecipe":
        """The settings' recipe; the searches have patiences of their own (authors' code)."""
        s = settings
        return cls(
            filters=s.classifier_filters,
            epochs=s.classifier_epochs,
            train_steps=s.classifier_train_steps,
            batch_size=s.classifier_batch_size,
            learning_rate=s.classifier_learning_rate,
            label_smoothing=s.classifier_label_smoothing,
            patience=s.search_patience if searching else s.classifier_patience,
            stop_patience=s.search_stop_patience if searching else s.classifier_stop_patience,
        )


@dataclass(frozen=True)
class TrainedClassifier:
    """The weights with the best accuracy on real validation images, which the training watches (docs/method.md, item 4)."""

    model: ResNet20
    history: list[dict]
    val_accuracy: float


def train_classifier(
    train: Split,
    val: Split,
    num_classes: int,
    recipe: ClassifierRecipe,
    seed: int,
    device: torch.device | str = "cpu",
    after_epoch: Callable[[], Any] | None = None,
) -> TrainedClassifier:
    """Train ResNet20 on `train`; plateau, stopping and the choice of weights watch the accuracy on `val`.

    Adam, label smoothing, reduce-on-plateau x 0.1, early stopping, best weights restored.
    An epoch is a pass over the images, or `train_steps / epochs` training steps.
    Several may be trained at once, in threads: each depends on its own seed only.
    """
    generator = torch.Generator().manual_seed(seed)
    changes = torch.Generator().manual_seed(derive_seed(seed, "augmentation"))  # the batches do not depend on it
    with GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNet20(num_classes, recipe.filters).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate, fused=True)
    images, labels = as_tensors(train, device)
    batches = endless_batches(len(labels), recipe.batch_size, generator)
    per_pass = math.ceil(len(labels) / recipe.batch_size)
    budget = split_evenly(recipe.train_steps, recipe.epochs) if recipe.train_steps else [per_pass] * recipe.epochs

    # The starting weights score -1: a first epoch at 0 % still counts as better.
    best, best_weights, since_best, since_drop, history = -1.0, None, 0, 0, []
    for epoch, steps in enumerate(budget, start=1):
        model.train()
        losses = []
        for _ in range(steps):
            batch = next(batches).to(device)
            pixels = augmented(images[batch], recipe.augmentation, changes)
            losses.append(training_step(model, optimizer, pixels, labels[batch], recipe.label_smoothing))
        accuracy = float((predict(model, val).argmax(1) == val.labels).mean())
        if after_epoch is not None:
            after_epoch()
        rate = optimizer.param_groups[0]["lr"]
        history.append(
            dict(epoch=epoch, loss=torch.stack(losses).mean().item(), val_accuracy=accuracy, learning_rate=rate)
        )
        if accuracy > best:
            best, best_weights, since_best, since_drop = accuracy, copy.deepcopy(model.state_dict()), 0, 0
            continue
        since_best, since_drop = since_best + 1, since_drop + 1
        if since_best >= recipe.stop_patience:
            break
        if since_drop >= recipe.patience:
            for group in optimizer.param_groups:
                group["lr"] = max(group["lr"] * 0.1, recipe.min_learning_rate)
            since_drop = 0
    model.load_state_dict(best_weights)
    return TrainedClassifier(model.eval(), history, best)


def training_step(
    model: ResNet20, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """One step on uint8 images (n, 3, h, w) and labels (n); returns the loss."""
    loss = F.cross_entropy(model(as_input(images)), labels, label_smoothing=smoothing)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def augmented(images: torch.Tensor, how: str, generator: torch.Generator) -> torch.Tensor:
    """uint8 (n, 3, h, w), each shifted by up to an eighth of its side (its border repeated) and, if asked, half of them flipped."""
    if how == "none":
        return images
    count, _, height, width = images.shape
    reach = max(1, height // 8)
    moved = torch.randint(2 * reach + 1, (2, count, 1), generator=generator).to(images.device)
    rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
    if how == "flips_and_shifts":
        flipped = torch.rand(count, 1, generator=generator).to(images.device) < 0.5
        columns = torch.where(flipped, columns.flip(0), columns)
    rows, columns = moved[0] + rows, moved[1] + columns
    padded = F.pad(images.float(), (reach,) * 4, mode="replicate").to(images.dtype)
    each = torch.arange(count, device=images.device)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def endless_batches(count: int, batch_size: int, generator: torch.Generator):
    """Index batches of shuffled passes over `count` images, without end; a pass ends with the remainder."""
    while True:
        yield from torch.randperm(count, generator=generator).split(batch_size)


def split_evenly(total: int, parts: int) -> list[int]:
    """`total` steps in `parts` parts that differ by at most one."""
    return [total // parts + (index < total % parts) for index in range(parts)]


def as_tensors(split: Split, device) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole split on the device, images as uint8: a batch is an index, no loader."""
    return torch.from_numpy(split.images).to(device), torch.from_numpy(split.labels).to(device)


def as_input(images: torch.Tensor) -> torch.Tensor:
    """uint8 -> [0, 1]."""
    return (images.float() / 255).contiguous(memory_format=torch.channels_last)


def predict(model: ResNet20, split: Split, batch_size: int = 0) -> np.ndarray:
    """Logits (n, C)."""
    return answers(model, model, split.images, batch_size)


@torch.no_grad()
def answers(model: ResNet20, part: Callable, images: np.ndarray, batch_size: int = 0) -> np.ndarray:
    """What the model, or a `part` of it, answers to uint8 images: float32 (n, ...).

    `batch_size` 0: 1,024, or on a CPU 256, whose activations its caches hold.
    """
    model.eval()
    device = next(model.parameters()).device
    batches = torch.from_numpy(images).split(batch_size or (256 if device.type == "cpu" else 1024))
    return torch.cat([part(as_input(batch.to(device))).float().cpu() for batch in batches]).numpy()
