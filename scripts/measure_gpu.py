"""What a GPU does with Stable Diffusion 2.0 at its true size: the figures of docs/costs.md.

    .venv/bin/python scripts/measure_gpu.py measure > h100.jsonl      # about five minutes on an H100
    .venv/bin/python scripts/measure_gpu.py measure repeat sampling
    .venv/bin/python scripts/measure_gpu.py costs h100.jsonl > h100.json
    sdlab plan cifar10 --costs h100.json

Weights are random and images are made: neither changes what is timed. A line of JSON for each figure.

* repeat: are sets, trainings and classifiers the same bytes when they are made twice? How far are they from a CPU's?
* syncs: how often the sampler, a training step and a classifier's step wait for the GPU
* sampling: images a second, by batch, next to diffusers' own pipeline
* training: seconds and memory of a step, by batch, and of a whole epoch with its checkpoint
* classifier: seconds of 100 epochs on 4,000 images, and of what might be faster
"""

import copy
import importlib.util
import json
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import click
import numpy as np
import torch
from diffusers import DDIMScheduler

from sdlab import classifier
from sdlab.base_models import BaseModel, load_base_model
from sdlab.class_encoder import ClassEncoder
from sdlab.data.images import DatasetFacts, Split
from sdlab.diffusion_pipeline import ClassConditionalStableDiffusionPipeline
from sdlab.latents import Moments
from sdlab.runs.trainings import TrainingPlan
from sdlab.sampling_config import prepare_unet
from sdlab.schedulers import make_scheduler
from sdlab.settings import Settings
from sdlab.tools.measuring import Operations, float32_copy, load_without_weights
from sdlab.training import train

H100_TFLOPS = 989.0  # dense, bfloat16: NVIDIA's figure for the SXM card
GIB = 2**30
PASS = 2 * 23.42e9  # operations of the UNet's forward pass for one image at 128 px
CLASSES = 10


def say(**figures: object) -> None:
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}), flush=True)


def seconds(work, repeats: int = 3) -> float:
    """The fastest of a few calls after one that warms up."""
    work()
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return min(found)


@contextmanager
def peak() -> Iterator[dict]:
    """The most memory that torch held in a block, in GiB."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held: dict = {}
    yield held
    held["gib"] = torch.cuda.max_memory_allocated() / GIB


@contextmanager
def counted_syncs() -> Iterator[Counter]:
    """The lines that made the host wait for the GPU, as torch reports them."""
    lines: Counter = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            torch.cuda.set_sync_debug_mode("default")
        lines.update(
            f"{Path(w.filename).parent.name}/{Path(w.filename).name}:{w.lineno}"
            for w in caught
            if "synchroniz" in str(w.message)
        )


def some_base(settings: Settings) -> BaseModel:
    """SD 2.0's shape on the GPU with random weights (or the folder or `tiny` that is asked for)."""
    if not settings.base_model.startswith("sd2-community"):
        return load_base_model(settings)
    base, draw = load_without_weights(settings), torch.Generator(settings.device).manual_seed(0)
    for model in (base.unet, base.vae):
        for name, weights in model.named_parameters():
            if weights.ndim > 1:
                weights.normal_(0, weights[0].numel() ** -0.5, generator=draw)
            else:
                weights.fill_("norm" in name and name.endswith("weight"))
    return base


def some_split(count: int, size: int = 32) -> Split:
    rng = np.random.default_rng(count)
    labels = np.arange(count) % CLASSES
    images = rng.integers(0, 156, (count, 3, size, size), np.uint8) + (10 * labels[:, None, None, None]).astype(
        np.uint8
    )
    return Split(images, labels)


def some_pipeline(base: BaseModel, settings: Settings) -> ClassConditionalStableDiffusionPipeline:
    torch.manual_seed(0)
    encoder = ClassEncoder(CLASSES, base.tokens, base.width, settings.class_encoder_hidden).to(base.device)
    table = encoder.tabulated().to(base.device).requires_grad_(False)
    unet = prepare_unet(base.unet, table, settings)
    scheduler = make_scheduler(settings.scheduler, base.scheduler_config)
    return ClassConditionalStableDiffusionPipeline(base.vae, unet, table, scheduler)


