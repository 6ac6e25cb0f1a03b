"""Settings: the paper's defaults, and one clear sentence for whatever is wrong."""

import dataclasses

import pytest

from sdlab.errors import BadInput
from sdlab.paths import PARAMS
from sdlab.runs.parameters import assigned_names, read_parameters
from sdlab.settings import Settings

GIVEN = {"experiment": "x", "dataset": "digits"}


def test_defaults_are_the_papers():
    """Section 3 of the paper, number by number; the protocol and how a search prunes are the deliberate deviations."""
    s = Settings.from_mapping(GIVEN)
    assert (s.class_encoder_epochs, s.class_encoder_batch_size, s.class_encoder_learning_rate) == (50, 64, 1e-4)
    assert (s.unet_epochs, s.unet_batch_size, s.unet_learning_rate) == (10, 16, 1e-5)
    assert (s.weight_decay, s.max_grad_norm) == (4e-3, 10.0)
    assert (s.default_num_inference_steps, s.default_guidance_scale) == (50, 7.5)
    assert (
        s.search_1_trials,
        s.search_images,
        s.search_min_inference_steps,
        s.search_max_inference_steps,
        s.search_max_guidance_scale,
    ) == (
        50,
        4000,
        5,
        50,
        7.5,
    )
    assert (s.classifier_epochs, s.classifier_learning_rate, s.classifier_label_smoothing) == (100, 1e-3, 0.1)
    assert (s.classifier_batch_size, s.classifier_patience, s.classifier_stop_patience) == (256, 10, 25)
    assert (s.search_patience, s.search_stop_patience, s.classifier_filters) == (25, 50, 64)
    assert (s.base_image_size, s.scaling_max, s.scheduler, s.protocol) == (128, 10, "DDIMScheduler", "sealed")
    assert s.deviations() == {
        "protocol": ("sealed", "paper"),
        "search_pruner": ("successive_halving", "hyperband"),
        "search_reduction_factor": (8, 2),
        "search_finalists": (3, 1),
    }


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"serch_1_trials": 3}, "Did you mean `search_1_trials`"),
        ({"zzz": 3}, "not a setting"),
        ({"unet_learning_rate": "1e-4"}, "YAML reads an exponent only after a point"),
        ({"unet_epochs": 2.5}, "whole number"),
        ({"unet_epochs": True}, "whole number"),
        ({"compile_unet": 1}, "true or false"),
        ({"compile_unet": "yes"}, "true or false"),
        ({"guidance_start": 0.8, "guidance_stop": 0.2}, "guidance acts between them"),
        ({"search_min" + "_steps": 3}, "it is called `search_min_inference_steps` now"),
        ({"guidance_stop": 1.2}, "0.0 to 1.0"),
        ({"weight_decay": float("nan")}, "finite"),
        ({"weight_decay": None}, "a number"),
        ({"default_guidance_scale": -0.1}, "allowed is 0.0 to"),
        ({"default_num_inference_steps": 0}, "allowed is 1 to 999"),
        ({"search_min_inference_steps": 0}, "allowed is 1 to 999"),
        ({"search_min_inference_steps": 60}, "more than `search_max_inference_steps`"),
        ({"search_1_max_epoch": 51}, "epochs 1 to 50"),
        ({"search_2_min_epoch": 11}, "epochs 1 to 10"),
        ({"unet_kept_epochs": 4}, "epochs 7 to 10 (`unet_epochs`, of which the last 4 are kept"),
        ({"search_first_images": 5000}, "more than `search_images`"),
        ({"protocol": "seald"}, "Did you mean `sealed`"),
        ({"search_pruner": "median"}, "allowed are"),
        ({"experiment": "../x"}, "names a folder"),
        ({"experiment": "a:b"}, "names a folder"),
        ({"search_first_images": 300}, "no multiple of `shard_size`"),
        ({"classifier_train_steps": 50}, "fewer than the 100 validations"),
        ({"seed": -1}, "allowed is 0 to"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(wrong, said):
    with pytest.raises(BadInput) as refused:
        Settings.from_mapping(GIVEN | wrong)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("missing", ["experiment", "dataset"])
def test_an_experiment_and_a_dataset_have_to_be_named(missing):
    with pytest.raises(BadInput, match=f"name no `{missing}`"):
        Settings.from_mapping({k: v for k, v in GIVEN.items() if k != missing})


@pytest.mark.parametrize(
    ("text", "said"), [("a: [1", "not valid YAML"), ("- a", "holds no settings"), ("", "holds no settings")]
)
def test_a_file_that_is_not_a_parameter_file(tmp_path, text, said):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(BadInput, match=said):
        read_parameters(tmp_path / "x.yaml")


def test_a_copied_file_has_to_change_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("sdlab.settings.PARAMS", tmp_path)
    (tmp_path / "mine.yaml").write_text("experiment: digits\ndataset: digits\n")
    with pytest.raises(BadInput, match="change the line to `experiment: mine`"):
        Settings.from_file(tmp_path / "mine.yaml")
    with pytest.raises(BadInput, match="change the line to `experiment: mine`"):
        Settings.from_notebook({"In": ["", 'experiment = "mine"'], "experiment": "mine"})


def test_whole_numbers_are_fine_where_numbers_are_asked():
    assert Settings.from_mapping(GIVEN | {"search_max_guidance_scale": 7}).search_max_guidance_scale == 7.0


def test_a_notebooks_parameters_are_laid_on_top_of_its_file():
    s = Settings.from_notebook(
        {
            "In": ["", 'experiment = "digits"\nclass_encoder_epochs = 3'],
            "experiment": "digits",
            "class_encoder_epochs": 3,
        }
    )
    assert s.class_encoder_epochs == 3 and s.base_model == "tiny"


def test_the_settings_cell_can_be_run_again():
    """By then the notebook holds many other names; only cells that do nothing but assign plain values are parameters."""
    cells = ["", 'experiment = "digits"', "import pandas as pd\nimages = 3", "history = train(run)", "x = 1\ny = 2"]
    namespace = {"In": cells, "experiment": "digits", "images": 3, "history": [], "x": 1, "y": 2}
    assert Settings.from_notebook(namespace).experiment == "digits"


def test_a_deleted_line_is_no_longer_in_force():
    cells = ["", 'experiment = "digits"\nunet_epochs = 3', "settings = f()", 'experiment = "digits"']
    settings = Settings.from_notebook({"In": cells, "experiment": "digits", "unet_epochs": 3})
    assert settings == Settings.from_file(PARAMS / "digits.yaml")


def test_injected_parameters_have_to_name_their_experiment():
    cells = ["", 'experiment = "digits"', "# Parameters\nunet_epochs = 3\n"]
    with pytest.raises(BadInput, match="injected parameters name no `experiment`"):
        Settings.from_notebook({"In": cells, "experiment": "digits", "unet_epochs": 3})


def test_a_misspelt_injected_parameter_is_refused():
    """papermill itself only warns."""
    cells = ["", 'experiment = "digits"', '# Parameters\nexperiment = "digits"\nunet_epoch = 3\n']
    with pytest.raises(BadInput, match="Did you mean `unet_epochs`"):
        Settings.from_notebook({"In": cells, "experiment": "digits", "unet_epoch": 3})


def test_an_unknown_experiment_is_refused_with_the_known_ones():
    with pytest.raises(BadInput, match="Did you mean `digits`"):
        Settings.from_notebook({"In": ["", 'experiment = "digit"'], "experiment": "digit"})


def test_assigned_names_takes_plain_values_only():
    assert assigned_names('a = 1  # one\nb: float = -2.5\nc = "x"') == ["a", "b", "c"]
    assert assigned_names("a = f(1)") == assigned_names("a = 1\nprint(a)") == assigned_names("%matplotlib inline") == []


def test_every_setting_says_what_it_is_and_which_stages_depend_on_it():
    free = {
        "experiment",
        "runs_root",
        "reports_root",
        "storage",
        "device",
        "num_threads",
        "resume_minutes",
        "training_processes",
        "micro_batch_size",
        "compile_unet",
        "data_root",
        "cluster",
        "workers",
        "cluster_threads",
        "cluster_cache_gb",
        "cluster_any_worker",
        "privacy_limit",
    }
    for f in dataclasses.fields(Settings):
        assert f.metadata["text"]
        assert bool(f.metadata["stages"]) != (f.name in free), f.name


@pytest.mark.parametrize(
    ("first", "images", "factor", "rungs"),
    [
        (500, 4000, 2, [500, 1000, 2000, 4000]),
        (125, 500, 4, [125, 500]),
        (30, 100, 3, [30, 100]),
        (100, 100, 2, [100]),
        (500, 4000, 8, [500, 4000]),
        (500, 2000, 8, [500, 2000]),
    ],
)
def test_rungs_end_at_the_whole_trial(first, images, factor, rungs):
    given = dict(search_first_images=first, search_images=images, search_reduction_factor=factor, shard_size=5)
    assert Settings.from_mapping(GIVEN | given).rungs() == rungs


def test_a_notebook_shows_its_settings_beside_the_papers_values_with_their_whole_meanings():
    settings = Settings.from_mapping(dict(experiment="x", dataset="digits", unet_epochs=3))
    shown = settings.show("03")
    assert list(shown.index) == list(settings.of_stage("03"))
    assert (
        shown.loc["unet_epochs"].tolist() == [3, 10, "epochs of stage 3"] and shown.loc["weight_decay", "paper"] == ""
    )
    assert "float32 on a CPU, bfloat16 or float16 on a GPU</td>" in shown.to_html()
