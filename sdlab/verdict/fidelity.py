"""Features of two image sets -> how alike they are: KID, precision and recall, density and coverage.

KID is an unbiased estimate, so a few hundred images suffice; a Fréchet distance (FID) of so few would be mostly bias, and is
not computed. Precision asks whether generated images lie among the real ones, recall whether real ones lie among the generated
(Kynkäänniemi et al. 2019); density and coverage ask the same and mind outliers less (Naeem et al. 2020).
"""

import numpy as np
import torch
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestNeighbors
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

KID_SUBSETS, KID_SUBSET = 100, 1000  # of at most so many images; half of the smaller set if it has fewer
NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5  # the authors' own
CHUNK = 1000


def compare_features(made: np.ndarray, real: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Features (n, d) and (m, d) -> `kid` and its deviation over subsets, `precision`, `recall`, `density`, `coverage`.

    Each set needs more than `DENSITY_NEIGHBOURS` images.
    """
    subset = min(KID_SUBSET, len(made) // 2, len(real) // 2)
    tensors = torch.from_numpy(made.astype(np.float64)), torch.from_numpy(real.astype(np.float64))
    kid = kid_features_to_metric(
        *tensors, kid_subsets=KID_SUBSETS, kid_subset_size=subset, rng_seed=seed, verbose=False
    )
    prc = prc_features_to_metric(*tensors, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False)
    density, coverage = density_and_coverage(made, real)
    return dict(
        kid=kid["kernel_inception_distance_mean"],
        kid_deviation=kid["kernel_inception_distance_std"],
        precision=prc["precision"],
        recall=prc["recall"],
        density=density,
        coverage=coverage,
    )


def density_and_coverage(
    made: np.ndarray, real: np.ndarray, neighbours: int = DENSITY_NEIGHBOURS
) -> tuple[float, float]:
    """How many real neighbourhoods a generated image lies in, over `neighbours`; and the share of them that hold any."""
    distances, _ = NearestNeighbors(n_neighbors=neighbours + 1).fit(real).kneighbors(real)  # the first one is itself
    held, covered = 0, 0
    for start in range(0, len(real), CHUNK):
        part = slice(start, start + CHUNK)
        inside = pairwise_distances(real[part], made) <= distances[part, -1:]
        held, covered = held + int(inside.sum()), covered + int(inside.any(1).sum())
    return held / (neighbours * len(made)), covered / len(real)
