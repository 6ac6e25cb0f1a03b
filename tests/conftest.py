"""Fixtures: a base model of a few thousand parameters in diffusers' folder format, and settings of smoke depth."""

import contextlib
import ctypes
import dataclasses
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

# Two busy OpenMP threads on two cores that others use too are many times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # they test a CPU's bytes; a GPU's: scripts/measure_gpu.py

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from sdlab.base_models import BaseModel, load_base_model
from sdlab.data.images import ImageDataset, Split
from sdlab.runs.files import file_lock
from sdlab.runs.records import StageRecord
from sdlab.settings import Settings

torch.set_num_threads(1)
SMOKE = Path(__file__).parent / "smoke.yaml"
# A folder as people name them: what means something to URLs, patterns, format strings and shells.
ODD_NAME = "Zoë's runs #1 [50%20] {x} $HOME & more? "
BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}


# Files that take minutes: the workers begin with them, so that none is left alone with one at the end.
LONGEST = ("test_suites", "test_damage", "test_notebooks", "test_experiments", "test_workers", "test_benchmarks")


def pytest_collection_modifyitems(items):
    order = {name: position for position, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def needs(found: bool, what: str) -> None:
    """Skip a test that needs an optional system package; fail where all of them are said to be here."""
    if not found and os.environ.get("SDLAB_ALL_TESTS"):
        pytest.fail(f"SDLAB_ALL_TESTS is set, and this test needs {what}")
    if not found:
        pytest.skip(f"needs {what}")


def command(*arguments, cwd=None):
    return subprocess.run(list(map(str, arguments)), capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd)


@contextlib.contextmanager
def shut_to_this_process(path):
    """A file or folder without any mode bit, whoever this is."""
    mode = path.stat().st_mode
    with obeying_modes() if os.geteuid() == 0 else contextlib.nullcontext():
        path.chmod(0)
        try:
            with pytest.raises(PermissionError):
                list(path.iterdir()) if stat.S_ISDIR(mode) else path.read_bytes()
            yield
        finally:
            path.chmod(mode)


@contextlib.contextmanager
def obeying_modes():
    """Root without the two capabilities (bits 1 and 2) that let it pass modes."""
    if sys.platform != "linux":
        pytest.skip("root passes all modes")
    libc, header, kept = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, kept) == 0
    assert libc.capset(header, (ctypes.c_uint32 * 6)(kept[0] & ~0b110, *kept[1:])) == 0
    try:
        yield
    finally:
        libc.capset(header, kept)


def record_of(**given):
    """The JSON of a finished stage's record with empty fields."""
    empty = dict(stage="", settings={}, upstream={}, inputs={}, begun="", opened_at=0.0, environment={}, finished="yes")
    return dataclasses.asdict(StageRecord(**empty | given))


def write_base_model(folder: Path, prediction_type: str = "epsilon") -> Path:
    """Random weights, but every kind of layer that SD has: cross-attention, down- and upsampling, a KL-VAE."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, scaling_factor=0.5,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=12, attention_head_dim=4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1,
        set_alpha_to_one=False, prediction_type=prediction_type,
    )  # fmt: skip
    for name, part in (("vae", vae), ("unet", unet), ("scheduler", scheduler)):
        part.save_pretrained(folder / name)
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "config.json").write_text(json.dumps({"max_position_embeddings": 5}))
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def v_base_folder(tmp_path_factory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("v_base"), "v_prediction")


@pytest.fixture
def settings(tmp_path, base_folder) -> Settings:
    """Smoke depth, the random base model, everything under `tmp_path`."""
    given = yaml.safe_load(SMOKE.read_text())
    given |= dict(base_model=str(base_folder), base_image_size=16, runs_root=str(tmp_path / "runs"))
    return Settings.from_mapping(given | dict(reports_root=str(tmp_path / "reports")))


@pytest.fixture
def base(settings) -> BaseModel:
    return load_base_model(settings)


@pytest.fixture(scope="session")
def data() -> ImageDataset:
    """Three classes of 8 px images that a small classifier can tell apart: bright in one third of the width."""
    rng = np.random.default_rng(0)

    def split(n):
        labels = np.arange(n) % 3
        images = rng.integers(0, 120, (n, 3, 8, 8))
        for image, label in zip(images, labels, strict=True):
            image[:, :, 3 * label : 3 * label + 2] += 120
        return Split(images.astype(np.uint8), labels.astype(np.int64))

    return ImageDataset("bars", "made by the tests", ("left", "middle", "right"), split(48), split(24), split(30))


def write_smoke(folder: Path) -> Path:
    """A parameter file of smoke depth whose runs and reports lie next to it."""
    places = dict(runs_root=str(folder / "runs"), reports_root=str(folder / "reports"))
    (folder / "smoke.yaml").write_text(yaml.safe_dump(yaml.safe_load(SMOKE.read_text()) | places))
    return folder / "smoke.yaml"


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The folder of such a file."""
    folder = tmp_path_factory.mktemp(ODD_NAME)
    write_smoke(folder)
    return folder


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory):
    """`sdlab run`, whole, and what it printed: made by the worker that asks first, the others copy it. Tests that damage
    it take a copy, too."""
    temporary = tmp_path_factory.getbasetemp()
    shared = (temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary) / f"{ODD_NAME} shared"
    with file_lock(shared / "lock"):
        if not (shared / "printed.json").exists():
            done = command(BIN / "sdlab", "run", write_smoke(shared))
            assert done.returncode == 0, done.stdout + done.stderr
            (shared / "printed.json").write_text(json.dumps([done.args, 0, done.stdout, done.stderr]))
    for name in ("runs", "reports"):
        shutil.copytree(shared / name, world / name, dirs_exist_ok=True)
    return world, subprocess.CompletedProcess(*json.loads((shared / "printed.json").read_text()))