def sample(pipeline, settings: Settings, count: int, steps: int, scale: float, output: str = "latent") -> torch.Tensor:
    return pipeline(
        [i % CLASSES for i in range(count)], num_inference_steps=steps, guidance_scale=scale, seeds=range(count),
        size=settings.base_image_size, output_type=output,
    ).images  # fmt: skip


def trained(base: BaseModel, settings: Settings, part: str, images: int, batch: int, epochs: int) -> tuple[list, dict]:
    """The records of a training on made latents, and its trained weights."""
    draw, side = torch.Generator().manual_seed(0), settings.base_image_size // base.vae_scale
    shape = (images, base.latent_channels, side, side)
    mean, std = (torch.randn(shape, generator=draw).half().to(base.device) for _ in range(2))
    moments, labels = Moments(mean, std.abs() * 0.1, 0.18), torch.arange(images) % CLASSES
    torch.manual_seed(0)
    encoder = ClassEncoder(CLASSES, base.tokens, base.width, settings.class_encoder_hidden).to(base.device)
    plan = TrainingPlan(part=part, epochs=epochs, batch_size=batch, learning_rate=1e-5, weight_decay=4e-3,
                        max_grad_norm=10.0, seed=0)  # fmt: skip
    if part == "unet":
        base = base.with_unet(float32_copy(base.unet))
    with tempfile.TemporaryDirectory() as folder:
        records = list(train(plan, base, encoder, moments, labels, Path(folder), progress=silent))
    return records, copy.deepcopy((encoder if part == "class_encoder" else base.unet).state_dict())


def silent(**_) -> nullcontext:
    bar = nullcontext()
    bar.update = lambda *_: None
    return nullcontext(bar)


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def recipe(epochs: int, filters: int = 64) -> classifier.ClassifierRecipe:
    return classifier.ClassifierRecipe(filters=filters, epochs=epochs, train_steps=0, batch_size=256, learning_rate=1e-3,
                                       label_smoothing=0.1, patience=10, stop_patience=epochs)  # fmt: skip


def fit(epochs: int, images: int = 4000, val: int = 1000, device: str = "cuda", filters: int = 64) -> dict:
    split = some_split(images), some_split(val)
    return classifier.train_classifier(*split, CLASSES, recipe(epochs, filters), 0, device).model.state_dict()


# ------------------------------------------------------------------------------------------------------- the parts


def repeat(base: BaseModel, settings: Settings) -> None:
    pipeline = some_pipeline(base, settings)
    first, second = (sample(pipeline, settings, 32, 4, 3.0, "pt") for _ in range(2))
    alone = sample(pipeline, settings, 16, 4, 3.0, "pt")
    say(what="sampling twice", same=torch.equal(first, second), other_batch=float((first[:16] - alone).abs().max()))
    for part in ("class_encoder", "unet"):
        (_, one), (_, two) = (trained(base, settings, part, 64, 16, 1) for _ in range(2))
        say(what=f"training {part} twice", same=same(one, two))
    one, two = fit(3), fit(3)
    say(what="classifier twice", same=same(one, two))
    one, two = (fit(1, 512, 256, device, filters=16) for device in ("cuda", "cpu"))
    say(what="classifier, GPU and CPU", largest=max(float((one[n].cpu() - two[n]).abs().max()) for n in one))


