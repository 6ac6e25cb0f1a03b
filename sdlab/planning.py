"""Settings + a few timed steps -> what an experiment will cost, notebook by notebook, before it is spent.

Three parts: `workload` counts what the notebooks do, `measure` times one of each on this device, `plan` multiplies. The
weights need not be here: of the base models that the README names, the configs in `shapes/` tell the size.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
import torch

from sdlab.base_models import BaseModel, is_here, load_base_model, unloaded
from sdlab.classifier import Recipe, predict, train_classifier
from sdlab.evaluation import OperatingPoint
from sdlab.files import read_json
from sdlab.generation import parts_at_a_time
from sdlab.images import Facts, Split
from sdlab.results import planned_settings
from sdlab.run import STEPS, read_record
from sdlab.search import first_ranges, new_pruner, study_name
from sdlab.settings import BadInput, Settings
from sdlab.threads import in_threads
from sdlab.training import noise_loss

SECONDS = 0.7  # a measurement grows its batch until one call takes so long,
FEW = 8  # but at least to this: smaller ones say little of larger ones
GB = 1e9


# ------------------------------------------------------------------------------------------------ what is done


@dataclass
class Work:
    """What one notebook does. Images are generated ones; a pass is one image through the UNet once."""

    images: float = 0
    passes: float = 0
    encoded: int = 0
    class_encoder_steps: int = 0
    unet_steps: int = 0
    searched_images: float = 0  # seen by trials' classifiers in training, each time counted
    searched_checks: float = 0  # judged by them
    classifier_images: float = 0  # the same of the cells' and finalists' classifiers
    classifier_checks: float = 0

    @property
    def steps(self) -> int:
        return round(self.class_encoder_steps + self.unet_steps)

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, factor: float) -> "Work":
        return Work(*(factor * a for a in dataclasses.astuple(self)))


def workload(settings: Settings, facts: Facts, most: bool = False, pruning: bool = True) -> dict[str, Work]:
    """What notebooks 01 to 05 do: as expected, or at the `most`, or with nothing pruned.

    Expected: steps (IS) in the middle of their range, both passes where guidance acts, and pruning as the search's own pruner
    prunes trials of random quality. At most: the highest IS, nothing pruned. What a finished search found is used.
    """
    s = settings
    optimum_1, optimum_2 = known_point(s, "search_1"), known_point(s, "search_2")
    steps = {"search_1": middle(first_ranges(s).num_inference_steps, most)}
    steps["optimum_1"] = optimum_1.num_inference_steps if optimum_1 else steps["search_1"]
    steps["search_2"] = middle((min(s.search_min_steps, steps["optimum_1"]), steps["optimum_1"]), most)
    steps["optimum_2"] = optimum_2.num_inference_steps if optimum_2 else steps["search_2"]

    def made(images: float, is_: float) -> Work:
        return Work(images=images, passes=(1 + s.guidance_stop - s.guidance_start) * images * is_)

    def search(name: str, trials: int) -> Work:
        unpruned = [Counter(dict.fromkeys(s.rungs(), trials))]
        visits = simulated(s, name, trials) if pruning and not most else unpruned
        total = Work()
        for visit in visits:
            for last, rung in itertools.pairwise([0, *s.rungs()]):
                trial = made(rung - last, steps[name]) + judged(s, facts, rung, trial=True)
                total += trial * (visit[rung] / len(visits))
        if s.search_finalists > 1:
            finalist = made(s.search_images, steps[name]) + judged(s, facts, s.search_images, finalist=True)
            total += finalist * (s.search_finalists + (name == "search_2"))
        return total

    default = s.default_num_inference_steps
    after = {n: made(s.search_images, i) + judged(s, facts, s.search_images) for n, i in (
        ("01", default), ("02", steps["optimum_1"]), ("03", steps["optimum_1"]), ("04", steps["optimum_2"]))}  # fmt: skip
    scaled = judged(s, facts, facts.train)
    for k in range(1, s.scaling_max + 1):
        scaled += judged(s, facts, k * facts.train)
    pool = s.scaling_max * facts.train
    per_epoch = math.ceil(facts.train / s.class_encoder_batch_size), math.ceil(facts.train / s.unet_batch_size)
    return {
        "01": after["01"] + Work(encoded=facts.train, class_encoder_steps=s.class_encoder_epochs * per_epoch[0]),
        "02": after["02"] + search("search_1", s.search_1_trials),
        "03": after["03"] + Work(unet_steps=s.unet_epochs * per_epoch[1]),
        "04": after["04"] + search("search_2", s.search_2_trials),
        "05": scaled + made(pool, steps["optimum_2"]),
    }


def judged(s: Settings, facts: Facts, images: float, trial: bool = False, finalist: bool = False) -> Work:
    """A set's classifiers, trained to their last epoch: those of a cell, a finalist or a trial."""
    seeds = s.search_classifier_seeds if trial else s.classifier_seeds
    deciding = {"sealed": facts.val, "paper": facts.test}[s.protocol]
    seen = seeds * (
        s.classifier_steps * s.classifier_batch_size if s.classifier_steps else s.classifier_epochs * images
    )
    read = seeds * (s.classifier_epochs * facts.val + (deciding if trial or finalist else facts.val + facts.test))
    if trial:
        return Work(searched_images=seen, searched_checks=read)
    return Work(classifier_images=seen, classifier_checks=read)


