"""`sdlab run NAME --from-reference`: the synthetic set of a committed release, made again and compared with its hashes."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from sdlab.errors import BadInput
from sdlab.report.reference import REFERENCE
from sdlab.runs.experiment import Experiment
from sdlab.runs.export import check_images
from sdlab.runs.privacy import check_release
from sdlab.runs.records import environment, environment_differences
from sdlab.runs.releases import install
from sdlab.settings import Settings


def make_released_set(here: Settings, images: int | None = None, whole: bool = False) -> tuple[Path, dict, str]:
    """Make the set of the release that is committed under the experiment's name: its first `images`, by default the
    size that its notebook 05 chose, or the `whole` pool (x1 ... x10).

    Returns the folder of its shards, its description (`sdlab.runs.export`), and how its bytes compare. Neither the data
    set nor a search is needed: labels, weights and settings are in the release. Raises `BadInput` if there is no
    release, if it is damaged, if its audit found more than `privacy_limit` allows, if its base model or code are not the ones
    of now, or if it has fewer images.
    """
    folder = REFERENCE / here.experiment / "release"
    if not folder.is_dir():
        released = ", ".join(sorted(path.parent.name for path in REFERENCE.glob("*/release"))) or "none"
        raise BadInput(f"There is no release of {here.experiment} in reports/reference/ (there is: {released}).")
    if here.cluster != "none":
        raise BadInput(f"`cluster` is {here.cluster!r}: `--from-reference` makes its set in one process; leave it out.")
    settings, release = install(folder, here)
    count = settings.scaling_max * sum(release["train_counts"])
    check_images(images, count)
    count = count if whole else images or release["about"]["images"]
    about = check_release(release["about"] | dict(images=count), ("set",), here.privacy_limit)
    # torch is slow to import
    from sdlab.base_models import load_base_model
    from sdlab.evaluation import pool_seed
    from sdlab.generation import generate, plan_generation, real_labels
    from sdlab.sampling_config import SamplingConfig, load_pipeline

    base = load_base_model(settings)
    if base.fingerprint() != release["base_model"]:
        raise BadInput(f"The release of {here.experiment} was made with another base model than {base.source}.")
    labels = np.repeat(np.arange(len(release["train_counts"])), release["train_counts"])
    data = SimpleNamespace(num_classes=len(release["train_counts"]), image_size=settings.image_size)
    run, config = Experiment(settings, data, base), SamplingConfig(**release["about"]["config"])
    plan = plan_generation(run, config, pool_seed(run), real_labels(labels))
    if plan.key() != release["pool"]["key"]:
        raise BadInput(
            f"The release of {here.experiment} was made by code whose sets differ from this one's "
            f"({release['pool']['key']}, now {plan.key()}): take the commit that it came with."
        )
    made = generate(load_pipeline(run, config), plan, run.folder / "synthetic", count, run.progress, "pool")
    compared = comparison(made.manifest["shards"], release, environment(base))
    return made.folder, about, compared


def comparison(shards: dict, release: dict, now: dict) -> str:
    """How many shards have the bytes of the release, and what differs here if not all have."""
    expected = release["pool"]["shards"]
    equal = sum(shard["sha256"] == expected[index] for index, shard in shards.items())
    if equal == len(shards):
        return f"All {equal} files have the released bytes."
    differ = ", ".join(environment_differences(release["environment"], now)) or "in the same environment"
    return (
        f"{equal} of {len(shards)} files have the released bytes ({differ}). Another processor or version changes last "
        f"bits, which a hash cannot tell from larger differences: look at the images."
    )
