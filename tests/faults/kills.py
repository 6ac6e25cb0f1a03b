"""kill -9 at seeded random points of every stage, each then resumed and compared byte for byte with one never killed.

    python tests/faults/kills.py --folder FOLDER [--kills 110] [--runs 3] [--kills-a-run 6] [--soak MINUTES]
    python tests/faults/kills.py --folder FOLDER --kills 0 --runs 4 --kills-a-run 7 --workers 2   # of a local cluster

`FOLDER` keeps the uninterrupted run after each stage, and `kills.jsonl`, a line a kill; given again, the suite resumes where
it was. `--soak` then starts, kills and verifies whole runs, one after another, for so long. The last lines printed are the
counts that docs/reliability.md shows. Exit code 1 if anything differed, was left over or was found damaged.
"""

import contextlib
import functools
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
from collections.abc import Callable
from pathlib import Path

import click
from attempts import NUMBERS, attempt, before, content, differing, make_stages, settings_file, strays

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
KINDS = ("shard", "trial", "step", "classifier", "latents")  # of work, as attempts.py writes it down
WEIGHTS = (1, 3, 4, 3, 4, 4, 1, 1, 3, 4)  # of the kills: where the work is


def killed_stage(folder: Path, index: int, stages: dict[str, dict]) -> dict:
    """One kill of one stage on a copy of its finished upstream, resumed."""
    rng, place = random.Random(index), folder / "kill"
    stage = rng.choices(NUMBERS, WEIGHTS)[0]
    file = before(folder, stage, place)
    first, again, run = place / "first.log", place / "again.log", place / "runs" / "smoke"
    for log in (first, again):
        log.write_text("")
    wanted = rng.uniform(0, 1) * stages[stage]["seconds"]
    late = attempt(file, stage, log=first, kill_after=wanted) is not None
    ended = attempt(file, stage, log=again)
    lines, more = first.read_text().splitlines(), again.read_text().splitlines()
    repeated = Counter(line.split()[0] for line in set(lines) & set(more) if line != "step")
    repeated["step"] = lines.count("step") + more.count("step") - stages[stage]["work"].count("step")
    return dict(
        kind="stage", index=index, stage=stage, at=round(wanted, 2), late=late, wrong=[s for s in (ended["said"], ended["crash"]) if s],
        differs=differing(content(run), content(folder / f"after_{stage}" / "smoke")), strays=strays(run), repeated=dict(repeated),
    )  # fmt: skip


def sdlab(
    environment: dict, *arguments: object, seconds: float | None = None, busy: Callable[[], bool] | None = None
) -> subprocess.CompletedProcess | None:
    """A command of its own; None if it was killed after `seconds`, half the time without its kernel, which has to see it.

    The seconds count from the moment when it is `busy`.
    """
    command = list(map(str, (Path(sys.executable).with_name("sdlab"), *arguments)))
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while seconds is not None and busy is not None and process.poll() is None and not busy():
        time.sleep(0.05)
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        if busy is not None and process.pid % 3 == 0:  # the driver of a cluster alone; `sdlab` ends with a sentence
            for pid, command_line in of_this_place(Path(environment["TMPDIR"])).items():
                if "ipykernel" in command_line:
                    os.kill(pid, signal.SIGKILL)
            process.communicate()
            return None
        if process.pid % 2:
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.communicate()
        return None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def killed_run(folder: Path, index: int, kills: int, workers: int, until: float = math.inf) -> dict:
    """`sdlab run`, whole, killed again and again, verified after each kill, and at last let through (or, late, cut off).

    With `workers` its tasks run on a local cluster, and it is killed while workers are busy.
    """
    rng, place = random.Random(f"run {index}"), folder / "kill"
    shutil.rmtree(place, ignore_errors=True)
    file = settings_file(place)
    scratch = place / "tmp"
    scratch.mkdir()
    environment = ENVIRONMENT | {
        "TMPDIR": str(scratch),
        "JUPYTER_RUNTIME_DIR": str(scratch),
        "SDLAB_CACHE": str(place / "cache"),
    }
    run, killed, wrong, done = place / "runs" / "smoke", 0, [], None
    options = cluster_options(workers) if workers else ()
    while done is None and time.monotonic() < until:
        after = rng.uniform(0, 8) if workers else rng.uniform(3, 25)
        busy = functools.partial(are_busy, run, time.time()) if workers else None
        done = sdlab(environment, "run", file, *options, seconds=after if killed < kills else None, busy=busy)
        if done is None:
            killed += 1
            if left := left_after(place, 10):
                wrong.append(f"10 s after a kill: {left}")
            if (run / "settings.yaml").exists() and (said := sdlab(environment, "verify", run)).returncode:
                wrong.append(said.stdout + said.stderr)
        elif done.returncode:
            wrong.append(done.stderr)
    row = dict(kind="run", index=index, kills=killed, whole=done is not None, differs=[], strays=[])
    if done is not None:
        if (said := sdlab(environment, "verify", run)).returncode:
            wrong.append(said.stdout + said.stderr)
        row["differs"] = differing(content(run), content(undisturbed(folder, workers)))
        own = (".lock", "torchinductor_root", "dask-scratch-space")  # one of an experiment; torch's cache
        row["strays"] = strays(run) + [p.name for p in scratch.iterdir() if not p.name.endswith(own)]
        row["strays"] += [p.name for p in scratch.glob("dask-scratch-space/*") if p.suffix != ".lock"]  # of workers
        row["files"] = len([p for p in run.rglob("*") if p.is_file()])
    row["processes"] = left_after(place, 3)  # a kernel whose parent was killed ends within a second or two
    return row | dict(verified=not wrong, wrong=wrong)


