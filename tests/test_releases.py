"""A release makes the run's own set again, without its data, and notices whatever is not as it was released."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from click.testing import CliRunner
from sklearn.linear_model import LogisticRegression

from sdlab.class_encoder import ClassTable
from sdlab.data.datasets import load_dataset
from sdlab.errors import BadInput
from sdlab.evaluation import generate_pool
from sdlab.paths import PARAMS
from sdlab.runs import releases
from sdlab.runs.checkpoints import epoch_folder, save_checkpoint
from sdlab.runs.experiment import Experiment
from sdlab.runs.files import read_hashed_json, write_hashed_json, write_json
from sdlab.runs.records import environment
from sdlab.runs.shards import read_shards
from sdlab.runs.stages import StageState, State
from sdlab.sampling_config import SamplingConfig
from sdlab.settings import Settings
from sdlab.tools import released_sets
from sdlab.tools.cli import cli


@pytest.fixture
def released(settings, data, base, tmp_path, monkeypatch):
    """A finished notebook 05, released below the folder of committed results."""
    settings = dataclasses.replace(
        settings, scaling_max=2, shard_size=20, image_size=8, reports_root=str(tmp_path / "reference")
    )
    run = Experiment(settings, data, base)
    torch.manual_seed(0)
    table = ClassTable(num_classes=3, tokens=base.tokens, width=base.width)
    torch.nn.init.normal_(table.conditions)
    save_checkpoint(table, epoch_folder(run.folder / "class_encoder", 4))
    save_checkpoint(base.unet, epoch_folder(run.folder / "unet", 2))
    config = SamplingConfig(num_inference_steps=2, guidance_scale=1.5, class_encoder_epoch=4, unet_epoch=2)
    count = 2 * len(data.train)
    pool = generate_pool(run, config, count)
    cell = dict(test=dict(mean=0.5, std=0.1, n=100), images=len(data.train))
    described = dict(
        synthetic=pool.plan.key(), images=count, classes=list(data.class_names), config=dataclasses.asdict(config)
    )
    counts = torch.bincount(torch.from_numpy(data.train.labels)).tolist()
    for name, value in dict(
        scaling=dict(chosen="x1", protocol="sealed", pool=described), x01=cell, real=cell, search_1={}, search_2={},
        data=dict(counts=dict(train=counts)),
    ).items():  # fmt: skip
        write_json(run.metrics_path(name), value)
    monkeypatch.setattr(releases, "stage_state", lambda *_: StageState(State.DONE))
    record = SimpleNamespace(inputs=dict(base_model=base.fingerprint()), environment=environment(base))
    monkeypatch.setattr(releases, "read_record", lambda *_: record)
    monkeypatch.setattr(released_sets, "REFERENCE", tmp_path / "reference")
    releases.write_release(settings)
    return dataclasses.replace(settings, runs_root=str(tmp_path / "elsewhere")), pool


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_the_same_bytes_elsewhere_without_the_data(released):
    settings, pool = released
    elsewhere = dataclasses.replace(settings, dataset="nowhere/at/all")
    folder, about, comparison = released_sets.make_released_set(elsewhere)
    assert folder != pool.folder and about["images"] == 48 and comparison == "All 3 files have the released bytes."
    assert len(shards(folder)) == 3 and shards(folder).items() < shards(pool.folder).items()
    _, about, comparison = released_sets.make_released_set(elsewhere, whole=True)
    assert shards(folder) == shards(pool.folder) and about["images"] == 96
    assert comparison == f"All {len(shards(folder))} files have the released bytes."


def test_a_release_names_no_path_of_its_machine_and_is_not_written_over(released, tmp_path):
    settings, _ = released
    folder = settings.report_folder / "release"
    text = "".join(path.read_text() for path in folder.rglob("*") if path.suffix in (".json", ".yaml"))
    assert str(tmp_path) not in text
    kept = yaml.safe_load((folder / "settings.yaml").read_text())
    assert kept["shard_size"] == 20 and not {"runs_root", "device", "cluster"} & kept.keys()
    with pytest.raises(BadInput, match="nothing is overwritten"):
        releases.write_release(settings)


def test_other_bytes_are_counted_and_explained(released):
    settings, _ = released
    path = settings.report_folder / "release" / "release.json"
    release = read_hashed_json(path)
    release["pool"]["shards"]["0"], release["environment"]["torch"] = "0" * 64, "1.0"
    write_hashed_json(path, release)
    *_, comparison = released_sets.make_released_set(settings, whole=True)
    count = len(release["pool"]["shards"])
    assert comparison.startswith(f"{count - 1} of {count} files have the released bytes (torch 1.0 -> ")


@pytest.mark.parametrize(
    "name", ["unet/epoch_02/diffusion_pytorch_model.safetensors", "settings.yaml", "search_1.json"]
)
def test_an_altered_file_is_refused_before_anything_is_written(released, name):
    settings, _ = released
    path = settings.report_folder / "release" / name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(BadInput, match="is not the file that was released"):
        released_sets.make_released_set(settings)
    assert not (settings.run_folder.parent / f"{settings.experiment}-from-reference").exists()


def test_another_base_model_is_refused(released, v_base_folder):
    settings, _ = released
    with pytest.raises(BadInput, match="was made with another base model"):
        released_sets.make_released_set(dataclasses.replace(settings, base_model=str(v_base_folder)))


def test_another_release_does_not_replace_the_checkpoints_of_the_first(released):
    settings, _ = released
    released_sets.make_released_set(settings)
    path = settings.run_folder.parent / f"{settings.experiment}-from-reference" / "unet" / "epoch_02" / "config.json"
    path.write_text("{}")
    with pytest.raises(BadInput, match="is of another release: move"):
        released_sets.make_released_set(settings)
    assert path.read_text() == "{}"


def test_code_that_makes_other_sets_is_refused_before_it_makes_them(released, monkeypatch):
    settings, _ = released
    monkeypatch.setattr("sdlab.evaluation.pool_seed", lambda run: 1)
    with pytest.raises(BadInput, match="take the commit that it came with"):
        released_sets.make_released_set(settings)


def test_on_the_command_line(released, tmp_path):
    settings, pool = released
    words = ["-p", "runs_root", settings.runs_root, "-p", "base_model", settings.base_model]
    file = tmp_path / f"{settings.experiment}.yaml"
    file.write_text(yaml.safe_dump(dict(experiment=settings.experiment, dataset="digits", base_image_size=16)))
    result = CliRunner().invoke(cli, ["run", str(file), *words, "--from-reference"])
    assert result.exit_code == 0 and "files have the released bytes" in result.output, result.output
    result = CliRunner().invoke(
        cli, ["export", str(file), *words, "--from-reference", "--images", "5", str(tmp_path / "out")]
    )
    assert result.exit_code == 0 and len(list((tmp_path / "out").rglob("*.png"))) == 5, result.output
    assert json.loads((tmp_path / "out" / "set.json").read_text())["images"] == 5
    result = CliRunner().invoke(cli, ["run", str(file), *words, "-p", "experiment", "other", "--from-reference"])
    assert (
        result.exit_code == 1
        and f"There is no release of other in reports/reference/ (there is: {settings.experiment})" in result.output
    )
    shutil.rmtree(pool.folder)


def test_more_images_than_the_release_has_are_refused(released):
    settings, _ = released
    with pytest.raises(BadInput, match=r"`--images` is 97: .* made 96"):
        released_sets.make_released_set(settings, 97)


def test_the_committed_release_of_digits(tmp_path):
    """Code, base model and labels are still the ones that made it; its images show the digits that their labels name."""
    settings = Settings.from_file(PARAMS / "digits.yaml", runs_root=str(tmp_path))
    folder, about, comparison = released_sets.make_released_set(settings, images=200)
    assert about["images"] == 200 and "files have the released bytes" in comparison
    ((images, labels),) = read_shards(folder, 200)
    real = load_dataset(settings)
    model = LogisticRegression(max_iter=1000).fit(flat(real.train.images), real.train.labels)
    assert model.score(flat(images), labels) > 0.8 and model.score(flat(real.val.images), real.val.labels) > 0.9


def flat(images):
    """Rows of grey values in [0, 1]."""
    return images.mean(1).reshape(len(images), -1) / 255
