"""The hand-over: the chosen set as a folder or an npz, whole, checked, one shard at a time, nothing written over."""

import dataclasses
import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from sdlab.errors import BadInput
from sdlab.runs.export import export_set
from sdlab.runs.files import sha256_of_file, write_hashed_json, write_json
from sdlab.runs.shards import shard_path
from sdlab.runs.stages import StageState, State

CLASSES = ["no finding", "a/b: ../c", "été"]


@pytest.fixture
def finished(settings, monkeypatch):
    """An experiment with a pool of 25 images in shards of 10, of which 20 were chosen."""
    monkeypatch.setattr("sdlab.runs.export.stage_state", lambda *_: StageState(State.DONE))
    make_pool(settings, shards=3, size=10, pixels=8, images=25, chosen=20)
    return settings


def make_pool(settings, shards, size, pixels, images, chosen):
    folder, rng, entries = settings.run_folder / "synthetic" / "abc", np.random.default_rng(0), {}
    folder.mkdir(parents=True)
    for index in range(shards):
        held = rng.integers(0, 256, (size, 3, pixels, pixels), np.uint8)
        labels = np.arange(index * size, (index + 1) * size) % 3
        save_file({"images": held, "labels": labels}, shard_path(folder, index))
        entries[str(index)] = dict(sha256=sha256_of_file(shard_path(folder, index)), seconds=1.0)
    plan = dict(shard_size=size, seed=0)
    write_hashed_json(folder / "manifest.json", dict(key="abc", plan=plan, made_from=None, shards=entries))
    metrics, cell = settings.run_folder / "metrics", dict(test=dict(mean=0.5, std=0.1, n=100, recall=[]))
    pool = dict(synthetic="abc", images=images, classes=CLASSES, config=dict(num_inference_steps=5))
    write_json(metrics / "scaling.json", dict(chosen="x2", protocol="sealed", pool=pool))
    write_json(metrics / "x02.json", cell | dict(images=chosen))
    write_json(metrics / "real.json", cell)


def pool_images(settings):
    from safetensors.numpy import load_file

    folder = settings.run_folder / "synthetic" / "abc"
    return np.concatenate([load_file(shard_path(folder, i))["images"] for i in range(3)])


@pytest.mark.parametrize("images", [None, 1, 10, 25])
def test_a_folder_has_every_image_in_its_classs_subfolder(finished, tmp_path, images):
    about = export_set(finished, tmp_path / "out", images)
    expected = images or 20
    files = sorted((tmp_path / "out").rglob("*.png"), key=lambda path: path.name)
    assert about["images"] == len(files) == expected
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == [
        "000_no_finding",
        "001_a_b_.._c",
        "002_t",
        "set.json",
    ]
    for place, path in enumerate(files):
        assert path.name == f"{place:06d}.png" and path.parent.name.startswith(f"{place % 3:03d}_")
        assert np.array_equal(np.asarray(Image.open(path)).transpose(2, 0, 1), pool_images(finished)[place])
    kept = json.loads((tmp_path / "out" / "set.json").read_text())
    assert kept["classes"] == CLASSES and kept["chosen"]["test_accuracy"]["real"]["mean"] == 0.5
    assert kept["dataset"] == finished.dataset and str(tmp_path) not in json.dumps(kept)


def test_torchvision_reads_the_folder(finished, tmp_path):
    from torchvision.datasets import ImageFolder

    export_set(finished, tmp_path / "out")
    read = ImageFolder(tmp_path / "out")
    assert sorted(label for _, label in read.samples) == sorted(i % 3 for i in range(20))


def test_an_npz_has_medmnists_layout(finished, tmp_path):
    export_set(finished, tmp_path / "set.npz", 25)
    with np.load(tmp_path / "set.npz", allow_pickle=False) as kept:
        assert np.array_equal(kept["train_images"].transpose(0, 3, 1, 2), pool_images(finished)[:25])
        assert kept["class_names"].tolist() == list(CLASSES)
        assert kept["train_labels"].shape == (25, 1) and list(kept["train_labels"][:, 0]) == [i % 3 for i in range(25)]
        assert json.loads(str(kept["about"]))["images"] == 25


@pytest.mark.parametrize(
    ("target", "images", "said"),
    [
        ("taken", None, "taken exists: nothing is overwritten"),
        ("taken.npz", None, "taken.npz exists"),
        ("set.zip", None, "ends in .zip"),
        ("no/such/folder", None, "There is no folder"),
        ("out", 26, "`--images` is 26: 05_scaling made 25"),
        ("out", 0, "`--images` is 0"),
    ],
)
def test_what_cannot_be_exported_is_refused(finished, tmp_path, target, images, said):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken.npz").write_text("a user's")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match=said):
        export_set(finished, tmp_path / target, images)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unfinished_experiment_is_refused(settings, tmp_path):
    with pytest.raises(BadInput, match="no synthetic set yet: 05_scaling is not run"):
        export_set(settings, tmp_path / "out")


@pytest.mark.parametrize("target", ["out", "out.npz"])
def test_a_damaged_shard_leaves_nothing(finished, tmp_path, target):
    path = shard_path(finished.run_folder / "synthetic" / "abc", 1)
    path.write_bytes(path.read_bytes()[:-1])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match=r"shard_00001\.safetensors is truncated or altered"):
        export_set(finished, tmp_path / target)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_seen_before(finished, tmp_path, monkeypatch):
    from collections import namedtuple

    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("usage", "free")(100))
    with pytest.raises(BadInput, match="GB free"):
        export_set(finished, tmp_path / "out")


def test_memory_does_not_grow_with_the_set(settings, tmp_path, monkeypatch):
    """Ten times the images, the same peak: shards pass through one at a time."""
    monkeypatch.setattr("sdlab.runs.export.stage_state", lambda *_: StageState(State.DONE))
    peaks = []
    for shards in (3, 30):
        one = dataclasses.replace(settings, experiment=f"e{shards}")
        make_pool(one, shards=shards, size=50, pixels=32, images=50 * shards, chosen=50 * shards)
        tracemalloc.start()
        export_set(one, tmp_path / f"{shards}.npz")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] and peaks[0] > 50 * 3 * 32 * 32
