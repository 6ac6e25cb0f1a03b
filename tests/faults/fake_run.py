"""A finished run of a few kilobytes, in the form that the notebooks leave: for tests that alter its files by the thousand."""

import contextlib
import json
import sqlite3
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import save_file

from sdlab.runs.checkpoints import checkpoint_sha
from sdlab.runs.files import sha256_of_file, write_hashed_json, write_json
from sdlab.runs.records import FileHash, StageRecord, read_record, record_digest, record_notebook, write_record
from sdlab.runs.resume_states import state_digest
from sdlab.runs.shards import shard_path
from sdlab.runs.stages import STAGES
from sdlab.settings import Settings

CLASSES, KEY = ("left", "right"), "0123456789abcdef"
CONFIG = dict(class_encoder_epoch=1, unet_epoch=1, num_inference_steps=3, guidance_scale=1.5)
OUTPUTS = {
    "00": ("metrics/data.json",),
    "01": ("class_encoder",),
    "02": ("metrics/search_1.json",),
    "03": ("unet",),
    "04": (),
    "05": ("metrics/real.json", "metrics/x01.json", "metrics/scaling.json"),
    "06": ("metrics/importance.json",),
    "07": ("metrics/tables.json",),
    "08": ("metrics/verdict.json",),
    "09": ("metrics/audit.json",),
}


def write_run(settings: Settings) -> Path:
    """Every kind of file that `verify` reads, none of it learned. The experiment's folder."""
    folder = settings.run_folder
    folder.mkdir(parents=True)
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings.as_dict(), sort_keys=False))
    for part in ("class_encoder", "unet"):
        write_checkpoint(folder / part)
    write_set(folder)
    write_metrics(folder)
    write_searches(folder)
    for number, stage in STAGES.items():
        outputs = [path for name in OUTPUTS[number] for path in files_below(folder / name) if path.stem != "resume"]
        record = StageRecord(
            stage=stage.stem,
            settings=settings.of_stage(number),
            upstream={n: record_digest(read_record(settings, n)) for n in stage.upstream},
            inputs={},
            begun="2026-01-01T00:00:00+00:00",
            opened_at=1e9 + int(number),
            environment={},
            seconds=1.0,
            finished="2026-01-01T00:00:01+00:00",
            outputs={path.relative_to(folder).as_posix(): FileHash.of(path) for path in outputs},
            side_outputs={"settings.yaml": FileHash.of(folder / "settings.yaml")} if number == max(STAGES) else {},
        )
        write_record(settings, record)
    notebook = folder / "notebooks" / "07_paper_tables.ipynb"
    notebook.parent.mkdir()
    notebook.write_text("{}")
    record_notebook(settings, "07", notebook)
    return folder


def files_below(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def write_checkpoint(part: Path) -> None:
    """One epoch, and the state that a training resumes from."""
    epoch = part / "epoch_01"
    epoch.mkdir(parents=True)
    save_file({"table": np.arange(6, dtype=np.float32)}, epoch / "diffusion_pytorch_model.safetensors")
    write_json(epoch / "config.json", dict(_class_name="ClassTable"))
    write_json(epoch / "manifest.json", {p.name: sha256_of_file(p) for p in files_below(epoch)})
    tensors = {"moment": np.ones((2, 3), np.float32), "weight": np.zeros(5, np.float32)}
    about = dict(lineage="0" * 64, epochs=1, steps=0)
    about["sha256"] = state_digest(about, sorted(tensors.items()))
    save_file(tensors, part / "resume.safetensors", {"sdlab": json.dumps(about)})


def write_set(folder: Path, shards: int = 2, size: int = 4) -> None:
    made, rng = folder / "synthetic" / KEY, np.random.default_rng(0)
    made.mkdir(parents=True)
    for index in range(shards):
        images = rng.integers(0, 256, (size, 3, 8, 8)).astype(np.uint8)
        save_file({"images": images, "labels": np.arange(size, dtype=np.int64) % 2}, shard_path(made, index))
    checkpoints = {part: checkpoint_sha(folder / part, 1) for part in ("class_encoder", "unet")}
    entries = {str(i): dict(sha256=sha256_of_file(shard_path(made, i)), seconds=0.1) for i in range(shards)}
    plan = dict(shard_size=size, seed=0, image_size=8, labels=[0, 1], num_inference_steps=3)
    made_from = dict(config=CONFIG, checkpoints=checkpoints, labels="0" * 64)
    write_hashed_json(made / "manifest.json", dict(key=KEY, plan=plan, made_from=made_from, shards=entries))


def write_metrics(folder: Path) -> None:
    test = dict(mean=0.5, std=0.1, n=2)
    pool = dict(images=8, classes=list(CLASSES), synthetic=KEY, config=CONFIG)
    shares = {f"{name}{end}": 0.0 for name in ("auc", "tpr") for end in ("", "_low", "_high")}
    attacks = {target: dict(pixels=shares | dict(certain=0.01, epsilon=0.0)) for target in ("set", "model")}
    trial = dict(number=0, state="complete", params={"steps": 3}, intermediate={"20": 0.4}, value=0.5)
    for name, value in dict(
        data=dict(name="bars"), importance={}, tables={}, real=dict(images=8, test=test), x01=dict(images=4, test=test),
        audit=dict(config=CONFIG, images=2, epochs=[dict(epoch=1) | attacks]),
        scaling=dict(pool=pool, chosen="x1", protocol="sealed"), search_1=dict(study="smoke-search_1", trials=[trial]),
    ).items():  # fmt: skip
        write_json(folder / "metrics" / f"{name}.json", value)


def write_searches(folder: Path) -> None:
    """Of Optuna's tables what `verify` looks at."""
    with contextlib.closing(sqlite3.connect(folder / "searches.db")) as database:
        database.executescript("""
            create table studies (study_id, study_name);
            create table trials (trial_id, study_id, number, state);
            create table trial_params (trial_id, param_name, param_value, distribution_json);
            create table trial_intermediate_values (trial_id, step, intermediate_value);
            create table trial_values (trial_id, value);
            insert into studies values (1, 'smoke-search_1');
            insert into trials values (1, 1, 0, 'COMPLETE');
            insert into trial_params values (1, 'steps', 3.0, '{"name": "IntDistribution"}');
            insert into trial_intermediate_values values (1, 20, 0.4);
            insert into trial_values values (1, 0.5);
        """)
