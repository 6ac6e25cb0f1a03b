"""The audit: exposure with known answers, attacks that find what they should and nothing else, refusals, the stage itself."""

import contextlib
import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BIN, command
from diffusers import DDIMScheduler
from scipy import stats
from sklearn.metrics import roc_auc_score

from sdlab.base_models import load_base_model
from sdlab.data.datasets import load_dataset
from sdlab.data.images import Split
from sdlab.errors import BadInput
from sdlab.latents import Moments, encode_training_set
from sdlab.report import audit as report
from sdlab.runs import privacy
from sdlab.runs.files import read_json, write_json
from sdlab.runs.records import FileHash, read_record, write_record
from sdlab.runs.run import Run
from sdlab.runs.stages import Reason, StageState, State, stage_state
from sdlab.runs.verify import verify
from sdlab.settings import Settings
from sdlab.verdict import attacks, audit
from sdlab.verdict.copies import flatten
from sdlab.verdict.exposure import epsilon_bound, expose

# ------------------------------------------------------------------------------------------------------- exposure


def coins(count, seed=0):
    return np.random.default_rng(seed).random(count) < 0.5


def test_scores_that_know_nothing_expose_nobody():
    """Of 400 audits of 400 images each: the intervals hold the truth, and epsilon is 0, as often as they promise."""
    found = []
    for seed in range(400):
        members, scores = coins(400, seed), np.random.default_rng([seed, 1]).normal(size=400)
        found.append(expose(scores, members))
    assert np.mean([f.auc_low <= 0.5 <= f.auc_high for f in found]) >= 0.93
    assert np.mean([f.epsilon == 0 for f in found]) >= 0.93
    assert np.mean([f.tpr_low <= 0.01 <= f.tpr_high for f in found]) >= 0.95
    assert np.mean([f.tpr for f in found]) == pytest.approx(0.01, abs=0.002)


@pytest.mark.parametrize("count", [400, 1000, 6000])
def test_what_is_found_lies_in_its_interval_wherever_the_threshold_falls(count):
    """An attack that truly finds 5 % where it accuses 1 %: normal scores, shifted. With many images the interval is of use."""
    shift, found = stats.norm.ppf(0.99) - stats.norm.ppf(0.95), []
    for seed in range(300):
        members, rng = coins(count, [seed, 2]), np.random.default_rng([seed, 3])
        found.append(expose(rng.normal(size=count) + shift * members, members))
    assert np.mean([f.tpr_high < 0.05 for f in found]) <= 0.025
    assert np.mean([f.tpr_low > found_at(max(f.certain, 0.01), shift) for f in found]) <= 0.025
    if count == 6000:
        assert found[0].certain <= 0.01 and 0.01 < np.median([f.tpr_low for f in found]) < 0.05


def found_at(accused, shift):
    return 1 - stats.norm.cdf(stats.norm.ppf(1 - accused) - shift)


def test_scores_that_know_everything():
    members = coins(1000)
    found = expose(members + np.random.default_rng(1).random(1000) / 2, members)
    assert found.auc == found.tpr == 1 and found.auc_low > 0.98 and found.tpr_low > 0.98
    assert (found.guesses, found.right) == (100, 100)
    certain = 0.05 ** (1 / 100)  # the chance of each guess that makes 100 right ones 5 % likely
    assert found.epsilon == pytest.approx(math.log(certain / (1 - certain)), abs=1e-6)


def test_scores_that_are_not_finite_are_refused():
    scores = np.zeros(300)
    scores[7] = np.nan
    with pytest.raises(BadInput, match=r"not finite.*precision"):
        expose(scores, coins(300))


def test_the_area_is_scikit_learns_with_ties_and_its_error_that_of_a_bootstrap():
    members, rng = coins(300), np.random.default_rng(2)
    scores = np.round(rng.normal(size=300) + 0.6 * members, 1)
    found = expose(scores, members)
    assert found.auc == pytest.approx(roc_auc_score(members, scores), abs=1e-12)
    draws = [rng.integers(0, 300, 300) for _ in range(1000)]
    ends = np.quantile([roc_auc_score(members[d], scores[d]) for d in draws], [0.025, 0.975])
    assert [found.auc_low, found.auc_high] == pytest.approx(ends, abs=0.015)


