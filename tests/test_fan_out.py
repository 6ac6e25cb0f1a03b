"""The plan on n devices: one device is the plan itself, several are bounded by the window, the tasks and the driver."""

import dataclasses

import pytest
from click.testing import CliRunner
from test_planning import FACTS, blank_costs

from sdlab.runs.files import existing_parent
from sdlab.tools import planning
from sdlab.tools.cli import cli
from sdlab.tools.fan_out import Durations, Window, fan_out_table, hours_on, makespan, measure_driver, search_seconds
from sdlab.tools.planning import workload

PRICES = {"passes": 0.01, "images": 0.02, "encoded": 0.1, "class_encoder steps": 1.0, "unet steps": 3.0, "trial images": 0.001,
          "trial validations": 0.001, "cell images": 0.002, "cell validations": 0.001}  # fmt: skip


@pytest.fixture
def durations(settings):
    """50 trials of 4 shards without pruning, each shard and each classifier of a few seconds."""
    settings = dataclasses.replace(
        settings, search_pruner="none", search_images=80, search_first_images=80, shard_size=20, search_1_trials=50,
        search_2_trials=50, search_parallel=1,
    )  # fmt: skip
    return Durations(settings, FACTS, blank_costs(seconds=PRICES), driver=0.0)


def with_k(durations: Durations, k: int, **changes) -> Durations:
    return dataclasses.replace(
        durations, settings=dataclasses.replace(durations.settings, search_parallel=k), **changes
    )


def test_one_device_takes_what_the_plan_says(durations):
    work = workload(durations.settings, FACTS)
    for number, hours in hours_on(1, durations).items():
        assert hours == pytest.approx(planning.seconds(work[number], durations.costs) / 3600, rel=0.1), number


def test_more_devices_shorten_what_divides_and_nothing_else(durations):
    one, many = hours_on(1, with_k(durations, 8)), hours_on(8, with_k(durations, 8))
    assert all(many[number] < one[number] for number in one)
    training = PRICES["unet steps"] * durations.settings.unet_epochs / 3600  # a step an epoch
    assert many["03"] > training
    assert hours_on(10_000, with_k(durations, 8))["03"] >= training


def test_the_window_is_the_rule_of_the_search(durations):
    """With one trial at a time, and without pruning: shards divide, then classifiers; by hand."""
    shard, classifier = durations.shard(3), durations.classifier("trial", 80)
    seeds = durations.settings.search_classifier_seeds
    alone = 5 * (4 * shard + seeds * classifier)
    assert Window(1, durations, [shard] * 5, [1] * 5).run() == pytest.approx(alone)
    assert Window(4, durations, [shard] * 5, [1] * 5).run() == pytest.approx(
        5 * (shard + makespan([classifier] * seeds, 4))
    )
    five = with_k(durations, 5)
    assert Window(1, five, [shard] * 5, [1] * 5).run() == pytest.approx(alone)
    assert alone / 4 <= Window(4, five, [shard] * 5, [1] * 5).run() < 1.2 * alone / 4


def test_a_larger_window_keeps_more_devices_busy(durations):
    one = search_seconds(1, durations, "search_1", 50)
    busy = {k: one / 8 / search_seconds(8, with_k(durations, k), "search_1", 50) for k in (1, 2, 4, 8)}
    assert busy[1] < busy[2] < busy[4] < busy[8] <= 1.001 and busy[8] > 0.85 and busy[1] < 0.6


def test_a_slow_driver_is_the_limit(durations):
    slow = dataclasses.replace(durations, driver=durations.shard(3))
    assert slow.synthetic_set(2000, 3, 100) == pytest.approx(100 * slow.driver)
    assert durations.synthetic_set(2000, 3, 100) == pytest.approx(durations.shard(3))
    table = fan_out_table(slow, [1, 8]).set_index("devices")
    assert table.loc[8, "driver busy"] == "100%" and table.loc[1, "efficiency"] == "100%"


def test_the_driver_is_measured_on_the_disk_of_the_run_and_leaves_nothing(settings):
    folder = existing_parent(settings.run_folder)
    before = sorted(folder.iterdir())
    assert 0 < measure_driver(settings, FACTS) < 5
    assert sorted(folder.iterdir()) == before


def test_the_command_prints_a_row_for_each_number_of_devices(settings, tmp_path):
    file = tmp_path / "smoke.yaml"
    given = {
        name: value for name, value in settings.as_dict().items() if name in ("experiment", "dataset", "base_model")
    }
    file.write_text("\n".join(f"{name}: {value}" for name, value in given.items()))
    arguments = ["plan", str(file), "-p", "runs_root", str(tmp_path), "--workers", "8", "--workers", "512"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    rows = [line.split()[0] for line in result.output.split("driver busy")[1].splitlines()[2:5]]
    assert rows == ["1", "8", "512"] and "the driver is the limit of 05" in result.output
    refused = CliRunner().invoke(cli, [*arguments[:-1], "0"])
    assert refused.exit_code and "0 is not in the range x>=1" in refused.output
