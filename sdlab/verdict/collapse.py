"""Some images, and the Class-Encoder's table -> may the generator have collapsed? Asked before hours are spent.

* *Rank.* The effective rank r of the class residuals (docs/method.md, item 8) says in how many directions the classes differ.
  Its ceiling is C - 1, so ln r / ln(C - 1) is compared: the authors' encoders have 0.59 to 0.76 where their method works,
  0.13 and 0.18 where it collapsed. Fewer than five classes leave too little to compare.
* *Label fidelity.* How many images does the judge, which was trained on real ones, take for the class that was asked for? A
  generator that ignores the class is right in 1 of C, a perfect one as often as with real images. The alarm needs both: no
  clearly better score than the first, and a clearly worse one than the second.
* *Diversity.* The mean distance of two images of a class in the judge's features, over the same for real ones.

The last two need a judge that tells the real classes apart.
"""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from sdlab.data.images import ImageDataset, Split, spread
from sdlab.devices import raise_on_oom
from sdlab.generation import generate_images, plan_generation
from sdlab.metrics import score_predictions
from sdlab.runs.files import read_json
from sdlab.runs.run import Run
from sdlab.sampling_config import SamplingConfig, load_pipeline, load_table
from sdlab.seeds import derive_seed
from sdlab.verdict.judge import Judge, load_judge

if TYPE_CHECKING:  # imports diffusers, which is slow
    from sdlab.class_encoder import ClassTable

IMAGES, EACH, MOST = 96, 2, 200  # at least so many, and so many of each class; never more than the last
RANK, SIGNIFICANCE, DIVERSITY = 0.4, 0.01, 0.2  # where an alarm begins
SIGHT = 0.1  # a judge has to get a tenth of the way from chance to 100 % on real images
FEWEST_CLASSES = 5  # whose directions are counted
BATCH = 64  # images at a time


@dataclass(frozen=True)
class Alarm:
    """What was seen; `reasons` is empty if nothing speaks for a collapse."""

    images: int
    classes: int
    effective_rank: float | None
    rank_share: float | None  # ln r / ln(C - 1)
    label_fidelity: float
    p_chance: float  # of so many right labels or more from a generator that ignores the class
    p_real: float  # of so few or fewer from one whose images are as good as real ones
    chance: float  # the share that a generator which ignores the class would have: 1 / C for equal classes
    real_fidelity: float  # of real validation images, in the same shares of classes
    judge_balanced: float  # the judge's balanced accuracy on real validation images
    diversity: float | None  # 1: as far from one another as real images

    @property
    def reasons(self) -> list[str]:
        found = []
        if self.rank_share is not None and self.rank_share < RANK:
            found.append(
                f"the classes differ in {self.effective_rank:.2f} directions of at most {self.classes - 1} (alarm below "
                f"{(self.classes - 1) ** RANK:.2f})"
            )
        if self.judge_sees and self.p_chance > SIGNIFICANCE and self.p_real < SIGNIFICANCE:
            found.append(
                f"a judge takes {self.label_fidelity:.0%} of {self.images} images for the class that was asked for, which is not "
                f"clearly more than chance ({self.chance:.0%}), and {self.real_fidelity:.0%} of real ones"
            )
        if self.judge_sees and self.diversity is not None and self.diversity < DIVERSITY:
            found.append(
                f"images of a class differ {self.diversity:.2f} times as much as real ones (alarm below {DIVERSITY})"
            )
        return found

    @property
    def judge_sees(self) -> bool:
        """Whether the judge tells the real classes apart: a blind one says nothing about generated ones."""
        chance = 1 / self.classes
        return self.judge_balanced > chance + SIGHT * (1 - chance)

    @property
    def sentence(self) -> str:
        """For notebooks and the command line; it begins with WARNING if the generator may have collapsed."""
        blind = f" The judge takes only {self.judge_balanced:.0%} of real images for their class: too few to tell."
        blind *= not self.judge_sees
        if self.reasons:
            return f"WARNING The generator may have collapsed: {'; '.join(self.reasons)}.{blind}"
        seen = [
            f"{self.label_fidelity:.0%} of {self.images} images are taken for their class (chance {self.chance:.0%}, real images "
            f"{self.real_fidelity:.0%})"
        ]
        if self.effective_rank is not None:
            seen.insert(0, f"effective rank {self.effective_rank:.2f} of at most {self.classes - 1}")
        if self.diversity is not None:
            seen.append(f"they differ {self.diversity:.2f} times as much as real ones")
        return f"No sign of a collapse: {', '.join(seen)}.{blind}"