def middle(bounds: tuple[int, int], most: bool) -> float:
    return bounds[1] if most else sum(bounds) / 2


def known_point(settings: Settings, search: str):
    """The optimum of a search, if it is finished."""
    record = read_record(settings, {"search_1": "02", "search_2": "04"}[search])
    if record is None or not record["finished"]:
        return None
    return OperatingPoint(**read_json(settings.run_folder / "metrics" / f"{search}.json")["best"]["point"])


def simulated(settings: Settings, search: str, trials: int, repeats: int = 5) -> list[Counter]:
    """How many trials reach each rung when trials of random quality meet the search's own pruner: one count a repeat."""
    visits, rungs = [], settings.rungs()
    for repeat in range(repeats):
        rng, visited = np.random.default_rng(repeat), Counter()
        study = optuna.create_study(
            study_name=study_name(settings, search), direction="maximize", pruner=new_pruner(settings),
            sampler=optuna.samplers.RandomSampler(seed=repeat),
        )  # fmt: skip
        for _ in range(trials):
            trial, quality, pruned = study.ask(), rng.uniform(), False
            for rung in rungs:
                visited[rung] += 1
                trial.report(quality + rng.normal(0, 0.1), step=rung)
                if rung < rungs[-1] and trial.should_prune():
                    pruned = True
                    break
            study.tell(trial, None if pruned else quality, state=optuna.trial.TrialState.PRUNED if pruned else None)
        visits.append(visited)
    return visits


# ------------------------------------------------------------------------------------------------ what it costs


@dataclass(frozen=True)
class Costs:
    """Seconds of one of each on this device, and bytes. `nan` memory: not measured on this system."""

    device: str
    seconds_per_pass: float
    seconds_per_decoding: float
    seconds_per_encoding: float
    seconds_per_class_encoder_step: float
    seconds_per_unet_step: float
    searching: tuple[float, float]  # seconds of a trial's classifier: an image once in training, an image judged
    judging: tuple[float, float]  # of a cell's
    generating_bytes: float
    class_encoder_bytes: float
    unet_bytes: float
    unet_parameters: int
    encoder_parameters: int
    table_numbers: int
    latent_numbers: int


class Meter:
    """Peak memory of a block beyond what was there before it: on CUDA torch's own count, on Linux the process's."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> "Meter":
        self.before = self.now()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        return self

    def __exit__(self, *_) -> None:
        self.bytes = max(self.peak() - self.before, 0)

    def now(self) -> float:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else status_bytes("VmRSS")

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else status_bytes("VmHWM")


def status_bytes(name: str) -> float:
    """A size from Linux's account of this process; nan elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return math.nan
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), math.nan)


