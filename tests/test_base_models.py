"""Base models: read from their own configs, refused in words when something is missing."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from sdlab.base_models import load_base_model
from sdlab.data import model_files
from sdlab.data.model_files import TINY
from sdlab.devices import choose_device, choose_precision
from sdlab.errors import BadInput
from sdlab.runs.experiment import Experiment
from sdlab.runs.files import sha256_of_file
from sdlab.schedulers import check_scheduler_name, make_scheduler
from sdlab.training import train_class_encoder


def test_what_a_base_model_is_comes_from_its_configs(settings, v_base_folder):
    base = load_base_model(settings)
    assert (base.tokens, base.width, base.vae_scale, base.prediction_type) == (5, 12, 4, "epsilon")
    assert (
        load_base_model(dataclasses.replace(settings, base_model=str(v_base_folder))).prediction_type == "v_prediction"
    )


def test_it_is_frozen_and_float32(base):
    parameters = [*base.unet.parameters(), *base.vae.parameters()]
    assert not any(p.requires_grad for p in parameters) and {p.dtype for p in parameters} == {torch.float32}
    assert not base.unet.training and not base.vae.training


def test_the_hashes_are_those_of_the_files(settings, base, base_folder):
    assert base.sha256["unet/diffusion_pytorch_model.safetensors"] == sha256_of_file(
        base_folder / "unet/diffusion_pytorch_model.safetensors"
    )
    assert set(base.sha256) == {"unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"}


def test_tiny_is_small_enough_for_git_and_has_a_card(settings):
    """<= 20 MB, each file <= 15 MiB."""
    sizes = [p.stat().st_size for p in TINY.rglob("*") if p.is_file()]
    assert sum(sizes) <= 20e6 and max(sizes) <= 15 * 2**20
    assert "pretrain_tiny.py" in (TINY / "README.md").read_text()
    base = load_base_model(dataclasses.replace(settings, base_model="tiny"))
    assert (base.tokens, base.width, base.vae_scale) == (8, 64, 4) and base.unet.dtype == torch.float32


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("unet/config.json", "no readable unet/config.json"),
        ("vae/config.json", "no readable vae/config.json"),
        ("scheduler/scheduler_config.json", "no readable scheduler/scheduler_config.json"),
        ("text_encoder/config.json", "no readable text_encoder/config.json"),
        ("unet/diffusion_pytorch_model.safetensors", "there is no unet/diffusion_pytorch_model.safetensors"),
    ],
)
def test_an_incomplete_folder_is_refused(settings, base_folder, tmp_path, gone, said):
    folder = tmp_path / "incomplete"
    shutil.copytree(base_folder, folder)
    (folder / gone).unlink()
    with pytest.raises(BadInput, match=said):
        load_base_model(dataclasses.replace(settings, base_model=str(folder)))


def saved_as(base_folder, folder, form):
    """The same UNet in another of diffusers' forms."""
    shutil.copytree(base_folder, folder)
    unet = UNet2DConditionModel.from_pretrained(base_folder / "unet")
    for path in (folder / "unet").glob("*.safetensors"):
        path.unlink()
    form = dict(form)
    (unet.half() if form.pop("half", False) else unet).save_pretrained(folder / "unet", **form)
    return folder


@pytest.mark.parametrize(
    "form", [dict(max_shard_size="100KB"), dict(variant="fp16", half=True), dict(variant="fp16", half=True, max_shard_size="50KB")]
)  # fmt: skip
def test_sharded_and_fp16_weights_are_loaded_and_hashed(settings, base, base_folder, tmp_path, form):
    folder = saved_as(base_folder, tmp_path / "other", form)
    other = load_base_model(dataclasses.replace(settings, base_model=str(folder)))
    half = "half" in form
    for name, value in base.unet.state_dict().items():
        assert torch.equal(other.unet.state_dict()[name], value.half().float() if half else value)
    unet_files = {name for name in other.sha256 if name.startswith("unet/")}
    assert unet_files == {f"unet/{p.name}" for p in (folder / "unet").glob("*.safetensors")}
    assert (len(unet_files) > 1) == ("max_shard_size" in form)
    assert half == any("fp16" in name for name in unet_files)


