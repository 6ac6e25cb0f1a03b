"""fANOVA: equal to Optuna's on main effects, and right about functions whose answer is known."""

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.importance import FanovaImportanceEvaluator

from sdlab.importance import PARAMETERS, describe_importance, fanova, main_effects
from sdlab.report.remarks import importance_sentence

RANGES = {"num_inference_steps": [5, 50], "guidance_scale": [0.0, 7.5], "epoch": [1, 50]}


def exported(function, n=60, ranges=RANGES, seed=0):
    """A search of n random trials with `function(steps, guidance, epoch)` as CAS; every third was pruned."""
    rng, trials = np.random.default_rng(seed), []
    for number in range(n):
        params = dict(
            num_inference_steps=int(
                rng.integers(ranges["num_inference_steps"][0], ranges["num_inference_steps"][1] + 1)
            ),
            guidance_scale=float(rng.uniform(*ranges["guidance_scale"])),
            epoch=int(rng.integers(ranges["epoch"][0], ranges["epoch"][1] + 1)),
        )
        trials.append(
            dict(
                number=number,
                state="complete" if number % 3 else "pruned",
                params=params,
                intermediate={"100": function(**params)},
            )
        )
    return dict(ranges=ranges, rungs=[100, 400], trials=trials)


def mixed(num_inference_steps, guidance_scale, epoch):
    return -((guidance_scale - 2) ** 2) + 0.2 * epoch + 0.01 * num_inference_steps


def test_main_effects_agree_with_optunas():
    search = exported(mixed)
    distributions = {
        "num_inference_steps": IntDistribution(5, 50), "guidance_scale": FloatDistribution(0, 7.5), "epoch": IntDistribution(1, 50)
    }  # fmt: skip
    study = optuna.create_study(direction="maximize")
    for trial in search["trials"]:
        study.add_trial(
            optuna.trial.create_trial(
                params=trial["params"], distributions=distributions, value=trial["intermediate"]["100"]
            )
        )
    theirs = [FanovaImportanceEvaluator(seed=s).evaluate(study) for s in range(4)]
    ours = fanova(search, forests=4)
    for name in PARAMETERS:
        assert ours[name].mean() == pytest.approx(np.mean([t[name] for t in theirs]), abs=0.03)


def test_pruned_trials_count_too():
    search = exported(mixed)
    fewer = search | {"trials": [t for t in search["trials"] if t["state"] == "complete"]}
    assert not fanova(search, 2).equals(fanova(fewer, 2))


def test_an_additive_function_has_no_interactions():
    shares = fanova(
        exported(lambda num_inference_steps, guidance_scale, epoch: guidance_scale + 0.1 * epoch, n=200), 2
    ).mean()
    assert shares[list(PARAMETERS)].sum() > 0.9
    assert shares["guidance_scale"] == pytest.approx(7.5**2 / (7.5**2 + 4.9**2), abs=0.08)


def test_a_product_is_an_interaction():
    shares = fanova(
        exported(lambda num_inference_steps, guidance_scale, epoch: (guidance_scale - 3.75) * (epoch - 25.5), n=300), 2
    ).mean()
    assert shares["guidance_scale x epoch"] > 0.5
    assert shares["guidance_scale x num_inference_steps"] < 0.1


def test_a_single_valued_parameter_explains_nothing():
    ranges = RANGES | {"num_inference_steps": [5, 5]}
    shares = fanova(exported(mixed, ranges=ranges), 2).mean()
    assert shares["num_inference_steps"] == pytest.approx(0) and shares[list(PARAMETERS)].sum() > 0.5


def test_a_constant_cas_has_no_importances():
    assert not fanova(exported(lambda **_: 0.5), 2).to_numpy().any()


def test_main_effects_sum_to_one():
    assert main_effects(fanova(exported(mixed), 3)).sum(axis=1).to_numpy() == pytest.approx(1)


def test_the_verdict_is_what_the_trials_say():
    by_guidance = describe_importance(exported(lambda num_inference_steps, guidance_scale, epoch: guidance_scale), 3)
    assert by_guidance["first"] == "guidance_scale" and by_guidance["forests_that_agree"] == 3
    assert "is confirmed (UGS 1.00" in importance_sentence("search 1", by_guidance)
    by_epoch = describe_importance(exported(lambda num_inference_steps, guidance_scale, epoch: epoch), 3)
    assert "is refuted" in importance_sentence("search 1", by_epoch) and by_epoch["shares"]["epoch"]["mean"] > 0.9
    nothing = describe_importance(exported(lambda **_: 0.1), 3)
    assert nothing["first"] is None and "is undetermined" in importance_sentence("search 1", nothing)