@dataclass(frozen=True)
class Timing:
    """Seconds an item in a batch, and memory as a line: so much whatever the batch, so much more an item."""

    seconds: float
    fixed_bytes: float
    bytes_per_item: float

    def bytes(self, batch: int) -> float:
        return self.fixed_bytes + batch * self.bytes_per_item


def timed(work: Callable[[int], object], most: int, device: torch.device) -> Timing:
    """`work(batch)` at growing batches: at least to FEW, then until a call takes long, memory runs out, or at `most`."""
    batch, seen = 1, []
    while True:
        try:
            if not seen:
                work(batch)  # warm
            with Meter(device) as meter:
                seconds = clocked(work, batch, device)
        except torch.OutOfMemoryError:  # what fitted says enough; the plan's memory will tell that the whole does not
            break
        seen.append((batch, seconds, meter.bytes))
        if batch >= most or (batch >= FEW and seconds > SECONDS):
            break
        faster = int(SECONDS / max(seconds, 1e-4) / 2)
        batch = min(most, FEW if batch < FEW else batch * max(2, min(8, faster)))
    if not seen:
        raise BadInput(f"Not even one image fits into the memory of {device}: choose another `device` or `base_model`.")
    batch, seconds, most_bytes = seen[-1]
    if seconds < 2 * SECONDS:
        seconds = min(seconds, clocked(work, batch, device))  # other work on the machine only adds
    per_item = max(most_bytes - seen[0][2], 0) / max(batch - 1, 1)
    return Timing(seconds / batch, max(most_bytes - batch * per_item, 0), per_item)