def test_equal_scores_find_nobody_for_certain():
    found = expose(np.zeros(400), coins(400))
    assert (found.auc, found.tpr, found.tpr_low, found.tpr_high) == (0.5, 0.0, 0.0, 1.0)


def test_hits_are_counted_above_the_threshold_and_no_more_is_certain_than_the_others_allow():
    members = np.arange(600) < 300
    scores = np.r_[np.arange(300), np.arange(300)].astype(float)
    scores[:30] = 1000
    found = expose(scores, members)
    assert found.tpr == (30 + 2) / 300  # above the third highest of the 300 others
    # Nobody of 300 is accused for certain of a share of 1 %: 1.2 % at most, with a quarter of the 5 % for it.
    assert found.certain == pytest.approx(1 - 0.0125 ** (1 / 300)) and found.tpr_low == pytest.approx(
        stats.beta.ppf(0.0125, 30, 271)
    )


def test_of_several_attacks_each_has_a_wider_interval():
    members = coins(500)
    scores = np.random.default_rng(3).normal(size=500) + members
    one, seven = expose(scores, members), expose(scores, members, attacks=7)
    assert seven.tpr_low < one.tpr_low and seven.auc_low < one.auc_low and seven.epsilon < one.epsilon
    assert (one.auc, one.tpr) == (seven.auc, seven.tpr) and seven.level == pytest.approx(1 - 0.05 / 7)


def test_epsilons_bound_holds_for_randomised_response():
    """Each coin is told truly with e/(1 + e) of a chance: epsilon is 1 exactly, and no better attack exists."""
    truth, rng = 1 / (1 + math.exp(-1)), np.random.default_rng(4)
    bounds = [epsilon_bound(200, int(rng.binomial(200, truth)), 0.05) for _ in range(1000)]
    assert np.mean(np.array(bounds) <= 1) >= 0.94 and np.median(bounds) > 0.6


# -------------------------------------------------------------------------------------------------------- attacks


def a_source(count, seed, classes=4, size=8):
    """Images of one source: smooth patterns, a class apart from the others."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    small = rng.integers(0, 200, (count, 3, 4, 4)) + 12 * labels[:, None, None, None]
    return Split(small.repeat(size // 4, 2).repeat(size // 4, 3).clip(0, 255).astype(np.uint8), labels)


def noised(split, strength, seed=0):
    noise = np.random.default_rng(seed).normal(0, strength, split.images.shape)
    return Split((split.images + noise).round().clip(0, 255).astype(np.uint8), split.labels)


def rows_of(split, rows):
    return Split(split.images[rows], split.labels[rows])


VIEWS = dict(pixels=flatten, halves=lambda images: flatten(images[:, :, ::2, ::2]))


def scores_of(asked, made, others, views=VIEWS):
    to_made, to_others = (
        {name: attacks.class_distances(asked, among, view) for name, view in views.items()} for among in (made, others)
    )
    return attacks.set_scores(to_made, to_others)


@pytest.mark.parametrize("strength", [0, 15])
def test_copies_and_noised_copies_are_found_by_every_attack(strength):
    asked, others, members = a_source(600, 0), a_source(100, 1), coins(600)
    made = noised(rows_of(asked, members), strength)
    scores = scores_of(asked, made, others)
    assert list(scores) == ["pixels", "pixels, calibrated", "halves", "halves, calibrated", "all, calibrated"]
    for name, values in scores.items():
        found = expose(values, members, len(scores))
        assert found.auc > 0.99 and found.tpr_low > 0.5 and found.epsilon > 1.5, name


def test_a_set_of_images_that_nobody_trained_on_exposes_nobody():
    asked, others, made, members = a_source(600, 0), a_source(100, 1), noised(a_source(600, 2), 15), coins(600)
    scores = scores_of(asked, made, others)
    for name, values in scores.items():
        found = expose(values, members, len(scores))
        assert found.auc_low <= 0.5 <= found.auc_high and found.tpr_low < 0.02, name


def blended(split, share, seed):
    """Images with a share of these, and the rest of others of their source."""
    rest = a_source(len(split), [seed, 9]).images
    return Split((share * split.images + (1 - share) * rest).astype(np.uint8), split.labels)


def test_larger_sets_of_the_same_images_expose_more():
    """Nested: nobody's nearest image moves away."""
    asked, others, members = a_source(400, 0), a_source(100, 1), coins(400)
    pool = [blended(rows_of(asked, members), 0.15, seed) for seed in range(10)]
    ten = Split(np.concatenate([s.images for s in pool]), np.concatenate([s.labels for s in pool]))
    of_one, of_ten = (scores_of(asked, made, others) for made in (pool[0], ten))
    for name in VIEWS:
        assert (of_ten[name] >= of_one[name]).all() and (of_ten[name] > of_one[name]).any()
    for name, values in of_ten.items():
        one, more = expose(of_one[name], members), expose(values, members)
        assert more.auc >= one.auc - (one.auc_high - one.auc_low) / 4, name  # a standard error
    assert 0.5 < expose(of_one["pixels"], members).auc < expose(of_ten["pixels"], members).auc < 1


