"""Generated images and real training images -> exact and near copies. It certifies nothing: see docs/method.md, item 26."""

import hashlib
from collections import Counter

import numpy as np
from sklearn.metrics import pairwise_distances_argmin_min

from sdlab.data.images import ImageDataset, Split

NEAR = 0.01  # an image is near if so few held-out real images are as near to a training image
MOST = 2000  # generated and held-out images whose neighbours are looked for


def find_copies(made: Split, data: ImageDataset) -> dict:
    """Counts of exact copies, and the share of `made` that is nearer to a training image than real images are.

    `near` is that share among the first `MOST` images, to be compared with `expected`, which an honest generator has.
    """
    training = {digest(image) for image in data.train.images}
    counts = Counter(map(digest, made.images))
    flat = flatten(data.train.images)
    held_out = np.concatenate([data.val.images, data.test.images])
    to_train, of_held_out = (nearest(images, flat) for images in (spread(made.images), spread(held_out)))
    limit = float(np.quantile(of_held_out, NEAR))
    return dict(
        exact=sum(count for name, count in counts.items() if name in training),
        repeated=sum(count - 1 for count in counts.values()),
        near=float((to_train < limit).mean()),
        expected=NEAR,
        limit=limit,
        looked_at=len(to_train),
        distance=float(np.median(to_train)),
        real_distance=float(np.median(of_held_out)),
    )


def digest(image: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest()


def spread(images: np.ndarray) -> np.ndarray:
    """At most `MOST` images, evenly spread over all."""
    return images[np.linspace(0, len(images) - 1, min(MOST, len(images))).astype(int)]


def flatten(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32)


def nearest(images: np.ndarray, flat: np.ndarray) -> np.ndarray:
    """The root mean square difference, of 255, of each image to the nearest of `flat`."""
    _, distances = pairwise_distances_argmin_min(flatten(images), flat)
    return distances / flat.shape[1] ** 0.5
