"""Synthetic sets: extended, cut short and resumed to the same bytes; nested; class counts as promised."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sdlab.class_encoder import ClassEncoder
from sdlab.diffusion_pipeline import ClassConditionalStableDiffusionPipeline
from sdlab.errors import BadInput
from sdlab.generation import (
    GenerationPlan,
    SyntheticSet,
    count_parallel_batches,
    generate,
    generate_images,
    real_labels,
)
from sdlab.runs.files import write_hashed_json
from sdlab.runs.shards import shard_path
from sdlab.sampling_config import SamplingConfig
from sdlab.schedulers import make_scheduler
from sdlab.seeds import derive_seed
from sdlab.tools.repair import regenerate_shards


@pytest.fixture
def pipeline(base):
    torch.manual_seed(1)
    encoder = ClassEncoder(3, base.tokens, base.width, hidden=16)
    return ClassConditionalStableDiffusionPipeline(
        base.vae, base.unet, encoder, make_scheduler("DDIMScheduler", base.scheduler_config)
    )


def plan(**more):
    given = dict(weights="w", scheduler="DDIMScheduler", num_inference_steps=2, guidance_scale=1.5, guidance_interval=(0.0, 1.0),
                 labels=(0, 1, 2), seed=7, base_size=16, image_size=8, shard_size=4)  # fmt: skip
    return GenerationPlan(**given | more)


def shards(made):
    return {p.name: p.read_bytes() for p in sorted(made.folder.glob("*.safetensors"))}


class Killed(Exception):
    pass


def dies_after(shard_count):
    """A progress bar that raises after so many shards, half a shard being one of its two steps."""

    class Bar:
        def __init__(self, **_):
            self.left = shard_count

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, _):
            self.left -= 0.5  # a shard is two steps here
            if not self.left:
                raise Killed

    return Bar


@pytest.mark.parametrize("after", [0.5, 1.5, 2.5])
def test_same_bytes_after_a_kill(pipeline, tmp_path, after):
    whole = generate(pipeline, plan(), tmp_path / "whole", 12)
    with pytest.raises(Killed):
        generate(pipeline, plan(), tmp_path / "cut", 12, progress=dies_after(after))
    assert len(shards(SyntheticSet(tmp_path / "cut" / plan().key(), plan()))) == int(after)
    cut = generate(pipeline, plan(), tmp_path / "cut", 12)
    assert len(shards(whole)) == 3 and shards(whole) == shards(cut)


def test_a_larger_set_extends_a_smaller_one(pipeline, tmp_path):
    """The rungs of a search, and x1 in x2: the same files, the same images, and only the new shards are made."""
    small = generate(pipeline, plan(), tmp_path, 6)
    first, before = small.split(6), shards(small)
    large = generate(pipeline, plan(), tmp_path, 12)
    assert large.folder == small.folder and before.items() <= shards(large).items()
    assert np.array_equal(large.split(12).images[:6], first.images)
    assert np.array_equal(large.split(12).labels, np.arange(12) % 3)


def test_images_are_those_of_their_own_seeds(pipeline, tmp_path):
    """Image 5 by hand: label 5 % 3, noise of (set seed, 5), uint8 at the classifier's size."""
    made = generate(pipeline, plan(), tmp_path, 8).split(8)
    decoded = pipeline([2], 2, 1.5, seeds=[derive_seed(7, 5)], output_type="pt").images
    resized = torch.nn.functional.interpolate((decoded.clamp(-1, 1) + 1) * 127.5, size=8, mode="bilinear")
    assert made.labels[5] == 2
    assert np.abs(made.images[5].astype(int) - resized[0].round().byte().numpy()).max() <= 1


def test_a_missing_shard_is_made_again_the_same(pipeline, tmp_path):
    made = generate(pipeline, plan(), tmp_path, 12)
    before = shards(made)
    shard_path(made.folder, 1).unlink()
    with pytest.raises(BadInput, match=r"shard_00001\.safetensors is missing"):
        made.split(12)
    assert shards(generate(pipeline, plan(), tmp_path, 12)) == before


def test_a_damaged_shard_is_refused_by_name(pipeline, tmp_path):
    made = generate(pipeline, plan(), tmp_path, 8)
    content = bytearray(shard_path(made.folder, 1).read_bytes())
    content[-1] ^= 1
    shard_path(made.folder, 1).write_bytes(content)
    with pytest.raises(BadInput, match=r"shard_00001\.safetensors is truncated or altered"):
        made.split(8)
    assert len(made.split(4)) == 4


def test_exhausted_memory_is_refused_and_names_the_setting(pipeline, tmp_path, monkeypatch):
    def no_room(*_, **__):
        raise torch.OutOfMemoryError("no room")

    first = shards(generate(pipeline, plan(), tmp_path, 4))
    monkeypatch.setattr(type(pipeline.vae), "decode", no_room)
    with pytest.raises(BadInput, match="does not hold a shard of 4 images of 16 px: take a smaller `shard_size`"):
        generate(pipeline, plan(), tmp_path, 8)
    assert shards(SyntheticSet(tmp_path / plan().key(), plan())) == first


@pytest.mark.parametrize(
    "more",
    [
        dict(guidance_scale=1.6),
        dict(guidance_interval=(0.0, 0.5)),
        dict(seed=8),
        dict(num_inference_steps=3),
        dict(labels=(0, 1)),
        dict(weights="v"),
        dict(resizing="bicubic"),
    ],
)
def test_whatever_changes_the_bytes_changes_the_folder(more):
    assert plan(**more).key() != plan().key() == "4b6fa938adc91499"  # as before there was `resizing`