def test_full_precision_is_taken_before_fp16(settings, base, base_folder, tmp_path):
    folder = saved_as(base_folder, tmp_path / "both", dict(variant="fp16", half=True))
    shutil.copy(base_folder / "unet/diffusion_pytorch_model.safetensors", folder / "unet")
    assert load_base_model(dataclasses.replace(settings, base_model=str(folder))).sha256 == base.sha256


def test_a_missing_shard_is_named(settings, base_folder, tmp_path):
    folder = saved_as(base_folder, tmp_path / "other", dict(max_shard_size="100KB"))
    shard = sorted((folder / "unet").glob("*-of-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(BadInput, match=f"{shard.name} is missing, which unet/.*index.json names"):
        load_base_model(dataclasses.replace(settings, base_model=str(folder)))


def test_an_index_that_points_elsewhere_is_refused(settings, base_folder, tmp_path):
    folder = saved_as(base_folder, tmp_path / "other", dict(max_shard_size="100KB"))
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../secret.safetensors"}}))
    with pytest.raises(BadInput, match=r"names '../../secret.safetensors': shards have to be in the same folder"):
        load_base_model(dataclasses.replace(settings, base_model=str(folder)))


def test_pickled_weights_are_refused_by_name(settings, base_folder, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(base_folder, folder)
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(BadInput, match=r"pickled weights \(unet/diffusion_pytorch_model.bin\) are not read"):
        load_base_model(dataclasses.replace(settings, base_model=str(folder)))


@pytest.mark.parametrize(("part", "tensor"), [("unet", "conv_in.weight"), ("vae", "encoder.conv_in.weight")])
def test_weights_that_lack_a_tensor_are_refused(settings, base_folder, tmp_path, part, tensor):
    """diffusers would make it up and warn."""
    folder = tmp_path / "lacking"
    shutil.copytree(base_folder, folder)
    path = folder / part / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != tensor}, path)
    base = load_base_model(dataclasses.replace(settings, base_model=str(folder)))
    with pytest.raises(BadInput, match=f"1 missing keys, such as {tensor}: config and weights belong to different"):
        getattr(base, part)


def test_latents_are_scaled_as_the_vae_says(settings, base_folder, tmp_path):
    """Read from the config alone, with diffusers' own default where it is silent."""
    folder = tmp_path / "other"
    shutil.copytree(base_folder, folder)
    config = json.loads((folder / "vae/config.json").read_text())
    for factor in (0.5, None):
        kept = {k: v for k, v in config.items() if k != "scaling_factor"} | (
            {"scaling_factor": factor} if factor else {}
        )
        (folder / "vae/config.json").write_text(json.dumps(kept))
        base = load_base_model(dataclasses.replace(settings, base_model=str(folder)))
        assert base.scaling_factor == base.vae.config.scaling_factor == (factor or 0.18215)


def test_results_are_read_without_importing_diffusers():
    """The slowest import of all: whoever opens a finished notebook waits for it only where images are drawn."""
    heavy = "diffusers", "torch._dynamo", "transformers", "torchvision", "medmnist", "sklearn", "scipy"
    code = (
        "import sys, sdlab.report.figures, sdlab.tools.planning, sdlab.report.tables, sdlab.search, sdlab.training;"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("unet/config.json", dict(in_channels=9), "UNet takes 9 channels"),
        ("unet/config.json", dict(addition_embed_type="text_time"), "needs more than a class"),
        ("unet/config.json", dict(cross_attention_dim=[12, 24]), "one whole number is needed"),
        ("unet/config.json", dict(_class_name="UNet3DConditionModel"), "has a UNet3DConditionModel where"),
        ("vae/config.json", dict(shift_factor=0.1), "shifts latents"),
        ("scheduler/scheduler_config.json", dict(prediction_type="sample"), "predicts sample"),
        ("text_encoder/config.json", dict(max_position_embeddings=None), "the number of tokens"),
    ],
)
def test_a_model_that_classes_cannot_condition_is_refused(settings, base_folder, tmp_path, file, change, said):
    folder = tmp_path / "other"
    shutil.copytree(base_folder, folder)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    with pytest.raises(BadInput, match=said):
        load_base_model(dataclasses.replace(settings, base_model=str(folder)))