def test_calibration_takes_away_who_is_typical():
    """The others are grey, as a part of every set is: uncalibrated, they look like the members."""
    rng, members, labels = np.random.default_rng(0), coins(400), np.zeros(400, int)
    grey, more, still_more = (rng.integers(120, 136, (n, 3, 8, 8)).astype(np.uint8) for n in (400, 50, 50))
    loud, other_loud = (rng.integers(0, 256, (n, 3, 8, 8)).astype(np.uint8) for n in (400, 50))
    asked = Split(np.where(members[:, None, None, None], loud, grey), labels)
    copies = noised(rows_of(asked, members), 60).images
    made = Split(np.concatenate([copies, more]), np.zeros(members.sum() + 50, int))
    others = Split(np.concatenate([still_more, other_loud]), np.zeros(100, int))
    scores = scores_of(asked, made, others, dict(pixels=flatten))
    assert expose(scores["pixels"], members).auc < 0.1 and expose(scores["pixels, calibrated"], members).auc > 0.99


def test_a_copy_among_the_others_hides_nobody():
    asked, others, members = a_source(400, 0), a_source(100, 1), coins(400)
    others.images[:20], others.labels[:20] = asked.images[members][:20], asked.labels[members][:20]
    scores = scores_of(asked, rows_of(asked, members), others)
    assert expose(scores["pixels, calibrated"], members).auc == 1


def test_a_class_that_the_set_has_lost_is_compared_with_all():
    asked = a_source(40, 0)
    made = rows_of(noised(asked, 3), asked.labels != 2)
    distances = attacks.class_distances(asked, made, flatten)
    of_all = np.linalg.norm(flatten(asked.images)[:, None] - flatten(made.images)[None], axis=2)
    same = asked.labels[:, None] == made.labels[None]
    expected = np.where(asked.labels == 2, of_all.min(1), np.where(same, of_all, np.inf).min(1))
    assert distances == pytest.approx(expected, rel=1e-4)


class Remembers(torch.nn.Module):
    """A UNet that has learned its training images by heart: it takes every latent for a noisy one of the nearest of them."""

    dtype = torch.float32

    def __init__(self, latents, prediction_type="epsilon"):
        super().__init__()
        self.latents, self.prediction_type = latents, prediction_type
        self.alphas = DDIMScheduler().alphas_cumprod

    def forward(self, z_t, timesteps, encoder_hidden_states):
        kept = self.alphas[timesteps].view(-1, 1, 1, 1)
        distances = torch.cdist(z_t.flatten(1) / kept.flatten(1).sqrt(), self.latents.flatten(1))
        z_0 = self.latents[distances.argmin(1)]
        noise = (z_t - kept.sqrt() * z_0) / (1 - kept).sqrt()
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * z_0
        return SimpleNamespace(sample=noise if self.prediction_type == "epsilon" else velocity)