def test_4000_images_over_c_classes():
    """4000 // C each, the remainder to the first classes (docs/method.md, item 18)."""
    for classes in (5, 7, 8, 9, 10, 100):
        counts = np.bincount(plan(labels=tuple(range(classes))).labels_of(0, 4000))
        assert counts.sum() == 4000 and counts.max() - counts.min() <= 1
        assert list(counts) == sorted(counts, reverse=True)


def test_xk_has_k_times_the_real_class_counts():
    real = np.repeat([0, 1, 2], [50, 7, 1])
    labels = plan(labels=real_labels(real))
    for k in (1, 2, 10):
        assert list(np.bincount(labels.labels_of(0, 58 * k))) == [50 * k, 7 * k, k]
    half = np.bincount(labels.labels_of(0, 29), minlength=3)  # spread evenly, not class after class
    assert abs(half[0] - 25) <= 1 and abs(half[1] - 3.5) <= 1


def test_seconds_are_clocked(pipeline, tmp_path):
    made = generate(pipeline, plan(), tmp_path, 8)
    clocked = [s["seconds"] for s in made.manifest["shards"].values()]
    assert made.seconds(8) == pytest.approx(sum(clocked)) and made.seconds(2) == pytest.approx(clocked[0] / 2)


def test_derived_seeds_do_not_collide():
    seeds = {derive_seed(s, i) for s in range(3) for i in range(2000)} | {derive_seed("a", 1), derive_seed(1, "a")}
    assert len(seeds) == 6002


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_progress_counts_every_image_once(pipeline, tmp_path, steps):
    heard = []
    generate_images(pipeline, plan(num_inference_steps=steps), range(5), heard.append)
    assert len(heard) == steps and sum(heard) == 5


def test_a_shard_holds_its_labels(pipeline, tmp_path):
    from safetensors.numpy import load_file

    made = generate(pipeline, plan(), tmp_path, 8)
    assert load_file(shard_path(made.folder, 1))["labels"].tolist() == [1, 2, 0, 1]
    assert "labels" not in made.manifest["plan"]
    assert made.split(7).labels.tolist() == [0, 1, 2, 0, 1, 2, 0]  # read from the shards


@pytest.mark.parametrize(
    ("count", "threads", "parts"), [(250, 2, 2), (250, 8, 2), (250, 3, 3), (250, 1, 1), (127, 2, 1), (4, 2, 1)]
)
def test_a_shard_is_made_in_a_few_parts_on_a_cpu(count, threads, parts):
    torch.set_num_threads(threads)
    try:
        assert count_parallel_batches(count, torch.device("cpu")) == parts
        assert count_parallel_batches(count, torch.device("cuda")) == 1
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_parts_at_a_time_make_the_same_images(pipeline, base, scheduler, monkeypatch):
    """Each part has a scheduler of its own, which counts steps; uint8 images differ by rounding at most."""
    pipeline.scheduler = make_scheduler(scheduler, base.scheduler_config)
    alone = generate_images(pipeline, plan(num_inference_steps=5), range(3, 13))
    monkeypatch.setattr("sdlab.generation.SMALLEST_BATCH", 4)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    heard = []
    together = generate_images(pipeline, plan(num_inference_steps=5), range(3, 13), heard.append)
    assert together.shape == (10, 3, 8, 8) and np.abs(together.astype(int) - alone).max() <= 1
    assert sum(heard) == 10 and len(heard) == 10  # two parts, five steps each


def test_interval_reaches_the_pipeline(pipeline):
    off = generate_images(pipeline, plan(guidance_scale=5.0, guidance_interval=(0.0, 0.0)), range(4))
    assert np.array_equal(off, generate_images(pipeline, plan(guidance_scale=1.0), range(4)))
    assert not np.array_equal(off, generate_images(pipeline, plan(guidance_scale=5.0), range(4)))


def test_compiling_without_a_compiler_is_refused(settings, base, monkeypatch):
    from sdlab.sampling_config import prepare_unet

    table = ClassEncoder(3, base.tokens, base.width, hidden=16).tabulated()
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert prepare_unet(base.unet, table, settings).takes_rows
    with pytest.raises(BadInput, match=r"no C\+\+ compiler"):
        prepare_unet(base.unet, table, dataclasses.replace(settings, compile_unet=True))


def test_repair_makes_all_shards_up_to_the_last_that_a_manifest_names(settings, base, data, monkeypatch):
    """Workers' shards come in any order: an interrupted set may have a gap."""
    folder, asked = settings.run_folder / "synthetic" / "key", []
    config = SamplingConfig(num_inference_steps=4, guidance_scale=1.5, class_encoder_epoch=1)
    made_from = dict(config=dataclasses.asdict(config), checkpoints={}, labels="uniform")
    shards = {str(index): dict(sha256="", seconds=0.0) for index in (0, 1, 3)}
    write_hashed_json(
        folder / "manifest.json", dict(key="key", plan=dict(seed=5, shard_size=5), made_from=made_from, shards=shards)
    )
    monkeypatch.setattr("sdlab.base_models.load_base_model", lambda _: base)
    monkeypatch.setattr("sdlab.data.datasets.load_dataset", lambda _: data)
    monkeypatch.setattr("sdlab.sampling_config.load_pipeline", lambda *_: None)
    plan = SimpleNamespace(key=lambda: "key", shard_size=5)
    monkeypatch.setattr("sdlab.generation.plan_generation", lambda *_: plan)
    monkeypatch.setattr("sdlab.generation.generate", lambda pipeline, plan, root, count, *_: asked.append(count))
    regenerate_shards(settings, "key")
    assert asked == [20]