def cluster_options(workers: int) -> tuple[object, ...]:
    return ("-p", "search_parallel", 4, *(("-p", "cluster", "local", "-p", "workers", workers) if workers else ()))


def undisturbed(folder: Path, workers: int) -> Path:
    """A run that was never killed; for one of a cluster, a run of as many trials at a time without a cluster."""
    if not workers:
        return folder / "after_07" / "smoke"
    place = folder / "parallel"
    if not (place / "reports").exists():
        subprocess.run(
            [Path(sys.executable).with_name("sdlab"), "run", settings_file(place), *map(str, cluster_options(0))],
            check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return place / "runs" / "smoke"


def are_busy(run: Path, since: float) -> bool:
    """True while a stage of the run gets results from its workers."""
    try:
        progress = json.loads((run / "progress.json").read_text())
    except (OSError, ValueError):
        return False
    return progress["time"] > since and progress["unit"] in ("img", "epoch")


def left_after(place: Path, seconds: float) -> list[str]:
    """Processes of a run that are still there so long after it ended or was killed."""
    until = time.monotonic() + seconds
    while (left := of_this_place(place)) and time.monotonic() < until:
        time.sleep(0.1)
    return list(left.values())


def of_this_place(place: Path) -> dict[int, str]:
    """Command lines of processes that were started for a run and are still there."""
    processes = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if str(place) in path.read_text(errors="replace"):
                processes[int(path.parent.name)] = (path.parent / "cmdline").read_text().replace("\0", " ")
    return processes


def summary(rows: list[dict]) -> str:
    of_stages, runs = ([row for row in rows if row["kind"] == kind] for kind in ("stage", "run"))
    hit = [row for row in of_stages if not row["late"]]
    most = {kind: max((row["repeated"].get(kind, 0) for row in hit), default=0) for kind in KINDS}
    of_stage = ", ".join(f"{stage}: {sum(row['stage'] == stage for row in hit)}" for stage in NUMBERS)
    lines = [
        f"kills of a stage: {len(hit)} ({of_stage}); {len(of_stages) - len(hit)} came after its end",
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
@click.option("--kills", default=110, show_default=True, help="Of single stages.")
@click.option("--runs", default=3, show_default=True, help="Whole runs that are killed.")
@click.option("--kills-a-run", default=6, show_default=True)
@click.option("--workers", default=0, show_default=True, help="Of a local cluster, for whole runs.")
@click.option("--soak", default=0.0, show_default=True, help="Minutes of whole runs that are killed, after these.")
def main(folder: Path, kills: int, runs: int, kills_a_run: int, workers: int, soak: float) -> None:
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "kills.jsonl"
    stages = make_stages(folder) if kills or not workers else {}
    rows = [json.loads(line) for line in state.read_text().splitlines()] if state.exists() else []
    done = {(row["kind"], row["index"]) for row in rows}
    todo = [("stage", i) for i in range(kills)] + [("run", i) for i in range(runs)]

    def keep(row: dict) -> None:
        with state.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        click.echo(json.dumps(row))

    for kind, index in todo:
        if (kind, index) not in done:
            whole = kind == "run"
            keep(killed_run(folder, index, kills_a_run, workers) if whole else killed_stage(folder, index, stages))
    until, index = time.monotonic() + 60 * soak, max((row["index"] for row in rows if row["kind"] == "run"), default=-1)
    while time.monotonic() < until:
        index += 1
        keep(killed_run(folder, index, kills_a_run, workers, until))
    click.echo(summary(rows))
    sys.exit(any(row["differs"] or row["strays"] or row.get("wrong") or row.get("processes") for row in rows))


if __name__ == "__main__":
    main()