def test_the_unet_is_loaded_when_it_is_asked_for(settings):
    """A step that has a UNet of its own never pays for the base model's."""
    base = load_base_model(settings)
    assert "unet" not in base.__dict__
    assert base.width == base.unet.config.cross_attention_dim and base.unet is base.unet


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_precision_follows_the_gpu(monkeypatch, capability, dtype):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert choose_precision("auto", torch.device("cuda")) == dtype
    assert choose_precision("float32", torch.device("cuda")) == torch.float32


def test_precision_on_a_cpu_is_float32_unless_told(settings):
    assert choose_precision("auto", torch.device("cpu")) == torch.float32
    base = load_base_model(dataclasses.replace(settings, precision="bfloat16"))
    assert base.unet.dtype == torch.bfloat16 and base.vae.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------- the hub


class Hub:
    """huggingface_hub as far as it is used, over a folder: what is fetched lands in a cache, and is counted."""

    def __init__(self, files, cache):
        self.files, self.cache, self.fetched = files, cache, []

    def snapshot_download(self, name, revision, local_files_only=False, allow_patterns=()):
        if local_files_only:
            if not self.cache.exists():
                raise LocalEntryNotFoundError("not here")
            return str(self.cache)
        for pattern in allow_patterns:
            self.fetched.append(pattern)
            (self.cache / pattern).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.files / pattern, self.cache / pattern)
        return str(self.cache)

    def list_repo_files(self, name, revision):
        self.asked = (name, revision)
        return [p.relative_to(self.files).as_posix() for p in self.files.rglob("*") if p.is_file()]


