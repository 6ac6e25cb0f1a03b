"""Benchmarks: both ways really do the same work, and the ratio is usual / ours. Nothing here asserts a time."""

import dataclasses
import shutil
import subprocess
import sys
import time

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import ENVIRONMENT, SMOKE
from test_diffusion_pipeline import REFERENCE

from sdlab.errors import BadInput
from sdlab.paths import PROJECT_ROOT
from sdlab.tools import measuring

sys.path.insert(0, str(PROJECT_ROOT / "benchmarks"))
from comparison import BenchmarkSettings, compare, save_results, time_in_turn
from parts import Classifiers, Generation, Training, base_model_to_time, profile_unet

BENCHMARKS = PROJECT_ROOT / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def settings(settings) -> BenchmarkSettings:
    return BenchmarkSettings.from_mapping(settings.as_dict() | dict(images=40))


def test_ways_take_turns_after_one_untimed_repetition():
    called = []
    ways = {name: lambda name=name: called.append(name) for name in ("ours", "usual")}
    seconds = time_in_turn(ways, 3, CPU)
    assert list(seconds.columns) == ["ours", "usual"] and len(seconds) == 3 and (seconds >= 0).all().all()
    rounds = [tuple(called[i : i + 2]) for i in range(0, 8, 2)]
    assert rounds == [("ours", "usual"), ("usual", "ours"), ("ours", "usual"), ("usual", "ours")]


def test_a_way_may_time_itself():
    seconds = time_in_turn({"ours": lambda: 2.0, "usual": lambda: time.sleep(0.01)}, 2, CPU)
    assert seconds.ours.tolist() == [2.0, 2.0] and (seconds.usual >= 0.01).all()


def test_the_ratio_is_within_a_repetition(tmp_path):
    """A machine that is half as fast in one repetition does not change it."""
    row = compare("part", "other", pd.DataFrame(dict(ours=[1.0, 2.0, 1.0], usual=[3.0, 6.0, 4.0])))
    assert (row["ratio"], row["lowest"], row["highest"], row["repetitions"]) == (3.0, 3.0, 4.0, 3)
    save_results(tmp_path, "title", [row], ["a remark"])
    assert "| part | other | 1 | 4 | 3 | 3 | 4 | 3 |\n\na remark\n" in (tmp_path / "benchmarks.md").read_text()


@pytest.mark.parametrize("part", ["class_encoder", "unet"])
def test_an_epoch_trains_the_same_part_both_ways(settings, base, data, part, monkeypatch):
    """The weights of the part change, and the other's do not."""
    training = Training(part, base, settings, data)
    assert training.count == 40
    used, models = [], training.models
    monkeypatch.setattr(training, "models", lambda: used.append(models()) or used[-1])
    for way in (training.ours, training.usual):
        before = base.unet.conv_in.weight.clone()
        assert way() > 0
        base_model, encoder = used.pop()
        changed = {
            "class_encoder": not torch.equal(encoder.table(), training.encoder.table()),
            "unet": not torch.equal(base_model.unet.conv_in.weight, before),
        }
        assert changed == {name: name == part for name in changed}


def test_both_ways_of_training_classifiers_learn(settings, data):
    """On images whose class a bright bar tells: the same recipe, so both learn it."""
    easy = dataclasses.replace(settings, classifier_train_steps=60, classifier_epochs=6, classifier_learning_rate=1e-2)
    classifiers = Classifiers(easy, data, CPU)
    classifiers.ours()
    classifiers.usual()
    chance = data.majority_share("test")
    for accuracy in classifiers.accuracy.values():
        assert len(accuracy) == easy.classifier_seeds and np.mean(accuracy) > chance + 0.2, classifiers.accuracy


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (dict(images=30), r"`images` is 30, but it has to be a multiple of `shard_size` \(20\)"),
        (dict(images=0), "`images` is 0: allowed is at least 10"),
        (dict(parts="unet speed"), "`parts` is 'unet speed': allowed are some of `generation scaling"),
        (dict(parts=""), "`parts` is '': allowed are some of"),
        (dict(repetition=3), "Did you mean `repetitions`"),
    ],
)
def test_bad_settings_are_refused(settings, wrong, sentence):
    with pytest.raises(BadInput, match=sentence):
        BenchmarkSettings.from_mapping(settings.as_dict() | wrong)


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.yaml")), ids=lambda p: p.stem)
def test_a_notebook_finds_the_files_of_its_folder(path):
    settings = BenchmarkSettings.from_notebook(dict(experiment=path.stem, repetitions=7))
    assert settings.repetitions == 7 and settings.folder == PROJECT_ROOT / "runs" / "benchmarks" / path.stem
    assert yaml.safe_load(path.read_text())["images"] == settings.images


def test_the_shares_of_a_pass_add_up(settings, base, monkeypatch):
    monkeypatch.setattr("parts.stable_diffusion_pipeline", lambda *_: None)  # needs transformers
    shares, sentence = profile_unet(Generation(base, settings, 3))
    assert shares.sum() == pytest.approx(100) and (shares >= 0).all() and shares.is_monotonic_decreasing
    assert shares[shares.index.str.contains("conv")].sum() > 5 and "80 images" in sentence


def test_missing_weights_are_random_ones_of_the_right_size(settings, base, base_folder, tmp_path, monkeypatch):
    shutil.copytree(base_folder, tmp_path / "shapes" / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(measuring, "SHAPES", tmp_path / "shapes")
    monkeypatch.setitem(measuring.PINNED, "owner/model", "0" * 40)
    random = base_model_to_time(dataclasses.replace(settings, base_model="owner/model"))
    assert random.unet.num_parameters() == base.unet.num_parameters()
    assert all(p.isfinite().all() and p.std() > 0 for p in random.unet.parameters() if p.numel() > 1)


def run_benchmarks(folder, **changes):
    given = yaml.safe_load(SMOKE.read_text()) | dict(runs_root=str(folder / "runs"), images=20, repetitions=2)
    (folder / "smoke.yaml").write_text(yaml.safe_dump(given | changes))
    command = [sys.executable, BENCHMARKS / "run.py", folder / "smoke.yaml"]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=folder)


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="`make test` installs transformers there")
def test_the_notebook_writes_its_table(tmp_path):
    done = run_benchmarks(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# Benchmarks smoke" in done.stdout and "GFLOP/s" in done.stdout
    folder = tmp_path / "runs" / "benchmarks" / "smoke"
    assert {path.name for path in folder.iterdir()} == {f"benchmarks.{kind}" for kind in ("csv", "ipynb", "md", "png")}
    table = pd.read_csv(folder / "benchmarks.csv")
    assert len(table) == 5 and (table.lowest <= table.ratio).all() and (table.repetitions == 2).all()
    text = (folder / "benchmarks.md").read_text()
    assert float(text.partition("two ways: ")[2].split(";")[0]) < 1e-3
    assert "20 images generated instead of 110" in text  # 10 against 55 times x1
    assert str(tmp_path) not in text
    cells = nbformat.read(folder / "benchmarks.ipynb", 4).cells
    assert not [o for cell in cells for o in cell.get("outputs", []) if o.get("name") == "stderr"]


def test_a_failure_is_one_sentence(tmp_path):
    done = run_benchmarks(tmp_path, images=25)
    assert done.returncode == 1 and done.stderr.startswith("Error: `images` is 25") and not done.stdout
    assert not (tmp_path / "runs").exists()