def base_of(unet, prediction_type="epsilon"):
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    return SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, unet=unet, prediction_type=prediction_type,
                           noise_scheduler=lambda: scheduler)  # fmt: skip


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_model_that_remembers_is_found_by_every_attack_and_one_of_other_images_by_none(prediction_type):
    draw, members = torch.Generator().manual_seed(0), coins(300)
    latents, strangers = torch.randn((300, 2, 4, 4), generator=draw), torch.randn((150, 2, 4, 4), generator=draw)
    moments = Moments(latents, torch.zeros_like(latents), 1.0)
    table, labels = torch.zeros(2, 1, 3), np.zeros(300, int)

    def scores_of_model(remembered):
        made = attacks.denoise(
            base_of(Remembers(remembered, prediction_type), prediction_type), table, moments, labels, 7
        )
        of_base = attacks.denoise(
            base_of(Remembers(strangers[:75], prediction_type), prediction_type), table, moments, labels, 7
        )
        return attacks.model_scores(made, of_base)

    for name, values in scores_of_model(latents[members]).items():
        assert expose(values, members, 3).auc_low > 0.9, name
    for name, values in scores_of_model(strangers[75:]).items():
        found = [expose(values, coins(300, seed), 3) for seed in range(60)]
        assert np.mean([f.auc_low <= 0.5 <= f.auc_high for f in found]) > 0.93, name


# ----------------------------------------------------------------------------------------------- the limit, the card


def attack(tpr_low, auc_low=0.5):
    shares = dict(auc=auc_low + 0.05, auc_low=auc_low, auc_high=auc_low + 0.1, certain=0.012)
    shares |= dict(tpr=tpr_low + 0.01, tpr_low=tpr_low, tpr_high=tpr_low + 0.03)
    return shares | dict(guesses=10, right=5, epsilon=0.0, level=0.95)


def audit_with(set_low, model_low):
    cas = dict(mean=0.9, std=0.01)
    epoch = dict(
        set={"pixels": attack(0.0, 0.6), "all, calibrated": attack(set_low)},
        model={"denoising loss, calibrated": attack(model_low)},
        cas=cas,
    )
    config = dict(num_inference_steps=5, guidance_scale=1.0, class_encoder_epoch=2, unet_epoch=4)
    return dict(chosen="x2", config=config, images=600, members=300, others=310, calibrated_by=50,
                epochs=[epoch | dict(epoch=2), epoch | dict(epoch=4)])  # fmt: skip


@pytest.fixture
def audited(settings, monkeypatch):
    """Settings with a finished audit, whose lower ends can be set."""

    def with_ends(set_low, model_low, state=State.DONE):
        reasons = {State.DAMAGED: Reason.ALTERED, State.STALE: Reason.UPSTREAM_REMADE, State.BEGUN: Reason.INTERRUPTED}
        subject = "metrics/audit.json" if state == State.DAMAGED else "05_scaling"
        found = StageState(state, reasons.get(state), subject)
        monkeypatch.setattr(privacy, "stage_state", lambda *_: found)
        path = settings.run_folder / "metrics" / "audit.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(audit_with(set_low, model_low)))
        return privacy.privacy_of(settings)

    return with_ends


def test_the_card_has_the_strongest_attack_in_each_number_and_no_guarantee(audited):
    card = audited(0.03, 0.2)
    assert card["set"]["tpr"] == dict(attack="all, calibrated", tpr=0.04, tpr_low=0.03, tpr_high=0.06, certain=0.012)
    assert card["set"]["auc"] == dict(attack="pixels", auc=0.65, auc_low=0.6, auc_high=0.7)
    assert card["model"]["tpr"]["tpr_low"] == 0.2 and "no formal guarantee" in card["guarantee"]
    sentence = privacy.privacy_sentence(card)
    assert "4.0 %" in sentence and "0.65" in sentence and "no formal guarantee" in sentence


