"""Benchmarks: both ways really do the same work, and the ratio is theirs over ours. Nothing here asserts a time."""

import dataclasses
import shutil
import subprocess
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMOKE
from test_notebooks import BIN, ENVIRONMENT
from test_pipeline import REFERENCE

from benchmarks import (
    Comparison,
    Generation,
    Judging,
    Training,
    base_to_time,
    side_by_side,
    table_of,
    table_text,
    where_time_goes,
)
from sdlab import base_models
from sdlab.errors import BadInput

CPU = torch.device("cpu")


def test_ways_take_turns_after_one_unclocked_round():
    called = []
    ways = {name: lambda name=name: called.append(name) for name in ("ours", "theirs")}
    seconds = side_by_side(ways, 3, CPU)
    assert list(seconds.columns) == ["ours", "theirs"] and len(seconds) == 3 and (seconds >= 0).all().all()
    rounds = [tuple(called[i : i + 2]) for i in range(0, 8, 2)]
    assert rounds == [("ours", "theirs"), ("theirs", "ours"), ("ours", "theirs"), ("theirs", "ours")]


def test_a_way_may_clock_itself():
    seconds = side_by_side({"ours": lambda: 2.0, "theirs": lambda: time.sleep(0.01)}, 2, CPU)
    assert seconds.ours.tolist() == [2.0, 2.0] and (seconds.theirs >= 0.01).all()


def test_the_ratio_is_within_a_repetition(settings):
    """A machine that is half as fast in one repetition leaves it as it was."""
    seconds = pd.DataFrame(dict(ours=[1.0, 2.0, 1.0], theirs=[3.0, 6.0, 4.0]))
    found = Comparison.of("part", "other", seconds, settings)
    assert (found.ratio, found.lowest, found.highest, found.repetitions) == (3.0, 3.0, 4.0, 3)
    text = table_text(table_of([found]))
    assert text.loc[0, "times"] == "3.00" and text.loc[0, "range"] == "3.00 to 4.00"


@pytest.mark.parametrize("part", ["class_encoder", "unet"])
def test_an_epoch_trains_the_same_part_both_ways(settings, base, data, part, monkeypatch):
    """The part that is trained moves, and the other does not."""
    ours = dataclasses.replace(settings, benchmark_images=24)
    training = Training(part, base, ours, data)
    assert training.count == 24
    made, parts = [], training.parts
    monkeypatch.setattr(training, "parts", lambda: made.append(parts()) or made[-1])
    for way in (training.ours, training.theirs):
        before = base.unet.conv_in.weight.clone()
        assert way() > 0
        its_base, encoder = made.pop()
        moved = {
            "class_encoder": not torch.equal(encoder.table(), training.encoder.table()),
            "unet": not torch.equal(its_base.unet.conv_in.weight, before),
        }
        assert moved == {name: name == part for name in moved}


def test_both_ways_of_training_classifiers_learn(settings, data):
    """On images whose class a bright bar tells: the same recipe, so both learn it."""
    easy = dataclasses.replace(settings, classifier_train_steps=60, classifier_epochs=6, classifier_learning_rate=1e-2)
    judging = Judging(easy, data, CPU)
    judging.ours()
    judging.theirs()
    chance = data.majority_share("test")
    for way in ("ours", "theirs"):
        assert len(judging.accuracy[way]) == easy.classifier_seeds
        assert np.mean(judging.accuracy[way]) > chance + 0.2, judging.accuracy


def test_whole_shards_only(settings, base):
    with pytest.raises(BadInput, match=r"`benchmark_images` is 30, no multiple of `shard_size` \(20\)"):
        Generation(base, dataclasses.replace(settings, benchmark_images=30, shard_size=20), 3)


def test_where_the_time_goes_adds_up(settings, base, monkeypatch):
    monkeypatch.setattr("side_by_side.stable_diffusion_pipeline", lambda *_: None)  # needs transformers
    generation = Generation(base, dataclasses.replace(settings, benchmark_images=20), 3)
    shares, words = where_time_goes(generation)
    assert shares.share.sum() == pytest.approx(100) and (shares.share >= 0).all()
    assert shares.set_index("operation").share["convolutions"] > 5 and "40 images" in words


def test_weights_that_are_not_here_are_random_ones_of_the_right_size(
    settings, base, base_folder, tmp_path, monkeypatch
):
    shutil.copytree(base_folder, tmp_path / "shapes" / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(base_models, "SHAPES", tmp_path / "shapes")
    monkeypatch.setitem(base_models.PINNED, "owner/model", "0" * 40)
    made = base_to_time(dataclasses.replace(settings, base_model="owner/model"))
    assert made.unet.num_parameters() == base.unet.num_parameters()
    assert all(p.isfinite().all() and p.std() > 0 for p in made.unet.parameters() if p.numel() > 1)


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="`make test` puts transformers there")
def test_notebook_08_writes_its_table(tmp_path):
    where = [v for n in ("runs_root", "reports_root") for v in ("-p", n, tmp_path / n)]
    arguments = (
        BIN / "sdlab",
        "benchmark",
        SMOKE,
        *where,
        "-p",
        "benchmark_images",
        20,
        "-p",
        "benchmark_repetitions",
        2,
    )
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sdlab benchmark smoke" in done.stdout and "GFLOP/s" in done.stdout
    folder = tmp_path / "reports_root" / "smoke"
    assert {path.name for path in folder.iterdir()} == {
        "08_benchmarks.ipynb",
        *(f"benchmarks.{k}" for k in ("csv", "md", "png")),
    }
    table = pd.read_csv(folder / "benchmarks.csv")
    assert len(table) == 5 and (table.lowest <= table.ratio).all() and (table.repetitions == 2).all()
    difference = float((folder / "benchmarks.md").read_text().partition("two ways: ")[2].split()[0])
    assert difference < 1e-3
    series = table[table.part.str.startswith("x1 ...")].squeeze()
    assert "20 made" in series.part and "110 made" in series.alternative  # 10 against 55 times x1
    assert str(tmp_path) not in (folder / "benchmarks.md").read_text()