def look_for_collapse(run: Run, name: str, config: SamplingConfig) -> Alarm | None:
    """Images of every class from a config's checkpoints, judged; saved in `metrics/<name>.json`.

    A finished stage shows what it has seen: None if that was nothing. Raises `BadInput` if the memory is too small.
    """
    path = run.metrics_path(name)
    if path.exists():
        return Alarm(**read_json(path)["seen"])
    if run.finished:
        return None
    made, table = sample_some(run, config), load_table(run, config.class_encoder_epoch)
    alarm = judge_images(load_judge(run), made, run.data, table)
    run.save_metrics(name, dict(seen=asdict(alarm), collapsed=bool(alarm.reasons), sentence=alarm.sentence))
    return alarm


def sample_some(run: Run, config: SamplingConfig) -> Split:
    """Images as a set would have them, in batches that are no larger than its shards."""
    classes = run.data.num_classes
    count = judged_images(classes)
    labels = np.arange(count) % classes if count >= classes else spread(classes, count)
    plan = plan_generation(run, config, derive_seed(run.settings.seed, "collapse"), labels.tolist())
    pipeline, size = load_pipeline(run, config), min(BATCH, run.settings.shard_size)
    with raise_on_oom(
        f"{size} images of {plan.base_size} px", "take a smaller `shard_size` in an experiment of its own"
    ):
        parts = [generate_images(pipeline, plan, range(i, min(i + size, count))) for i in range(0, count, size)]
    return Split(np.concatenate(parts), labels.astype(np.int64))


def judged_images(classes: int) -> int:
    """How many images `look_for_collapse` makes."""
    return min(classes * max(EACH, math.ceil(IMAGES / classes)), MOST)


def judge_images(judge: Judge, made: Split, data: ImageDataset, table: "ClassTable | None" = None) -> Alarm:
    """Alarm signs of labelled images; those of the encoder only with its table."""
    from scipy import stats  # is slow to import

    classes, real = data.num_classes, score_predictions(judge.logits(data.val.images), data.val.labels)
    answers = judge.logits(made.images).argmax(1)
    right = int((answers == made.labels).sum())
    asked, taken = (np.bincount(values, minlength=classes) / len(made) for values in (made.labels, answers))
    chance, as_real = float(asked @ taken), float(asked @ np.nan_to_num(real.recall, nan=real.balanced))
    rank, share = rank_of(table, classes) if table is not None else (None, None)
    return Alarm(
        images=len(made),
        classes=classes,
        effective_rank=rank,
        rank_share=share,
        label_fidelity=right / len(made),
        p_chance=float(stats.binomtest(right, len(made), chance, alternative="greater").pvalue),
        p_real=float(stats.binomtest(right, len(made), min(as_real, 1.0), alternative="less").pvalue),
        chance=chance,
        real_fidelity=as_real,
        judge_balanced=real.balanced,
        diversity=diversity(judge, made, data),
    )


def rank_of(table: "ClassTable", classes: int) -> tuple[float | None, float | None]:
    """The effective rank of the class residuals, and ln r / ln(C - 1); None for fewer than five classes."""
    if classes < FEWEST_CLASSES:
        return None, None
    rank = table.effective_rank()
    return rank, math.log(max(rank, 1.0)) / math.log(classes - 1)


def diversity(judge: Judge, made: Split, data: ImageDataset, each: int = 50) -> float | None:
    """Median over classes of the mean distance of two generated images of a class, over that of two real ones.

    In the judge's features, of up to `each` images a class; the real ones are validation images, where a class has two: the
    judge was trained on the others. None if no class has two images of both kinds.
    """
    ratios = []
    for label in np.unique(made.labels):
        real = data.val if (data.val.labels == label).sum() > 1 else data.train
        found, expected = (spread_in_class(judge, split, label, each) for split in (made, real))
        if expected > 0 and not math.isnan(found):
            ratios.append(found / expected)
    return float(np.median(ratios)) if ratios else None


def spread_in_class(judge: Judge, split: Split, label: int, each: int) -> float:
    """The mean distance of two images of a class, of at most `each`, evenly spread; nan for fewer than two images."""
    rows = np.flatnonzero(split.labels == label)
    if len(rows) < 2:
        return math.nan
    rows = rows[spread(len(rows), each)]
    features = judge.features(split.images[rows])
    return float(np.linalg.norm(features[:, None] - features, axis=2)[np.triu_indices(len(features), 1)].mean())