def clocked(work: Callable[[int], object], batch: int, device: torch.device) -> float:
    started = time.perf_counter()
    work(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def measure(settings: Settings, facts: Facts, base: BaseModel) -> Costs:
    """Time one of everything on `base.device`, with the base model's real size. Leaves the base model as it was."""
    from sdlab.class_encoder import ClassEncoder, with_projected_conditions  # these need diffusers, slow to import
    from sdlab.pipeline import DECODE_BATCH

    s, device, unet, vae = settings, base.device, base.unet, base.vae
    side = s.base_image_size // base.vae_scale
    encoder = ClassEncoder(facts.num_classes, base.tokens, base.width, s.class_encoder_hidden).to(device)
    scheduler = base.noise_scheduler()

    def latents(count):
        return torch.zeros(count, base.latent_channels, side, side, device=device)

    def timesteps(count):
        return torch.full((count,), 500, device=device)

    sampling = with_projected_conditions(unet, encoder.table())

    def denoise(count):
        # In as many parts at a time as generation makes; two rows are an image's two passes.
        workers = parts_at_a_time(count // 2, device)
        in_threads(one_pass, [-(-count // workers)] * workers, workers)

    @torch.no_grad()
    def one_pass(count, _):
        rows = torch.zeros(count, 1, 1, dtype=torch.long, device=device)
        sampling(latents(count).to(unet.dtype), timesteps(count), rows)

    @torch.no_grad()
    def decode(count):
        with torch.autocast(device.type, base.dtype, enabled=base.dtype != torch.float32):
            vae.decode(latents(count))

    @torch.no_grad()
    def encode(count):
        vae.encode(torch.zeros(count, 3, s.base_image_size, s.base_image_size, device=device))

    def conditions(count):
        return encoder.table()[torch.zeros(count, dtype=torch.long, device=device)]

    def train(trained, count, states):
        noise = latents(count)
        loss = noise_loss(trained, scheduler, noise, noise, timesteps(count), states)
        loss.backward()

    denoising = timed(denoise, 2 * s.shard_size, device)
    held = Meter(device).now()  # weights, and on a CPU Python and its libraries
    decoding = timed(decode, min(DECODE_BATCH, s.shard_size), device)
    encoding = timed(encode, 64, device)
    conditioning = timed(lambda n: train(base, n, conditions(n)), s.class_encoder_batch_size, device)
    encoder.requires_grad_(False)
    fresh = base if base.dtype == torch.float32 else base.with_unet(copy_of(unet))
    fresh.unet.requires_grad_(True).train()
    states = conditions(1)
    try:
        tuning = timed(lambda n: train(fresh, n, states.expand(n, -1, -1)), s.unet_batch_size, device)
    finally:
        for parameter in fresh.unet.parameters():
            parameter.grad = None
        fresh.unet.requires_grad_(False).eval()
    adam = seconds_per_adam_parameter(device)
    numbers, encoders = unet.num_parameters(), encoder.num_parameters()
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({torch.get_num_threads()} threads)"
    )
    return Costs(
        device=f"{name}, {str(base.dtype).removeprefix('torch.')}",
        seconds_per_pass=denoising.seconds,
        seconds_per_decoding=decoding.seconds,
        seconds_per_encoding=encoding.seconds,
        seconds_per_class_encoder_step=conditioning.seconds * s.class_encoder_batch_size + adam * encoders,
        seconds_per_unet_step=tuning.seconds * s.unet_batch_size + adam * numbers,
        searching=classifier_costs(s, facts, s.search_classifier_seeds, device),
        judging=classifier_costs(s, facts, s.classifier_seeds, device),
        generating_bytes=held + max(denoising.bytes(2 * s.shard_size), decoding.bytes(min(DECODE_BATCH, s.shard_size))),
        class_encoder_bytes=held + conditioning.bytes(s.class_encoder_batch_size) + 16 * encoders,
        # Fine-tuning has no frozen UNet beside it: float32 weights, gradients, and two moments each.
        unet_bytes=held - unet.dtype.itemsize * numbers + 16 * numbers + tuning.bytes(s.unet_batch_size),
        unet_parameters=numbers,
        encoder_parameters=encoders,
        table_numbers=(facts.num_classes + 1) * base.tokens * base.width,
        latent_numbers=base.latent_channels * side**2,
    )  # fmt: skip


def copy_of(unet: torch.nn.Module) -> torch.nn.Module:
    """In float32, as fine-tuning trains it."""
    other = type(unet).from_config(unet.config).to(unet.device)
    other.load_state_dict(unet.state_dict())
    return other


def seconds_per_adam_parameter(device: torch.device) -> float:
    weights = torch.nn.Parameter(torch.zeros(4_000_000, device=device))
    optimizer = torch.optim.AdamW([weights], fused=True)
    weights.grad = torch.zeros_like(weights)
    return timed(lambda n: [optimizer.step() for _ in range(n)], 20, device).seconds / len(weights)


def classifier_costs(s: Settings, facts: Facts, seeds: int, device: torch.device) -> tuple[float, float]:
    """Seconds of training one classifier on one image once, and of its judging one, where `seeds` are trained as `judge` does.

    On a CPU as many at once as torch has threads, which they share, in as many rounds as it takes.
    """
    threads = torch.get_num_threads()
    workers = min(seeds, threads) if device.type == "cpu" else 1
    tiny, recipe = random_split(8, s.image_size), dataclasses.replace(Recipe.of(s), epochs=1, steps=1)

    def fit(count):
        once = dataclasses.replace(recipe, batch_size=count)
        return train_classifier(random_split(count, s.image_size), tiny, facts.num_classes, once, 0, device).model

    torch.set_num_threads(threads // workers)
    try:
        model = fit(8)
        training = timed(fit, s.classifier_batch_size, device).seconds
        judging = timed(lambda count: predict(model, random_split(count, s.image_size)), 1024, device).seconds
    finally:
        torch.set_num_threads(threads)
    rounds = math.ceil(seeds / workers) / seeds
    return training * rounds, judging * rounds


def random_split(count: int, size: int) -> Split:
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (count, 3, size, size), np.uint8), np.zeros(count, np.int64))


# ----------------------------------------------------------------------------------------------------- the plan


def make_plan(settings: Settings, facts: Facts, base: BaseModel | None = None) -> dict:
    """The plan as plain data: a row a notebook, the sums, what it rests on, and warnings.

    `base` is the base model if it is loaded already. Raises `BadInput` for one of which not even the size is known here.
    """
    here = base is not None or is_here(settings)
    if base is None:
        base = load_base_model(settings) if here else unloaded(settings)
    costs = measure(settings, facts, base)
    expected, most = workload(settings, facts), workload(settings, facts, most=True)
    unpruned = workload(settings, facts, pruning=False)
    training = {"01": costs.class_encoder_bytes, "03": costs.unet_bytes}
    rows = {
        number: dict(
            notebook=STEPS[number].stem,
            images=round(work.images),
            steps=work.steps,
            hours=seconds(work, costs) / 3600,
            hours_at_most=seconds(most[number], costs) / 3600,
            pruning_saves=1 - work.images / unpruned[number].images,
            disk_gb=disk(settings, facts, costs, number, work) / GB,
            memory_gb=max(costs.generating_bytes, training.get(number, 0.0)) / GB,
        )
        for number, work in expected.items()
    }
    fetched = 0.0 if here else (4 * costs.unet_parameters + 4 * base.vae.num_parameters()) / GB
    made = dict(
        settings=planned_settings(settings),
        experiment=settings.experiment,
        base_model=settings.base_model,
        base_model_is_here=here,
        device=costs.device,
        training_images=facts.train,
        classes=facts.num_classes,
        unet_parameters=costs.unet_parameters,
        rows=rows,
        hours=sum(row["hours"] for row in rows.values()),
        hours_at_most=sum(row["hours_at_most"] for row in rows.values()),
        disk_gb=sum(row["disk_gb"] for row in rows.values()),
        disk_peak_gb=sum(row["disk_gb"] for row in rows.values()) + 12 * costs.unet_parameters / GB + fetched,
        fetched_gb=fetched,
        memory_gb=max(row["memory_gb"] for row in rows.values()),
        costs=dataclasses.asdict(costs),
    )
    return made | dict(warnings=warnings(settings, made, base.device))


def seconds(work: Work, c: Costs) -> float:
    return (
        work.passes * c.seconds_per_pass
        + work.images * c.seconds_per_decoding
        + work.encoded * c.seconds_per_encoding
        + work.class_encoder_steps * c.seconds_per_class_encoder_step
        + work.unet_steps * c.seconds_per_unet_step
        + work.searched_images * c.searching[0]
        + work.searched_checks * c.searching[1]
        + work.classifier_images * c.judging[0]
        + work.classifier_checks * c.judging[1]
    )


def disk(s: Settings, facts: Facts, c: Costs, number: str, work: Work) -> float:
    """Bytes that a notebook leaves: uint8 images; latent moments, class tables and the encoder's resume state; half-precision
    UNets and one full-precision state (weights and Adam's moments)."""
    images = work.images * 3 * s.image_size**2
    if number == "01":
        return (
            images
            + 4 * c.latent_numbers * facts.train
            + 4 * c.table_numbers * s.class_encoder_epochs
            + 12 * c.encoder_parameters
        )
    if number == "03":
        return images + 2 * c.unet_parameters * s.unet_epochs + 12 * c.unet_parameters
    return images


def warnings(s: Settings, made: Mapping, device: torch.device) -> list[str]:
    """What will not do: a sentence each."""
    found, folder = [], s.run_folder
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GB
    if made["disk_peak_gb"] > free:
        found.append(
            f"Disk: up to {made['disk_peak_gb']:.1f} GB are needed and {free:.1f} GB are free: let `runs_root` point to a larger disk, "
            "or train fewer `unet_epochs`."
        )
    if device.type == "cuda":
        memory = (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / GB  # ours is ours to use
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB
    if made["memory_gb"] > memory:
        worst = max(made["rows"].values(), key=lambda row: row["memory_gb"])
        found.append(
            f"Memory: {worst['notebook']} needs about {made['memory_gb']:.1f} GB and {device} has {memory:.1f} GB: choose a smaller "
            "`shard_size` or batch size, or another device."
        )
    return found
