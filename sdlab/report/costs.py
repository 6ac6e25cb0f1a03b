"""What an experiment will cost and what its finished notebooks took, as a table and as sentences."""

import dataclasses
import math
from collections.abc import Mapping

import pandas as pd

from sdlab.runs.files import read_json
from sdlab.runs.records import read_record
from sdlab.runs.stages import PIPELINE, settings_differences
from sdlab.settings import Settings


def load_plan(settings: Settings) -> dict | None:
    """The plan that the first notebook saved; None if there is none, or it was made for other settings."""
    path = settings.run_folder / "metrics" / "plan.json"
    plan = read_json(path) if path.exists() else None
    return plan if plan is not None and plan["settings"] == planned_settings(settings) else None


def load_ceiling(settings: Settings) -> dict | None:
    """What the first notebook measured of the base model's VAE; None if it has not, or with other settings of its own."""
    path, record = settings.run_folder / "metrics" / "ceiling.json", read_record(settings, "00")
    if not path.exists() or record is None or settings_differences(settings, "00", record):
        return None
    return read_json(path)


def planned_settings(settings: Settings) -> dict:
    """The settings that a plan depends on: all but the places of files, and those of the verdict alone."""
    of_verdict = {f.name for f in dataclasses.fields(settings) if f.metadata["stages"] == ("08",)}
    values = settings.as_dict().items()
    return {k: v for k, v in values if not k.endswith("_root") and k != "storage" and k not in of_verdict}


def measured_costs(settings: Settings) -> dict[str, dict]:
    """The costs of notebooks that were finished with these settings, by number: hours, gigabytes left on disk, peak memory (GB)."""
    costs, before = {}, 0
    for number in PIPELINE:
        record = read_record(settings, number)
        if record is None or not record.finished or settings_differences(settings, number, record):
            break
        measured = record.measured or dict(folder_bytes=math.nan, peak_memory_bytes=math.nan)
        costs[number] = dict(
            hours=record.seconds / 3600,
            disk_gb=(measured["folder_bytes"] - before) / 1e9,
            memory_gb=measured["peak_memory_bytes"] / 1e9,
        )
        before = measured["folder_bytes"]
    return costs


def plan_table(plan: Mapping, took: Mapping[str, Mapping] | None = None) -> pd.DataFrame:
    """A plan as text, a row a notebook and their sum; with `took` (see `measured_costs`), the measured costs too."""
    images = sum(row["images"] for row in plan["rows"].values())
    total = {**plan, "notebook": "all", "images": images, "steps": 0, "pruning_saves": 0}
    rows = pd.DataFrame([*plan["rows"].values(), total], index=[*plan["rows"], "all"])
    text = {
        "notebook": rows.notebook,
        "images": rows.images.map("{:,}".format),
        "training steps": rows.steps.map("{:,}".format).where(rows.steps > 0, ""),
        "time": rows.hours.map(format_hours),
        "at most": rows.hours_at_most.map(format_hours),
        "pruning saves": rows.pruning_saves.map("{:.0%}".format).where(rows.pruning_saves > 0, ""),
        "disk": rows.disk_gb.map(format_gigabytes),
        "memory": rows.memory_gb.map(format_gigabytes),
    }
    if took:
        measured = pd.DataFrame(took).T
        total = measured.sum(skipna=False)
        measured.loc["all"] = total.where(total.index != "memory_gb", measured.memory_gb.max(skipna=False))
        text["took"] = measured.hours.map(format_hours)
        text["disk used"] = measured.disk_gb.map(format_gigabytes)
        text["memory used"] = measured.memory_gb.map(format_gigabytes)
    return pd.DataFrame(text).reindex(rows.index).fillna("").reset_index(drop=True)


def format_hours(hours: float) -> str:
    longer = f"{hours:.1f} h" if hours < 100 else f"{hours / 24:,.0f} days"
    return f"{60 * hours:.1f} min" if hours < 1 else longer


def format_gigabytes(gigabytes: float) -> str:
    if math.isnan(gigabytes):
        return "unknown"
    return f"{gigabytes:.1f} GB" if gigabytes >= 1 else f"{1000 * max(gigabytes, 0.0):.0f} MB"


def plan_sentences(plan: Mapping) -> list[str]:
    """The assumptions of a plan, and its warnings."""
    weights = "" if plan["base_model_is_here"] else ", whose weights are not here yet: timed with zeros in their place"
    fetched = f", and with the base model's weights ({format_gigabytes(plan['fetched_gb'])}, to be fetched)"
    return [
        f"{plan['experiment']} on {plan['device']}: {plan['training_images']:,} training images of {plan['classes']} classes, base "
        f"model {plan['base_model']} (UNet of {plan['unet_parameters']:,} parameters){weights}.",
        *plan.get("remarks", ()),
        "Time: inference steps (IS) in the middle of their range, and trials pruned as the search's pruner prunes random ones; at "
        "most: the highest IS, no pruning. Classifiers run to their last epoch. Starting a notebook (some seconds) is not counted.",
        f"Disk: {format_gigabytes(plan['disk_peak_gb'])} at the peak, while a new resume state is written before the old one "
        f"is removed{fetched if plan['fetched_gb'] else ''}.",
        *(
            [f"An audit (`sdlab audit`, on request) would take {format_hours(plan['audit_hours'])}."]
            if "audit_hours" in plan
            else []
        ),
        *(f"WARNING {warning}" for warning in plan["warnings"]),
    ]
