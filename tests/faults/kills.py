"""kill -9 at seeded random points of every step, each then gone on with and compared byte for byte with one never killed.

    python tests/faults/kills.py --folder FOLDER [--kills 100] [--runs 2] [--kills-a-run 6] [--soak MINUTES]

`FOLDER` keeps the uninterrupted run after each step, and `kills.jsonl`, a line a kill; given again, the suite goes on where
it was. `--soak` then starts, kills and verifies whole runs, one after another, for so long. The last lines printed are the
counts that docs/reliability.md shows. Exit code 1 if anything differed, was left lying or was found damaged.
"""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import click
import yaml

TESTS = Path(__file__).parents[1]
PYTHON = sys.executable
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
STEPS = ("00", "01", "02", "03", "04", "05", "06", "07")
KINDS = ("shard", "trial", "step", "classifier", "latents")  # of work, as one_step.py writes it down
WEIGHTS = (1, 3, 4, 3, 4, 4, 1, 1)  # of the kills: where the work is
# Clocked, or a hash of what is.
CLOCKED = {"seconds", "generation_seconds", "trial_seconds", "seconds_per_image_step", "sha256"}
NOT_COMPARED = {"metrics/plan.json", "metrics/tables.json"}  # times, and hashes of records


def settings_file(folder: Path) -> Path:
    """Smoke depth with everything under `folder`, and a training state at every step."""
    folder.mkdir(parents=True, exist_ok=True)
    given = yaml.safe_load((TESTS / "smoke.yaml").read_text())
    given |= dict(
        runs_root=str(folder / "runs"), reports_root=str(folder / "reports"), num_threads=1, resume_minutes=0.0
    )
    (folder / "smoke.yaml").write_text(yaml.safe_dump(given))
    return folder / "smoke.yaml"


def without_clock(value):
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if k not in CLOCKED}
    return [without_clock(v) for v in value] if isinstance(value, list) else value


def content(run: Path) -> dict[str, object]:
    """What a run promises to repeat: shards, checkpoints, latents, resume states byte for byte; results and records but for clocks."""
    found = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        name = path.relative_to(run).as_posix()
        if path.suffix in (".safetensors", ".npz") or name.startswith(("pictures/", "data/")):
            found[name] = path.read_bytes()
        elif path.suffix == ".json" and name.startswith(("metrics/", "synthetic/", "class_encoder/", "unet/")):
            if name not in NOT_COMPARED:
                found[name] = without_clock(json.loads(path.read_text()))
        elif name.startswith("records/") and "notebook" not in name:
            record = json.loads(path.read_text())
            found[name] = dict(
                settings=record["settings"], outputs=sorted(record["outputs"]), done=bool(record["finished"])
            )
    return found


def differing(a: dict, b: dict) -> list[str]:
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def strays(run: Path) -> list[str]:
    """Of a finished run: half files, and what unfinished steps keep."""
    left = [p for p in run.rglob("*") if p.name.endswith((".part", ".parts")) or p.name in ("begun", "progress.json")]
    return [p.relative_to(run).as_posix() for p in left]


