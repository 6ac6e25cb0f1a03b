"""A finished audit -> what goes along with a released set or model, and whether it is released at all. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from sdlab.errors import BadInput
from sdlab.runs.files import read_json
from sdlab.runs.stages import STAGES, State, remedy, stage_state
from sdlab.settings import Settings

NOT_AUDITED = "not audited"


def strongest(attacks: Mapping[str, Mapping]) -> tuple[str, Mapping]:
    """The attack that certainly finds most where it accuses 1 %; of equal ones, that with the AUC that is certainly highest."""
    return max(attacks.items(), key=lambda item: (item[1]["tpr_low"], item[1]["auc_low"], item[1]["auc"]))


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
    (found,) = (e for e in audit["epochs"] if e["epoch"] == audit["config"]["unet_epoch"])
    kept = ("auc", "auc_low", "auc_high", "tpr", "tpr_low", "tpr_high", "certain")
    card: dict[str, Any] = dict(
        guarantee="no formal guarantee: the strongest of several attacks, on a run with half of the training images",
        set_images=audit["images"],
    )
    for target in ("set", "model"):
        name, numbers = strongest(found[target])
        card[target] = dict(attack=name) | {key: round(numbers[key], 4) for key in kept}
    return card


def check_privacy(privacy: Mapping[str, Any] | str, targets: tuple[str, ...], limit: float) -> None:
    """Raises `BadInput` if an attack on one of the `targets` (set, model) certainly finds more than the limit."""
    for target in targets if not isinstance(privacy, str) else ():
        found = privacy[target]
        if found["tpr_low"] > limit:
            raise BadInput(
                f"The audit found that whoever holds this {target} tells who was trained on: {100 * found['tpr']:.1f} % of them (95 % CI "
                f"from {100 * found['tpr_low']:.1f} %) while accusing 1 % of others; `privacy_limit` is {100 * limit:g} %. Take fewer UNet "
                "epochs (`search_2_max_epoch`) or smaller sets (`scaling_max`) in an experiment of its own, or, if nobody has to be "
                "protected, raise the limit (`-p privacy_limit 1`)."
            )


def privacy_sentence(privacy: Mapping[str, Any] | str) -> str:
    """One line for the terminal."""
    if isinstance(privacy, str):
        return f"{privacy[0].upper()}{privacy[1:]}. `sdlab audit` tries to tell from such images who was trained on."
    found = privacy["set"]
    return (
        f"Audited, no formal guarantee: the strongest attack finds {100 * found['tpr']:.1f} % of those who were trained on while "
        f"it accuses 1 % of others; its AUC is {found['auc']:.2f}."
    )
