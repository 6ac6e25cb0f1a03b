"""Pictures of images: rows of a data set or of generated images, and generated images with their nearest real ones."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from sdlab.data.images import Split

plt.rcParams["text.parse_math"] = False  # a class may be called "$5 to $10"
MOST_CLASSES = 16  # that fit a picture


def show_image_rows(rows: Mapping[str, np.ndarray]) -> Figure:
    """A labelled row of uint8 images (n, 3, h, w) for every entry; sizes may differ between rows."""
    most = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(len(rows), 1, figsize=(0.62 * most + 1, 0.64 * len(rows) + 0.25), squeeze=False)
    for ax, (name, images) in zip(axes[:, 0], rows.items(), strict=True):
        strip = np.concatenate(list(images.transpose(0, 2, 3, 1)), axis=1)
        width = strip.shape[1] * most // max(len(images), 1)
        ax.imshow(strip, interpolation="nearest")
        ax.set(xlim=(-0.5, width - 0.5), xticks=[], yticks=[])
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        ax.spines[:].set_visible(False)
    figure.subplots_adjust(left=0.13, right=0.99, bottom=0.02, top=0.93, hspace=0.04)
    return figure


def show_class_rows(split: Split, per_class: int, title: str) -> Figure:
    """The first images of each class, a row a class (at most 16 classes)."""
    classes = np.unique(split.labels)[:MOST_CLASSES]
    figure = show_image_rows({str(c): split.images[split.labels == c][:per_class] for c in classes})
    figure.suptitle(title, fontsize=10)
    return figure


def show_nearest_neighbours(generated: Split, real: Split, class_names: Sequence[str]) -> Figure:
    """The generated image of each class (at most 16) that is closest to a real training image of any class, above that one.

    The numbers are their distances: the root mean square difference of two pixels, of 255. A copy has 0.
    """
    from sklearn.metrics import pairwise_distances_argmin_min

    flat = [split.images.reshape(len(split), -1).astype(np.float32) for split in (generated, real)]
    nearest, distance = pairwise_distances_argmin_min(*flat)
    classes = np.unique(generated.labels)[:MOST_CLASSES]
    closest = [min(np.flatnonzero(generated.labels == c), key=distance.__getitem__) for c in classes]
    figure = show_image_rows({"generated": generated.images[closest], "nearest real": real.images[nearest[closest]]})
    rms = distance[closest] / flat[0].shape[1] ** 0.5
    names = [f"{class_names[c]:.9}\n{value:.1f}" for c, value in zip(classes, rms, strict=True)]
    centres = (np.arange(len(classes)) + 0.5) * generated.images.shape[-1] - 0.5
    figure.axes[0].set_xticks(centres, names, fontsize=7)
    figure.axes[0].tick_params(top=False, bottom=False, labeltop=True, labelbottom=False)
    figure.set_figheight(1.9)
    figure.subplots_adjust(top=0.78)
    return figure