def one_step(folder: Path, step: str, log: Path) -> subprocess.Popen:
    command = [PYTHON, TESTS / "faults" / "one_step.py", folder / "smoke.yaml", step, log]
    return subprocess.Popen(
        list(map(str, command)),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> None:
    _, err = process.communicate(timeout=900)
    if process.returncode:
        raise RuntimeError(err.decode()[-2000:])


def opened(run: Path, step: str) -> bool:
    return (run / "records" / f"{step}.json").exists()


def make_reference(folder: Path) -> dict[str, float]:
    """The uninterrupted run: a copy of its folder after each step, and the seconds that a step takes once it is open."""
    times = folder / "seconds.json"
    if times.exists():
        return json.loads(times.read_text())
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    settings_file(work)
    seconds = {}
    for step in STEPS:
        log = folder / f"work_{step}.log"
        log.write_text("")
        process = one_step(work, step, log)
        while process.poll() is None and not opened(work / "runs/smoke", step):
            time.sleep(0.02)
        started = time.monotonic()
        finish(process)
        seconds[step] = time.monotonic() - started
        shutil.copytree(work / "runs", folder / f"after_{step}", dirs_exist_ok=True)
    times.write_text(json.dumps(seconds))
    return seconds


def killed_step(folder: Path, index: int, seconds: dict[str, float]) -> dict:
    """One kill of one step on a copy of its finished upstream, gone on with."""
    rng = random.Random(index)
    step = rng.choices(STEPS, WEIGHTS)[0]
    place = folder / "kill"
    shutil.rmtree(place, ignore_errors=True)
    settings_file(place)
    run = place / "runs" / "smoke"
    before = STEPS.index(step) - 1
    if before >= 0:
        shutil.copytree(folder / f"after_{STEPS[before]}", place / "runs")
    log, after = place / "before.log", place / "after.log"
    log.touch()
    after.touch()
    process = one_step(place, step, log)
    while process.poll() is None and not opened(run, step):
        time.sleep(0.01)
    wanted = rng.uniform(0, 1) * seconds[step]
    until = time.monotonic() + wanted
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    late = process.poll() is not None
    if not late:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finish(one_step(place, step, after))
    lines, again = log.read_text().splitlines(), after.read_text().splitlines()
    whole = (folder / f"work_{step}.log").read_text().splitlines()
    repeated = Counter(line.split()[0] for line in set(lines) & set(again) if line != "step")
    repeated["step"] = lines.count("step") + again.count("step") - whole.count("step")
    differs = differing(content(run), content(folder / f"after_{step}" / "smoke"))
    return dict(
        kind="step", index=index, step=step, at=round(wanted, 2), late=late, differs=differs, strays=strays(run), repeated=dict(repeated),
    )  # fmt: skip


def sdlab(environment: dict, *arguments: object, seconds: float | None = None) -> subprocess.CompletedProcess | None:
    """A command of its own; None if it was killed after `seconds`, half the time without its kernel, which has to see it."""
    command = list(map(str, (Path(PYTHON).with_name("sdlab"), *arguments)))
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        if process.pid % 2:
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.communicate()
        return None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def killed_run(folder: Path, index: int, kills: int, until: float = math.inf) -> dict:
    """`sdlab run`, whole, killed again and again, verified after each kill, and at last let through (or, late, cut off)."""
    rng, place = random.Random(f"run {index}"), folder / "kill"
    shutil.rmtree(place, ignore_errors=True)
    file = settings_file(place)
    scratch = place / "tmp"
    scratch.mkdir()
    environment = ENVIRONMENT | {"TMPDIR": str(scratch), "JUPYTER_RUNTIME_DIR": str(scratch)}
    run, made, wrong, done = place / "runs" / "smoke", 0, [], None
    while done is None and time.monotonic() < until:
        done = sdlab(environment, "run", file, seconds=rng.uniform(3, 25) if made < kills else None)
        if done is None:
            made += 1
            if (run / "settings.yaml").exists() and (said := sdlab(environment, "verify", run)).returncode:
                wrong.append(said.stdout + said.stderr)
        elif done.returncode:
            wrong.append(done.stderr)
    row = dict(kind="run", index=index, kills=made, whole=done is not None, differs=[], strays=[])
    if done is not None:
        if (said := sdlab(environment, "verify", run)).returncode:
            wrong.append(said.stdout + said.stderr)
        row["differs"] = differing(content(run), content(folder / "after_07" / "smoke"))
        row["strays"] = strays(run) + [p.name for p in scratch.iterdir() if p.suffix != ".lock"]
        row["files"] = len([p for p in run.rglob("*") if p.is_file()])
    time.sleep(3)  # a kernel whose parent was killed ends within a second or two
    row["processes"] = of_this_place(place)
    return row | dict(verified=not wrong, wrong=wrong)


def of_this_place(place: Path) -> list[str]:
    """Command lines of processes that were started for a run and are still there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if str(place) in path.read_text(errors="replace"):
                found.append((path.parent / "cmdline").read_text().replace("\0", " "))
        except OSError:  # ended meanwhile, or another user's
            continue
    return found


def summary(rows: list[dict]) -> str:
    steps, runs = ([row for row in rows if row["kind"] == kind] for kind in ("step", "run"))
    hit = [row for row in steps if not row["late"]]
    most = {kind: max((row["repeated"].get(kind, 0) for row in hit), default=0) for kind in KINDS}
    of_step = ", ".join(f"{step}: {sum(row['step'] == step for row in hit)}" for step in STEPS)
    lines = [
        f"kills of a step: {len(hit)} ({of_step}); {len(steps) - len(hit)} came after its end",
        f"kills of a whole `sdlab run`: {sum(row['kills'] for row in runs)} in {len(runs)} runs ({sum(row['whole'] for row in runs)} "
        f"let through to their end); verified after each kill, found wrong: {sum(len(row['wrong']) for row in runs)}",
        f"ended otherwise than the run that was never killed: {sum(bool(row['differs']) for row in rows)}; stray files: "
        f"{sum(len(row['strays']) for row in rows)}; processes left: {sum(len(row['processes']) for row in runs)}; files of a "
        f"whole run: {sorted({row['files'] for row in runs if row['whole']})}",
        "made again after one kill, at most: " + ", ".join(f"{count} of {kind}" for kind, count in most.items()),
    ]
    return "\n".join(lines)


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), required=True)
@click.option("--kills", default=100, show_default=True, help="Of single steps.")
@click.option("--runs", default=2, show_default=True, help="Whole runs that are killed.")
@click.option("--kills-a-run", default=6, show_default=True)
@click.option("--soak", default=0.0, show_default=True, help="Minutes of whole runs that are killed, after these.")
def main(folder: Path, kills: int, runs: int, kills_a_run: int, soak: float) -> None:
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "kills.jsonl"
    seconds = make_reference(folder)
    rows = [json.loads(line) for line in state.read_text().splitlines()] if state.exists() else []
    done = {(row["kind"], row["index"]) for row in rows}
    todo = [("step", i) for i in range(kills)] + [("run", i) for i in range(runs)]

    def keep(row: dict) -> None:
        with state.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        click.echo(json.dumps(row))

    for kind, index in todo:
        if (kind, index) not in done:
            keep(killed_step(folder, index, seconds) if kind == "step" else killed_run(folder, index, kills_a_run))
    until, index = time.monotonic() + 60 * soak, max((row["index"] for row in rows if row["kind"] == "run"), default=-1)
    while time.monotonic() < until:
        index += 1
        keep(killed_run(folder, index, kills_a_run, until))
    click.echo(summary(rows))
    sys.exit(any(row["differs"] or row["strays"] or row.get("wrong") or row.get("processes") for row in rows))


if __name__ == "__main__":
    main()