def test_a_release_above_the_limit_is_refused_and_only_that(audited):
    about = dict(privacy=audited(0.05, 0.2), images=10, chosen=dict(images=20))
    assert privacy.check_release(about, ("set",), 0.05) == about  # not above it
    with pytest.raises(
        BadInput, match=r"this model tells who was trained on: 21\.0 % of them \(95 % CI from 20\.0 %\).*5 %"
    ):
        privacy.check_release(about, ("set", "model"), 0.05)
    assert privacy.check_release(about, ("set", "model"), 0.2) == about
    for unknown in (dict(about, privacy=privacy.NOT_AUDITED), {k: v for k, v in about.items() if k != "privacy"}):
        assert privacy.check_release(unknown, ("set", "model"), 0.0)["privacy"] == "not audited"


def test_more_images_than_the_audited_size_are_not_audited_and_no_way_around_the_limit(audited):
    about = dict(privacy=audited(0.05, 0.2), images=21, chosen=dict(images=20))
    said = privacy.check_release(about, ("set",), 0.05)["privacy"]
    assert said.startswith("not audited at this size") and "Not audited at this size" in privacy.privacy_sentence(said)
    with pytest.raises(BadInput, match=r"whoever holds this set"):
        privacy.check_release(about, ("set",), 0.04)


@pytest.mark.parametrize("state", [State.STALE, State.BEGUN, State.NOT_RUN])
def test_an_audit_that_is_not_of_this_set_is_none(audited, state):
    card = audited(0.9, 0.9, state)
    assert card.startswith("not audited") and (state.value in card) == (state != State.NOT_RUN)
    assert privacy.privacy_sentence(card).startswith("Not audited") and "`sdlab audit`" in privacy.privacy_sentence(
        card
    )


def test_a_damaged_audit_is_not_taken_for_none(audited):
    with pytest.raises(BadInput, match=r"The audit is damaged .*audit\.json was altered"):
        audited(0.9, 0.9, State.DAMAGED)


def test_the_sentences_say_what_was_found():
    sentences = report.audit_sentences(audit_with(0.03, 0.2))
    assert 'finds most ("all, calibrated") finds 4.0 (3.0 to 6.0) % of the images' in sentences[0]
    assert (
        'accuses 1 % of the others. The highest AUC is 0.650 (0.600 to 0.700) ("pixels"); 0.5 is guessing.'
        in sentences[0]
    )
    assert sentences[1].startswith("Whoever holds the model") and "psilon" not in sentences[1]  # nothing is shown of it
    assert "from UNet epoch 2 to 4" in sentences[2] and "No formal guarantee" in sentences[3]
    assert "certainly accuses at most 1.2 % (set) and 1.2 % (model)" in sentences[4]
    assert any("50 validation images" in sentence for sentence in sentences)
    table = report.audit_table(audit_with(0.03, 0.2))
    assert list(table.index) == [
        ("the set", "pixels"),
        ("the set", "all, calibrated"),
        ("the model", "denoising loss, calibrated"),
    ]
    page = report.audit_page(audit_with(0.03, 0.2))
    assert page.startswith("# Audit") and page.count("| the set") == 2 and max(map(len, page.splitlines())) < 200


# ------------------------------------------------------------------------------------------------------ the stage


def test_the_epochs_are_spread_up_to_the_chosen_one():
    def epochs(chosen, **given):
        return audit.attacked_epochs(Settings.from_mapping(dict(experiment="x", dataset="digits") | given), chosen)

    assert epochs(64, unet_epochs=64) == [17, 32, 48, 64] and epochs(58, unet_epochs=64) == [15, 30, 44, 58]
    assert epochs(2, unet_epochs=2) == [1, 2] and epochs(1, unet_epochs=1) == [1]
    assert epochs(10, unet_epochs=10, unet_kept_epochs=3, search_2_min_epoch=8) == [8, 9, 10]


