"""A finished audit -> what goes along with a released set or model, and whether it is released at all. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from sdlab.errors import BadInput
from sdlab.runs.files import read_json
from sdlab.runs.stages import STAGES, State, remedy, stage_state
from sdlab.settings import Settings

NOT_AUDITED = "not audited"


def attacks_of(audit: Mapping, target: str) -> Mapping[str, Mapping]:
    """The attacks on `target` (set or model) at the UNet epoch that was chosen."""
    (found,) = (e for e in audit["epochs"] if e["epoch"] == audit["config"]["unet_epoch"])
    return found[target]


def strongest(attacks: Mapping[str, Mapping], number: str) -> tuple[str, Mapping]:
    """The attack whose `number` (tpr, auc, epsilon) is certainly highest, by the lower end of its interval."""
    ends = [f"{number}_low", number] if number != "epsilon" else [number]
    return max(attacks.items(), key=lambda item: [item[1][end] for end in ends])


def privacy_of(settings: Settings) -> dict[str, Any] | str:
    """What the audit found of set and model, for a card; a sentence that begins with `not audited` if it is not finished.

    Raises `BadInput` for an audit that is damaged: nobody knows what it found.
    """
    state = stage_state(settings, "09")
    if state.state == State.DAMAGED:
        raise BadInput(f"The audit is damaged ({state.why}): {remedy(settings, STAGES['09'], state)}.")
    if state.state != State.DONE:
        return (
            NOT_AUDITED if state.state == State.NOT_RUN else f"{NOT_AUDITED}: an audit is {state.state} ({state.why})"
        )
    audit = read_json(settings.run_folder / "metrics" / "audit.json")
    card: dict[str, Any] = dict(
        guarantee="no formal guarantee: the strongest of several attacks, on a run with half of the training images",
        set_images=audit["images"],
    )
    kept = dict(tpr=("tpr", "tpr_low", "tpr_high", "certain"), auc=("auc", "auc_low", "auc_high"), epsilon=("epsilon",))
    for target in ("set", "model"):
        card[target] = {}
        for number, keys in kept.items():
            name, found = strongest(attacks_of(audit, target), number)
            card[target][number] = dict(attack=name) | {key: round(found[key], 4) for key in keys}
    return card


def check_release(about: Mapping[str, Any], targets: tuple[str, ...], limit: float) -> dict[str, Any]:
    """The description of a set that goes out, whose `privacy` says so if it has more images than the chosen, audited size.

    Raises `BadInput` if an attack on one of the `targets` (set, model) certainly finds more than the limit.
    """
    privacy = about.get("privacy", NOT_AUDITED)
    if isinstance(privacy, str):
        return dict(about) | dict(privacy=privacy)
    for target in targets:
        found = privacy[target]["tpr"]
        if found["tpr_low"] > limit:
            raise BadInput(
                f"The audit found that whoever holds this {target} tells who was trained on: {100 * found['tpr']:.1f} % of them (95 % CI "
                f"from {100 * found['tpr_low']:.1f} %) while accusing 1 % of others (for the lower end at most "
                f"{100 * found['certain']:.1f} %); `privacy_limit` is {100 * limit:g} %. Take fewer UNet epochs (`search_2_max_epoch`) or "
                "smaller sets (`scaling_max`) in an experiment of its own, or, if nobody has to be protected, raise the limit "
                "(`-p privacy_limit 1`)."
            )
    if about["images"] > about["chosen"]["images"]:
        privacy = f"{NOT_AUDITED} at this size: larger sets may expose more than the chosen one"
    return dict(about) | dict(privacy=privacy)


def privacy_sentence(privacy: Mapping[str, Any] | str) -> str:
    """One line for the terminal."""
    if isinstance(privacy, str):
        return (
            f"{privacy[0].upper()}{privacy[1:]}. `sdlab audit` tries to tell from the chosen size who was trained on."
        )
    found = privacy["set"]
    return (
        f"Audited, no formal guarantee: an attack finds {100 * found['tpr']['tpr']:.1f} % of those who were trained on while it accuses "
        f"1 % of others; an attack has an AUC of {found['auc']['auc']:.2f}."
    )