@pytest.mark.parametrize("form", [dict(), dict(variant="fp16", half=True), dict(max_shard_size="100KB")])
def test_of_a_hub_repository_only_what_is_needed_is_fetched_at_the_pinned_revision(
    settings, base_folder, tmp_path, monkeypatch, form
):
    files = saved_as(base_folder, tmp_path / "repository", form)
    for extra in (
        "text_encoder/model.safetensors",
        "safety_checker/model.safetensors",
        "v1.ckpt",
        "unet/diffusion_pytorch_model.bin",
    ):
        (files / extra).parent.mkdir(exist_ok=True)
        (files / extra).write_bytes(b"gigabytes")
    hub = Hub(files, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    sd14 = dataclasses.replace(settings, base_model="CompVis/stable-diffusion-v1-4")
    base = load_base_model(sd14)
    assert hub.asked == ("CompVis/stable-diffusion-v1-4", "133a221b8aa7292a167afc5127cb63fb5005638b")
    assert base.source.endswith("@133a221b8aa7292a167afc5127cb63fb5005638b")
    assert {f.split("/")[0] for f in hub.fetched} == {"unet", "vae", "scheduler", "text_encoder"}
    assert not [f for f in hub.fetched if f.startswith("text_encoder") and not f.endswith("config.json")]
    assert not [f for f in hub.fetched if f.endswith((".bin", ".ckpt"))]
    fetched = len(hub.fetched)
    load_base_model(sd14)
    assert len(hub.fetched) == fetched  # what is in the cache is not asked for again
    next(iter((tmp_path / "cache/unet").glob("*.safetensors"))).unlink()
    assert load_base_model(sd14).sha256 == base.sha256  # a cache that was cut is completed


def test_half_weights_that_another_program_left_are_not_taken_silently(tmp_path, monkeypatch, capsys):
    """Offline: the hub may have full ones, which nobody can ask it for."""

    def offline(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(model_files, "cached_snapshot", lambda name, revision, full=False: None if full else tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", offline)
    assert model_files.fetch_from_hub("a/b", 40 * "1") == tmp_path
    assert "(OSError): the half-precision weights of a/b in its cache are used" in capsys.readouterr().err


@pytest.mark.parametrize("revision", ["main", "fp16", "133a221"])
def test_a_revision_that_can_move_is_refused(settings, revision):
    with pytest.raises(BadInput, match=f"`base_model_revision` is '{revision}'"):
        load_base_model(dataclasses.replace(settings, base_model="a/b", base_model_revision=revision))


def test_a_truncated_file_is_refused(settings, base_folder, tmp_path):
    folder = tmp_path / "truncated"
    shutil.copytree(base_folder, folder)
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(BadInput, match="cannot be loaded from"):
        load_base_model(dataclasses.replace(settings, base_model=str(folder)))


@pytest.mark.parametrize(
    ("name", "said"),
    [("tiney", "has to be `tiny`"), ("nobody/nothing", "could not be fetched"), ("../nowhere", "has to be `tiny`")],
)
def test_an_unknown_base_model_is_refused(settings, name, said):
    with pytest.raises(BadInput, match=said):
        load_base_model(dataclasses.replace(settings, base_model=name, base_model_revision="0" * 40))


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "cpu:1"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(BadInput, match="which this machine does not have"):
        choose_device(name)


@pytest.mark.parametrize(
    "name", ["FlowMatchEulerDiscreteScheduler", "VQDiffusionScheduler", "DDIMInverseScheduler", "DDIM", "Unheard"]
)
def test_a_scheduler_that_cannot_sample_is_refused_before_the_first_training(settings, base, name):
    """An unknown name already where the base model's configs are read."""
    run = Experiment(dataclasses.replace(settings, scheduler=name), None, base)
    with pytest.raises(BadInput, match=f"`scheduler` is '{name}'"):
        train_class_encoder(run, None)
    if not name.endswith("Scheduler"):
        with pytest.raises(BadInput, match=f"`scheduler` is '{name}'"):
            load_base_model(run.settings)


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("PNDMScheduler", dict(search_min_inference_steps=1), "with 1 inference steps"),
        ("LCMScheduler", dict(search_max_inference_steps=60), "with 51 inference steps"),
    ],
)
def test_a_scheduler_that_cannot_make_the_steps_searched_is_refused_by_stage_00(settings, base, name, more, said):
    """Not in the middle of a search, after hours."""
    wanted = dataclasses.replace(settings, scheduler=name, default_num_inference_steps=20, **more)
    with pytest.raises(BadInput, match=f"`scheduler` is '{name}'.*{said}"):
        base.load_and_check(wanted)
    base.load_and_check(dataclasses.replace(settings, scheduler=name, search_min_inference_steps=4, search_max_inference_steps=8,
                                            default_num_inference_steps=20))  # fmt: skip


def test_whatever_diffusers_lists_samples_or_is_refused(base):
    """Some are hidden, some are for other models, some need packages that are not here: one sentence each."""
    package = Path(diffusers.__file__).parent
    listed = re.findall(r'"(\w+Scheduler)"', (package / "schedulers" / "__init__.py").read_text())
    made = 0
    for name in set(listed):
        try:
            make_scheduler(name, base.scheduler_config)
            made += 1
        except BadInput as refusal:
            assert f"`scheduler` is '{name}'" in str(refusal) and "\n" not in str(refusal)
    assert made > 10


def test_every_scheduler_that_diffusers_lists_is_known_by_name():
    kinds = {name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")}
    for name in kinds:
        if isinstance(getattr(diffusers, name), type) and issubclass(
            getattr(diffusers, name), diffusers.SchedulerMixin
        ):
            check_scheduler_name(name)


@pytest.mark.parametrize("size", [12, 20, 9])
def test_a_size_that_the_base_model_cannot_halve_is_refused(settings, size):
    with pytest.raises(BadInput, match=f"`base_image_size` is {size}.*multiple of 8"):
        load_base_model(dataclasses.replace(settings, base_image_size=size))


def test_the_fingerprint_follows_the_weights(settings, base, v_base_folder):
    assert base.fingerprint() == load_base_model(settings).fingerprint()
    assert (
        base.fingerprint()
        != load_base_model(dataclasses.replace(settings, base_model=str(v_base_folder))).fingerprint()
    )


def test_a_hub_caches_folder_is_its_only_snapshot(settings, base_folder, tmp_path):
    """`models--owner--name` of a cache has the model below `snapshots/<commit>`."""
    cache = tmp_path / "models--owner--name"
    (cache / "refs").mkdir(parents=True)
    shutil.copytree(base_folder, cache / "snapshots" / "0123abc")
    wanted = dataclasses.replace(settings, base_model=str(cache))
    assert load_base_model(wanted).fingerprint() == load_base_model(settings).fingerprint()
    shutil.copytree(base_folder, cache / "snapshots" / "4567def")
    with pytest.raises(BadInput, match="2 snapshots: give one of its folders snapshots/0123abc, snapshots/4567def"):
        load_base_model(wanted)
