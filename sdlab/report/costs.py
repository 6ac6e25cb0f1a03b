"""TODO report.costs."""

import math
from collections.abc import Mapping

import pandas as pd

from sdlab.runs.files import read_json
from sdlab.runs.records import STAGES, read_record, settings_differences
from sdlab.settings import Settings


def load_plan(settings: Settings) -> dict | None:
    """The plan that the first notebook made, if it did, and for these settings."""
    path = settings.run_folder / "metrics" / "plan.json"
    plan = read_json(path) if path.exists() else None
    return plan if plan is not None and plan["settings"] == planned_settings(settings) else None


def planned_settings(settings: Settings) -> dict:
    """What a plan depends on: all but where files lie."""
    return {k: v for k, v in settings.as_dict().items() if not k.endswith("_root") and k != "storage"}


def measured_costs(settings: Settings) -> dict[str, dict]:
    """What finished notebooks took with these settings, by number: hours, gigabytes left on disk, peak memory in gigabytes."""
    found, before = {}, 0
    for number in STAGES:
        record = read_record(settings, number)
        if record is None or not record.finished or settings_differences(settings, number, record):
            break
        measured = record.measured or dict(folder_bytes=math.nan, peak_memory_bytes=math.nan)
        found[number] = dict(
            hours=record.seconds / 3600,
            disk_gb=(measured["folder_bytes"] - before) / 1e9,
            memory_gb=measured["peak_memory_bytes"] / 1e9,
        )
        before = measured["folder_bytes"]
    return found


def plan_table(plan: Mapping, took: Mapping[str, Mapping] | None = None) -> pd.DataFrame:
    """A plan as text, a row a notebook and their sum; what finished notebooks took stands beside it."""
    took, rows = took or {}, []
    for number, row in plan["rows"].items():
        rows.append(
            {
                "notebook": row["notebook"],
                "images": f"{row['images']:,}",
                "steps": f"{row['steps']:,}" if row["steps"] else "",
                "time": format_hours(row["hours"]),
                "at most": format_hours(row["hours_at_most"]),
                "pruning saves": f"{row['pruning_saves']:.0%}" if row["pruning_saves"] else "",
                "disk": format_gigabytes(row["disk_gb"]),
                "memory": format_gigabytes(row["memory_gb"]),
            }
            | measured_columns([took[number]] if number in took else [], took)
        )
    total = {"notebook": "all", "images": f"{sum(row['images'] for row in plan['rows'].values()):,}"}
    total |= {
        "time": format_hours(plan["hours"]),
        "at most": format_hours(plan["hours_at_most"]),
        "disk": format_gigabytes(plan["disk_gb"]),
    }
    rows.append(total | {"memory": format_gigabytes(plan["memory_gb"])} | measured_columns(list(took.values()), took))
    return pd.DataFrame(rows).fillna("")


def measured_columns(rows: list[Mapping], took: Mapping) -> dict[str, str]:
    if not took:
        return {}
    if not rows:
        return {"took": "", "disk used": "", "memory used": ""}
    return {
        "took": format_hours(sum(row["hours"] for row in rows)),
        "disk used": format_gigabytes(sum(row["disk_gb"] for row in rows)),
        "memory used": format_gigabytes(max(row["memory_gb"] for row in rows)),
    }


def format_hours(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.1f} min"
    return f"{hours:.1f} h" if hours < 100 else f"{hours / 24:,.0f} days"


def format_gigabytes(gigabytes: float) -> str:
    if math.isnan(gigabytes):
        return "unknown"
    gigabytes = max(gigabytes, 0.0)
    return f"{gigabytes:.1f} GB" if gigabytes >= 1 else f"{1000 * gigabytes:.0f} MB"


def plan_sentences(plan: Mapping) -> list[str]:
    """What a plan rests on, and what will not do."""
    weights = "" if plan["base_model_is_here"] else ", whose weights are not here yet: timed with zeros in their place"
    return [
        f"{plan['experiment']} on {plan['device']}: {plan['training_images']:,} training images of {plan['classes']} classes, base model "
        f"{plan['base_model']} (UNet of {plan['unet_parameters']:,} parameters){weights}.",
        "Time: steps (IS) in the middle of their range and trials pruned as the search's pruner prunes random ones; at most: the highest "
        "IS, nothing pruned. The classifiers run to their last epoch. Starting a notebook is not counted (some seconds each).",
        f"Disk: {format_gigabytes(plan['disk_peak_gb'])} at the peak, while a resume state is written beside the last one"
        + (
            f", and with the base model's weights ({format_gigabytes(plan['fetched_gb'])}, to be fetched)."
            if plan["fetched_gb"]
            else "."
        ),
        *(f"WARNING {warning}" for warning in plan["warnings"]),
    ]