def test_too_few_images_on_a_side_are_refused(data, settings):
    with pytest.raises(BadInput, match=r"needs 100 on each side: of the 48 here, coins drew \d+ and left \d+ out"):
        audit.toss_coins(settings, data)
    sides = []
    for seed in range(20):
        with contextlib.suppress(BadInput):
            of_seed = dataclasses.replace(settings, seed=seed)
            members = audit.toss_coins(of_seed, SimpleNamespace(train=range(220)))
            sides += [members.sum(), (~members).sum()]
            assert np.array_equal(members, audit.toss_coins(of_seed, SimpleNamespace(train=range(220))))
    assert sides and min(sides) >= 100


def test_the_command_audits_a_finished_run_and_everything_follows(finished, tmp_path):
    """At smoke depth nothing is remembered: no attack finds anybody. Then the numbers decide about the export."""
    world, _ = finished
    for name in ("runs", "reports"):
        shutil.copytree(world / name, tmp_path / name)
    where = ("-p", "runs_root", tmp_path / "runs", "-p", "reports_root", tmp_path / "reports")
    before = command(BIN / "sdlab", "export", world / "smoke.yaml", tmp_path / "unaudited", *where)
    assert before.returncode == 0 and "Not audited" in before.stdout
    assert json.loads((tmp_path / "unaudited" / "set.json").read_text())["privacy"] == "not audited"
    done = command(BIN / "sdlab", "audit", world / "smoke.yaml", *where)
    assert done.returncode == 0, done.stdout + done.stderr
    run, found = tmp_path / "runs/smoke", read_json(tmp_path / "runs/smoke/metrics/audit.json")
    whole = (run / "metrics/audit.json").read_text()
    assert report.audit_sentences(found)[0] in done.stdout
    assert (
        abs(found["members"] - found["others"]) < 120 and found["images"] == int(found["chosen"][1:]) * found["members"]
    )
    assert [e["epoch"] for e in found["epochs"]] == [1, 2][: found["config"]["unet_epoch"]] and all(
        len(e["set"]) == 7 and len(e["model"]) == 3 for e in found["epochs"]
    )
    for epoch in found["epochs"]:
        for target in ("set", "model"):
            assert all(attack["tpr_low"] < 0.05 for attack in epoch[target].values())
    settings = Settings.from_file(
        world / "smoke.yaml", runs_root=str(tmp_path / "runs"), reports_root=str(tmp_path / "reports")
    )
    assert stage_state(settings, "09").state == State.DONE and verify(settings)[0] == []
    assert not (run / "audit/begun").exists() and set(read_record(settings, "09").outputs) == {
        "metrics/audit.json",
        "audit/exposed.safetensors",
    }
    for name in ("audit.md", "figure_audit.png", "09_audit.ipynb"):
        assert (tmp_path / "reports/smoke" / name).stat().st_size
    again = command(BIN / "sdlab", "audit", world / "smoke.yaml", *where)
    assert again.returncode == 0 and again.stdout == done.stdout

    after = command(BIN / "sdlab", "export", world / "smoke.yaml", tmp_path / "audited", *where)
    assert after.returncode == 0 and "no formal guarantee" in after.stdout
    kept = json.loads((tmp_path / "audited" / "set.json").read_text())["privacy"]
    assert kept["set"]["tpr"]["tpr_low"] < 0.05 and "no formal guarantee" in kept["guarantee"]

    # An audit that found half of those who were in.
    at_chosen = next(e for e in found["epochs"] if e["epoch"] == found["config"]["unet_epoch"])
    at_chosen["set"]["pixels"] |= dict(tpr=0.6, tpr_low=0.5, tpr_high=0.7)
    write_json(run / "metrics/audit.json", found)
    damaged = command(BIN / "sdlab", "export", world / "smoke.yaml", tmp_path / "damaged", *where)
    assert damaged.returncode == 1 and "The audit is damaged" in damaged.stderr and not (tmp_path / "damaged").exists()
    record = read_record(settings, "09")
    record.outputs["metrics/audit.json"] = FileHash.of(run / "metrics/audit.json")
    write_record(settings, record)
    for words in (("export", tmp_path / "refused"), ("release",)):
        refused = command(BIN / "sdlab", words[0], world / "smoke.yaml", *words[1:], *where)
        assert refused.returncode == 1 and "60.0 % of them (95 % CI from 50.0 %)" in refused.stderr, words
    assert not (tmp_path / "refused").exists() and not (tmp_path / "reports/smoke/release").exists()
    allowed = command(
        BIN / "sdlab", "export", world / "smoke.yaml", tmp_path / "allowed", *where, "-p", "privacy_limit", "1"
    )
    assert allowed.returncode == 0 and "finds 60.0 %" in allowed.stdout

    redone = command(BIN / "sdlab", "run", world / "smoke.yaml", "--redo", "09", *where)
    assert redone.returncode == 0 and "09_audit" in redone.stdout and read_json(run / "metrics/audit.json") != found
    assert read_json(run / "metrics/audit.json")["epochs"] == json.loads(whole)["epochs"]


