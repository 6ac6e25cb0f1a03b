"""A few dozen images, and the Class-Encoder's table -> has the generator collapsed? Asked before hours are spent.

* *Rank.* The effective rank r of the class residuals (docs/method.md, item 8) says in how many directions the classes differ.
  Its ceiling is C - 1, so ln r / ln(C - 1) is compared: the authors' encoders have 0.59 to 0.76 where their method works,
  0.13 and 0.18 where it collapsed. Two classes differ in one direction only: nothing is compared.
* *Label fidelity.* How many images does the judge, which was trained on real ones, take for the class that was asked for? A
  generator that ignores the class is right in 1 of C. A binomial test says whether these images do better.
* *Diversity.* The mean distance of two images of a class in the judge's features, over the same for real ones.
"""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from sdlab.data.images import ImageDataset, Split
from sdlab.data.pixels import resize
from sdlab.metrics import score_predictions
from sdlab.runs.files import read_json
from sdlab.runs.run import Run
from sdlab.sampling_config import SamplingConfig, load_table, sample_images
from sdlab.seeds import derive_seed
from sdlab.verdict.judge import Judge, load_judge

if TYPE_CHECKING:  # imports diffusers, which is slow
    from sdlab.class_encoder import ClassTable

IMAGES, EACH = 48, 2  # at least so many, and so many of each class
RANK, SIGNIFICANCE, DIVERSITY = 0.4, 0.01, 0.2  # where an alarm begins
SIGHT = 0.1  # a judge has to get a tenth of the way from chance to 100 % on real images
STEPS, GUIDANCE = 20, 3.0  # at most so many inference steps


@dataclass(frozen=True)
class Alarm:
    """What was seen; `reasons` is empty if nothing speaks for a collapse."""

    images: int
    classes: int
    effective_rank: float | None
    rank_share: float | None  # ln r / ln(C - 1)
    label_fidelity: float
    p_value: float  # of as many right labels from a generator that ignores the class
    real_fidelity: float  # of real validation images: the judge's balanced accuracy
    diversity: float | None  # 1: as far from one another as real images

    @property
    def reasons(self) -> list[str]:
        found = []
        if self.rank_share is not None and self.rank_share < RANK:
            found.append(
                f"the classes differ in {self.effective_rank:.2f} directions of at most {self.classes - 1} (alarm below "
                f"{(self.classes - 1) ** RANK:.2f})"
            )
        if self.p_value > SIGNIFICANCE and self.judge_sees:
            found.append(
                f"a judge takes {self.label_fidelity:.0%} of {self.images} images for the class that was asked for, which is no more "
                f"than chance ({1 / self.classes:.0%})"
            )
        if self.diversity is not None and self.diversity < DIVERSITY:
            found.append(
                f"images of a class differ {self.diversity:.2f} times as much as real ones (alarm below {DIVERSITY})"
            )
        return found

    @property
    def judge_sees(self) -> bool:
        """Whether the judge tells the real classes apart: a blind one says nothing about generated ones."""
        chance = 1 / self.classes
        return self.real_fidelity > chance + SIGHT * (1 - chance)

    @property
    def sentence(self) -> str:
        """For notebooks and the command line; it begins with WARNING if the generator seems to have collapsed."""
        blind = f" The judge takes only {self.real_fidelity:.0%} of real images for their class: too few to tell."
        blind *= not self.judge_sees
        if self.reasons:
            return f"WARNING The generator seems to have collapsed: {'; '.join(self.reasons)}.{blind}"
        seen = [
            f"{self.label_fidelity:.0%} of {self.images} images are taken for their class (chance {1 / self.classes:.0%}, real images "
            f"{self.real_fidelity:.0%})"
        ]
        if self.effective_rank is not None:
            seen.insert(0, f"effective rank {self.effective_rank:.2f} of at most {self.classes - 1}")
        if self.diversity is not None:
            seen.append(f"they differ {self.diversity:.2f} times as much as real ones")
        return f"No sign of a collapse: {', '.join(seen)}.{blind}"


def look_for_collapse(run: Run, name: str, config: SamplingConfig) -> Alarm:
    """Images of every class from a config's checkpoints, judged; saved in `metrics/<name>.json`."""
    path = run.metrics_path(name)
    if path.exists():
        return Alarm(**read_json(path)["seen"])
    count = run.data.num_classes
    labels = np.arange(judged_images(count)) % count
    seeds = [derive_seed(run.settings.seed, "collapse", i) for i in range(len(labels))]
    images = resize(sample_images(run, config, labels.tolist(), seeds), run.data.image_size)
    alarm = judge_images(load_judge(run), Split(images, labels), run.data, load_table(run, config.class_encoder_epoch))
    run.save_metrics(name, dict(seen=asdict(alarm), collapsed=bool(alarm.reasons), sentence=alarm.sentence))
    return alarm


def judged_images(classes: int) -> int:
    """How many images are looked at: as many of each class."""
    return classes * max(EACH, math.ceil(IMAGES / classes))


def judge_images(judge: Judge, made: Split, data: ImageDataset, table: "ClassTable | None" = None) -> Alarm:
    """Alarm signs of labelled images; those of the encoder only with its table."""
    right = int((judge.logits(made.images).argmax(1) == made.labels).sum())
    rank, share = rank_of(table, data.num_classes) if table is not None else (None, None)
    return Alarm(
        images=len(made),
        classes=data.num_classes,
        effective_rank=rank,
        rank_share=share,
        label_fidelity=right / len(made),
        p_value=float(stats.binomtest(right, len(made), 1 / data.num_classes, alternative="greater").pvalue),
        real_fidelity=score_predictions(judge.logits(data.val.images), data.val.labels).balanced,
        diversity=diversity(judge, made, data.train),
    )


def rank_of(table: "ClassTable", classes: int) -> tuple[float | None, float | None]:
    """The effective rank of the class residuals, and ln r / ln(C - 1); None for two classes."""
    if classes == 2:
        return None, None
    rank = table.effective_rank()
    return rank, math.log(max(rank, 1.0)) / math.log(classes - 1)


def diversity(judge: Judge, made: Split, real: Split, each: int = 50) -> float | None:
    """Median over classes of the mean distance of two generated images of a class, over that of two real ones.

    In the judge's features, of up to `each` images a class. None if no class has two images of both kinds.
    """
    ratios = []
    for label in np.unique(made.labels):
        spread = []
        for split in (made, real):
            features = judge.features(split.images[split.labels == label][:each])
            distances = np.linalg.norm(features[:, None] - features, axis=2)[np.triu_indices(len(features), 1)]
            spread.append(distances.mean() if len(distances) else math.nan)
        if spread[1] > 0 and not math.isnan(spread[0]):
            ratios.append(spread[0] / spread[1])
    return float(np.median(ratios)) if ratios else None