def syncs(base: BaseModel, settings: Settings) -> None:
    pipeline = some_pipeline(base, settings)
    sample(pipeline, settings, 8, 4, 3.0)
    for steps in (4, 8):
        with counted_syncs() as lines:
            sample(pipeline, settings, 8, steps, 3.0)
        say(what="syncs of sampling", steps=steps, lines=dict(lines))
    for images in (64, 128):
        with counted_syncs() as lines:
            trained(base, settings, "class_encoder", images, 16, 1)
        say(what="syncs of training", steps=images // 16, lines={k: v for k, v in lines.items() if v >= images // 16})
    for images in (512, 1024):
        with counted_syncs() as lines:
            fit(1, images, 256)
        say(what="syncs of a classifier", steps=images // 256, lines=dict(lines))


def sampling(base: BaseModel, settings: Settings) -> None:
    steps = 10
    for batch, scale in ((64, 7.5), (250, 7.5), (500, 7.5), (1000, 7.5), (250, 1.0)):
        pipeline, passes = some_pipeline(base, settings), 1 if scale == 1 else 2
        with peak() as held:
            took = seconds(lambda: sample(pipeline, settings, batch, steps, scale), 2) / steps  # noqa: B023
        say(what="sampling", batch=batch, guidance_scale=scale, ms_a_step=1000 * took, ms_an_image_of_50_steps=50_000 * took / batch,
            tflops=passes * batch * PASS / took / 1e12, **held)  # fmt: skip
    latents = sample(pipeline, settings, 256, 2, 1.0)
    with peak() as held:
        say(what="decoding", ms_an_image=1000 * seconds(lambda: pipeline.decode(latents), 2) / 256, **held)
    images = torch.zeros(64, 3, settings.base_image_size, settings.base_image_size, device=base.device)
    with torch.no_grad():
        say(what="encoding", ms_an_image=1000 * seconds(lambda: base.vae.encode(images), 2) / 64)
    compare_with_diffusers(base, settings, pipeline)


def compare_with_diffusers(base: BaseModel, settings: Settings, pipeline) -> None:
    if importlib.util.find_spec("transformers") is None:
        say(what="diffusers' pipeline", left_out="it needs the package transformers, which sdlab does not")
        return
    from diffusers import StableDiffusionPipeline

    steps = 10
    theirs = StableDiffusionPipeline(
        vae=base.vae, unet=base.unet, scheduler=DDIMScheduler.from_config(base.scheduler_config), text_encoder=None,
        tokenizer=None, safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False,
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    table = pipeline.class_encoder.table().detach().to(base.dtype)
    prompt = dict(prompt_embeds=table[torch.arange(250) % CLASSES], negative_prompt_embeds=table[-1:].repeat(250, 1, 1))
    noise = pipeline.noise(range(250), settings.base_image_size).to(base.device, base.dtype)

    def make() -> None:
        theirs(**prompt, num_inference_steps=steps, guidance_scale=7.5, latents=noise, output_type="latent")

    took = seconds(make, 2) / steps
    say(what="diffusers' pipeline", batch=250, ms_a_step=1000 * took, tflops=2 * 250 * PASS / took / 1e12)


def compiled(base: BaseModel, settings: Settings) -> None:
    import dataclasses

    pipeline = some_pipeline(base, dataclasses.replace(settings, compile_unet=True))
    started = time.perf_counter()
    sample(pipeline, settings, 250, 1, 7.5)
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    took = seconds(lambda: sample(pipeline, settings, 250, 10, 7.5), 2) / 10
    say(
        what="sampling, compile_unet",
        batch=250,
        ms_a_step=1000 * took,
        tflops=2 * 250 * PASS / took / 1e12,
        compilation_s=first,
    )


def training(base: BaseModel, settings: Settings) -> None:
    time_steps(base, settings)
    torch.cuda.empty_cache()
    time_epochs(base, settings)


def time_steps(base: BaseModel, settings: Settings) -> None:
    operations = Operations(settings, DatasetFacts(1, 1, 1, CLASSES, settings.image_size), base)
    with torch.enable_grad():
        for batch in (64, 256, 512):
            with peak() as held:
                took = seconds(lambda: operations.train(base, batch, operations.conditions(batch)), 2)  # noqa: B023
            say(
                what="class_encoder step", batch=batch, ms=1000 * took, tflops=1.98 * batch * PASS / took / 1e12, **held
            )
    tuned = base.with_unet(float32_copy(base.unet))
    tuned.unet.requires_grad_(True).train()
    operations.encoder.requires_grad_(False)
    condition = operations.conditions(1)
    for batch in (16, 64, 128, 256, 512):
        try:
            with peak() as held:
                took = seconds(lambda: operations.train(tuned, batch, condition.expand(batch, -1, -1)), 2)  # noqa: B023
        except torch.OutOfMemoryError:
            say(what="unet step", batch=batch, out_of_memory=True)
            break
        say(
            what="unet step (without AdamW)", batch=batch, ms=1000 * took, tflops=3 * batch * PASS / took / 1e12, **held
        )


def time_epochs(base: BaseModel, settings: Settings) -> None:
    for part, batch in (("class_encoder", 64), ("unet", 16)):
        started = time.perf_counter()
        with peak() as held:
            records, _ = trained(base, settings, part, 40 * batch, batch, 1)
        say(what=f"{part}: an epoch of 40 steps", batch=batch, ms_a_step=1000 * records[-1].seconds / 40,
            with_saving_s=time.perf_counter() - started, **held)  # fmt: skip


def classifiers(base: BaseModel, settings: Settings) -> None:
    del base, settings
    for name, mode in dict(float32=nullcontext(), bfloat16=torch.autocast("cuda", torch.bfloat16)).items():
        for images, val in ((4000, 1000), (4000, 10_000)):
            fit(1, images, val)
            started = time.perf_counter()
            with mode:
                fit(10, images, val)
            torch.cuda.synchronize()
            say(
                what=f"classifier, {name}",
                images=images,
                validation=val,
                s_of_100_epochs=10 * (time.perf_counter() - started),
            )


PARTS = dict(
    repeat=repeat, syncs=syncs, sampling=sampling, training=training, classifier=classifiers, compiled=compiled
)


@click.group()
def main() -> None:
    """What a GPU does with Stable Diffusion 2.0 at its true size."""


@main.command()
@click.argument("parts", nargs=-1, type=click.Choice(list(PARTS)))
@click.option("--base-model", default=Settings.base_model, show_default=True)
def measure(parts: tuple[str, ...], base_model: str) -> None:
    """Figures of this machine's GPU, a line each."""
    settings = Settings.from_mapping(dict(experiment="gpu", dataset="digits", base_model=base_model, device="cuda"))
    say(device=torch.cuda.get_device_name(), torch=torch.__version__, memory_gib=torch.cuda.mem_get_info()[1] / GIB)
    for part in parts or PARTS:
        base = some_base(settings)
        PARTS[part](base, settings)
        del base
        torch.cuda.empty_cache()


@main.command()
@click.argument("file", type=click.Path(exists=True, path_type=Path))
@click.option("--card", help="Derive the costs of this card, whose arithmetic has another peak.")
@click.option("--peak", type=float, default=H100_TFLOPS, help="Its dense half-precision TFLOP/s; an H100 has 989.")
def costs(file: Path, card: str | None, peak: float) -> None:
    """The costs for `sdlab plan --costs`, from what `measure` printed on an H100.

    For another card, sampling, decoding and encoding take longer as its peak is lower. Training at the paper's batch sizes
    and the classifier are bound by the host, and stay.
    """
    first, *lines = map(json.loads, file.read_text().splitlines())

    def line(what: str, **which: object) -> dict:
        return next(x for x in lines if x["what"] == what and which.items() <= x.items())

    sampled = line("sampling", batch=250, guidance_scale=7.5)
    few, many = (line("classifier, float32", validation=n)["s_of_100_epochs"] / 100 for n in (1000, 10_000))
    validation = (many - few) / 9000  # seconds an image
    image = (few - 1000 * validation) / 4000
    encoder, unet = (line(f"{part}: an epoch of 40 steps") for part in ("class_encoder", "unet"))
    seconds = {
        "passes": sampled["ms_a_step"] / 1000 / 500,
        "images": line("decoding")["ms_an_image"] / 1000,
        "encoded": line("encoding")["ms_an_image"] / 1000,
        "class_encoder steps": encoder["ms_a_step"] / 1000,
        "unet steps": unet["ms_a_step"] / 1000,
    }
    seconds |= {f"{whose} images": image for whose in ("trial", "cell")}
    seconds |= {f"{whose} validations": validation for whose in ("trial", "cell")}
    for operation in ("passes", "images", "encoded"):
        seconds[operation] *= H100_TFLOPS / peak
    memory = {"generating": sampled["gib"], "01": encoder["gib"], "03": unet["gib"]}
    name = f"{card}, derived from {first['device']}" if card else first["device"]
    click.echo(json.dumps(dict(device=f"{name}, bfloat16", seconds=seconds,
                               memory={name: round(gib * GIB) for name, gib in memory.items()}), indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