def test_half_of_the_run_sees_the_members_alone(settings, data, base):
    members = coins(48)
    run = SimpleNamespace(
        settings=settings, data=data, base=base, work_folder=settings.run_folder / "audit/begun", progress=None
    )
    half = audit.half_of(run, members)
    assert np.array_equal(half.data.train.images, data.train.images[members]) and half.folder == run.work_folder
    assert half.data.fingerprint() != data.fingerprint() and half.data.val is data.val
    assert dataclasses.asdict(half.settings) == dataclasses.asdict(settings)


def test_an_interrupted_audit_keeps_what_it_has_while_other_stages_finish(finished, tmp_path, monkeypatch):
    """Killed after its trainings: another notebook is done, and nothing is trained again."""
    world, _ = finished
    shutil.copytree(world / "runs", tmp_path / "runs")
    given = dict(runs_root=str(tmp_path / "runs"), reports_root=str(tmp_path / "reports"))
    settings = Settings.from_file(world / "smoke.yaml", **given)
    loaded, base = load_dataset(settings), load_base_model(settings)
    run = Run(settings, "09_audit", loaded, base)
    members = audit.toss_coins(settings, loaded)
    audit.train_on(audit.half_of(run, members), encode_training_set(run), members, audit.load_optimum(run, "search_2"))
    run.lock.release()
    before = {path: path.stat().st_mtime_ns for path in run.work_folder.rglob("*.safetensors")}
    where = [word for name, value in given.items() for word in ("-p", name, value)]
    redone = command(BIN / "sdlab", "run", world / "smoke.yaml", "--redo", "08", *where)
    assert redone.returncode == 0, redone.stderr
    assert before and {path: path.stat().st_mtime_ns for path in run.work_folder.rglob("*.safetensors")} == before
    assert stage_state(settings, "09").state == State.BEGUN and verify(settings)[0] == []

    # Nothing is trained or compared again.
    run = Run(settings, "09_audit", loaded, base)
    half, moments = audit.half_of(run, members), encode_training_set(run)
    audit.train_on(half, moments, members, audit.load_optimum(run, "search_2"))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    others = audit.Attack(half, run, moments).others
    monkeypatch.setattr(audit, "class_distances", None)
    again = audit.Attack(half, run, moments).others
    assert others.keys() == {"pixels", "latents", "features"} and all(
        np.array_equal(others[v], again[v]) for v in others
    )
    monkeypatch.setattr(audit, "DRAWS", 9)  # another code
    with pytest.raises(TypeError):
        audit.Attack(half, run, moments)
    run.lock.release()
