"""Generated images and real training images -> exact and near copies. It certifies nothing: see docs/method.md, item 26."""

import hashlib
from collections import Counter

import numpy as np

from sdlab.data.images import ImageDataset, Split, spread

NEAR, AT_LEAST = 0.01, 10  # an image is near if so few held-out real ones are as near: this share, or so many of a few
MOST = 2000  # generated and held-out images whose neighbours are looked for


def find_copies(made: Split, data: ImageDataset) -> dict:
    """Counts of exact copies of training images and of held-out ones, and the share of `made` that is near a training image.

    `near` is the share, among at most `MOST` images, of those that are as near to a training image as the nearest `expected`
    share of held-out real images are. An honest generator has about as many.
    """
    counts = Counter(map(digest, made.images))
    of_training, held_out = data.train.images, np.concatenate([data.val.images, data.test.images])
    exact, of_held_out = (
        sum(counts[name] for name in {digest(image) for image in images}) for images in (of_training, held_out)
    )
    flat = flatten(of_training)
    to_train, real = (nearest(images[spread(len(images), MOST)], flat) for images in (made.images, held_out))
    expected = min(max(NEAR, AT_LEAST / len(real)), 0.5)
    limit = float(np.quantile(real, expected))
    return dict(
        exact=exact,
        held_out=of_held_out,
        repeated=sum(count - 1 for count in counts.values()),
        near=float((to_train <= limit).mean()),
        expected=expected,
        limit=limit,
        looked_at=len(to_train),
        distance=float(np.median(to_train)),
        real_distance=float(np.median(real)),
    )


def digest(image: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest()


def flatten(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32)


def nearest(images: np.ndarray, flat: np.ndarray) -> np.ndarray:
    """The root mean square difference, of 255, of each image to the nearest of `flat`."""
    from sklearn.metrics import pairwise_distances_argmin_min  # is slow to import

    _, distances = pairwise_distances_argmin_min(flatten(images), flat)
    return distances / flat.shape[1] ** 0.5
