"""Time and memory against the number of images: generation, export and latents of 5,000 and of 50,000.

    .venv/bin/python scripts/measure_growth.py

Each in a process of its own with the embedded base model (one step, 32 px), so that its peak memory is its own.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COUNTS = (5_000, 50_000)


def generating(count: int, folder: Path) -> None:
    from benchmarks import silent
    from sdlab.base_models import load_base_model, make_scheduler
    from sdlab.class_encoder import ClassEncoder
    from sdlab.generation import GenerationPlan, generate, prepare_unet, uniform_labels
    from sdlab.paths import PARAMS
    from sdlab.pipeline import ClassConditionalStableDiffusionPipeline
    from sdlab.settings import Settings

    settings = Settings.from_file(PARAMS / "digits.yaml")
    base = load_base_model(settings)
    table = ClassEncoder(10, base.tokens, base.width).tabulated().requires_grad_(False)
    scheduler = make_scheduler(settings.scheduler, base.scheduler_config)
    unet = prepare_unet(base.unet, table, settings)
    pipeline = ClassConditionalStableDiffusionPipeline(base.vae, unet, table, scheduler)
    plan = GenerationPlan(
        "", settings.scheduler, 1, 1.0, (0.0, 1.0), uniform_labels(10), 0, 32, 32, settings.shard_size
    )
    generate(pipeline, plan, folder, count, silent)


def exporting(count: int, folder: Path) -> None:
    from sdlab.runs.export import write_npz
    from sdlab.runs.shards import read_shards

    (made,) = folder.iterdir()
    about = dict(images=count, image_size=32, classes=[str(c) for c in range(10)])
    write_npz(folder / "set.npz", read_shards(made, count), about, lambda _: None)


def encoding(count: int, folder: Path) -> None:
    import numpy as np

    from benchmarks import silent
    from sdlab.base_models import load_base_model
    from sdlab.latents import encode_images
    from sdlab.paths import PARAMS
    from sdlab.settings import Settings

    base = load_base_model(Settings.from_file(PARAMS / "digits.yaml"))
    rng = np.random.default_rng(0)
    images = lambda rows: rng.integers(0, 256, (len(rows), 3, 32, 32), np.uint8)  # noqa: E731
    encode_images(images, count, base, 32, folder / "latents.npz", "random", silent)


WORK = dict(generating=generating, exporting=exporting, encoding=encoding)


def main() -> None:
    if len(sys.argv) > 1:
        what, count, folder = sys.argv[1:]
        __import__("sdlab.benchmarks" if what != "exporting" else "sdlab.export")  # imports are not clocked
        started = time.perf_counter()
        WORK[what](int(count), Path(folder))
        seconds = time.perf_counter() - started
        print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
        return
    print("| what | images | seconds | peak MiB |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        for what in WORK:
            for count in COUNTS:
                folder = Path(scratch) / str(count)
                folder.mkdir(exist_ok=True)
                command = [sys.executable, __file__, what, str(count), str(folder)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                seconds, peak = json.loads(done.stdout.splitlines()[-1])
                print(f"| {what} | {count:,} | {seconds:.1f} | {peak:.0f} |", flush=True)
            if what == "encoding":
                sizes = [(Path(scratch) / str(count) / "latents.npz").stat().st_size for count in COUNTS]
                print(f"\nlatents.npz: {sizes[0] / 1e6:.1f} and {sizes[1] / 1e6:.1f} MB (8 x 4 x 4 latents).")


if __name__ == "__main__":
    main()
