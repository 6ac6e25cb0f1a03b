"""Disks that refuse: each kind of write of every stage with ENOSPC and EIO in turn, full file systems, read-only ones.

    python tests/faults/refusals.py --folder FOLDER [--writes 0] [--full 24] [--read-only 8] [--resumed 5]

After each, what was finished has to be intact, nothing half-written left, `verify` content, and the sentence one that says
what could not be written, why and what to do; of every `--resumed`th the stage is run again and compared byte for byte.
`--writes 0`: one of each kind. Full and read-only disks are small tmpfs mounts, which need root: without it they
are left out, and the last line, which docs/reliability.md shows, says so. Given again, the suite resumes where it was
(`refusals.jsonl`). Exit code 1 if anything was wrong.
"""

import contextlib
import errno
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from attempts import NUMBERS, attempt, before, content, differing, make_stages

from sdlab.runs.verify import verify
from sdlab.settings import Settings

ERRORS = (errno.ENOSPC, errno.EIO)  # in turn
ROOM = "it found room"
# A refused stage may have changed these: it recorded that it began, and searches keep their trials.
GROWING = ("settings.yaml", ".lock", "test_readings.jsonl", "searches.db", "progress.json", "artifacts/", "pictures/")
SENTENCE = re.compile(r"(.+ cannot be written \((.+)\): .+\. What was finished before is intact, and the same command resumes .+\.)|"
                      r"(.+ takes .+ GB, and the disk of .+ has .+ GB free: free some space; what was finished before is intact.+)")  # fmt: skip


def kind(asked: str) -> str:
    """A write without what is its own: numbers, hashes, processes."""
    asked = re.sub(r"\.[^/]*\.[0-9a-f]{8}\.part", "PART", asked)
    asked = re.sub(r"artifacts/.*", "artifacts/", asked)
    return re.sub(r"[0-9a-f]{16}|\d+", "#", asked)


def chosen_writes(stages: dict[str, dict], writes: int) -> list[tuple[str, int]]:
    """(stage, place): one of each kind, seeded, or `writes` of these."""
    rng, chosen = random.Random(0), []
    for stage in NUMBERS:
        places = {}
        for place, asked in enumerate(stages[stage]["asked"], 1):
            places.setdefault(kind(asked), []).append(place)
        chosen += [(stage, rng.choice(found)) for found in places.values()]
    return sorted(rng.sample(chosen, writes)) if writes else chosen


def what_is_wrong(folder: Path, file: Path, stage: str, ended: dict, number: int, again: bool) -> list[str]:
    """What is not as promised after a refused stage, as sentences."""
    settings = Settings.from_file(file)
    run, wrong = settings.run_folder, []
    said = SENTENCE.fullmatch(ended["said"])
    if ended["crash"] or not said or (said[2] and said[2] != os.strerror(number)):
        wrong.append(ended["crash"][-600:] or f"said: {ended['said']}")
    index = NUMBERS.index(stage)
    if index:
        upstream = folder / f"after_{NUMBERS[index - 1]}" / "smoke"
        for path in (p for p in upstream.rglob("*") if p.is_file()):
            name = path.relative_to(upstream).as_posix()
            if not name.startswith(GROWING) and (
                not (run / name).exists() or (run / name).read_bytes() != path.read_bytes()
            ):
                wrong.append(f"{name} is not what it was")
    wrong += [f"left: {path.name}" for path in run.rglob("*.part")]
    if run.is_dir():
        wrong += [f"verify: {finding.path} {finding.state}" for finding in verify(settings)[0]]
    if again:
        ended = attempt(file, stage)
        wrong += [text for text in (ended["said"], ended["crash"]) if text]
        wrong += [f"{name} differs" for name in differing(content(run), content(folder / f"after_{stage}" / "smoke"))]
    return wrong


def refused_write(folder: Path, stage: str, place: int, number: int, again: bool) -> tuple[list[str], str]:
    file = before(folder, stage, folder / "refused")
    ended = attempt(file, stage, at=place, number=number)
    return what_is_wrong(folder, file, stage, ended, number, again), ended["said"]


@contextlib.contextmanager
def disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own in memory."""
    folder.mkdir(exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], check=True, capture_output=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def full_disk(folder: Path, stage: str, index: int, stages: dict[str, dict]) -> tuple[list[str], str]:
    """A stage whose disk is full at a seeded point of what it writes; then there is room again, and it is resumed."""
    rng = random.Random(f"full {index}")
    grown = [sum(p.stat().st_size for p in (folder / f"after_{n}").rglob("*") if p.is_file()) for n in NUMBERS]
    here = NUMBERS.index(stage)
    writes = grown[here] - grown[here - 1]
    with disk(folder / "disk", 400) as place:
        file, filler = before(folder, stage, place), place / "filler"
        if index % 2:  # something else fills it while the stage runs
            filling = os.fork()
            if filling == 0:
                time.sleep(rng.uniform(0.1, 1) * stages[stage]["seconds"])
                fill(filler, 0)
                os._exit(0)
            ended = attempt(file, stage)
            os.kill(filling, signal.SIGKILL)
            os.waitpid(filling, 0)
        else:
            fill(filler, int(rng.uniform(0, 1) * writes))
            ended = attempt(file, stage)
        filler.unlink(missing_ok=True)
        if not ended["said"] and not ended["crash"]:
            return [], ROOM
        return what_is_wrong(folder, file, stage, ended, errno.ENOSPC, True), ended["said"]


def fill(filler: Path, free: int) -> None:
    """Leave `free` bytes of a disk."""
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as full:
        while (left := shutil.disk_usage(filler.parent).free - free) > 0:
            full.write(b"\0" * min(left, 2**20))


def read_only_disk(folder: Path, stage: str) -> tuple[list[str], str]:
    """A stage, and the commands that only look, where nothing can be written."""
    sdlab = Path(sys.executable).with_name("sdlab")
    with disk(folder / "disk", 400) as place:
        file = before(folder, stage, place)
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        ended = attempt(file, stage)
        wrong = what_is_wrong(folder, file, stage, ended, errno.EROFS, False)
        nothing_yet = stage == NUMBERS[0]
        for command, code in (("run", 1), ("status", 0), ("verify", int(nothing_yet))):
            done = subprocess.run([sdlab, command, file], capture_output=True, text=True)
            if done.returncode != code or "Traceback" in done.stderr or len(done.stderr.splitlines()) != code:
                wrong.append(f"sdlab {command}: {done.returncode}, {done.stdout[-300:]}{done.stderr[-600:]}")
        subprocess.run(["mount", "-o", "remount,rw", place], check=True)
        again = attempt(file, stage)
        wrong += [text for text in (again["said"], again["crash"]) if text]
        wrong += differing(content(place / "runs/smoke"), content(folder / f"after_{stage}" / "smoke"))
    return wrong, ended["said"]


def can_mount(folder: Path) -> bool:
    try:
        with disk(folder / "disk", 1):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), required=True)
@click.option("--writes", default=0, show_default=True, help="How many writes are refused; 0: one of each kind.")
@click.option("--full", default=24, show_default=True, help="Steps whose disk fills up.")
@click.option("--read-only", default=len(NUMBERS), show_default=True, help="Steps whose disk takes nothing.")
@click.option("--resumed", default=5, show_default=True, help="Every how many refused writes the stage is run again.")
def main(folder: Path, writes: int, full: int, read_only: int, resumed: int) -> None:
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    stages, state = make_stages(folder), folder / "refusals.jsonl"
    rows = {row["what"]: row for row in map(json.loads, state.read_text().splitlines())} if state.exists() else {}

    def tried(what: str, attempted: Callable[[], tuple[list[str], str]]) -> dict:
        """Try once and store the row: the suite resumes where it was."""
        if what not in rows:
            wrong, said = attempted()
            rows[what] = dict(what=what, wrong=wrong, said=said)
            with state.open("a") as file:
                file.write(json.dumps(rows[what]) + "\n")
        row = rows[what]
        click.echo(f"{what}: {'; '.join(row['wrong']) or 'as promised'} ({row['said'][:90]})")
        return row

    chosen, mounted = chosen_writes(stages, writes), can_mount(folder) and full
    refused, filled, shut = [], [], []
    for index, (stage, place) in enumerate(chosen):
        number, again = ERRORS[index % 2], index % resumed == 0
        what = f"{stage}, {errno.errorcode[number]}, {stages[stage]['asked'][place - 1]}"
        refused.append(tried(what, functools.partial(refused_write, folder, stage, place, number, again)))
    for index in range(full if mounted else 0):
        stage = NUMBERS[1 + index % (len(NUMBERS) - 1)]
        what = f"{stage}, a disk that fills up ({index})"
        filled.append(tried(what, functools.partial(full_disk, folder, stage, index, stages)))
    for stage in NUMBERS[: read_only if mounted else 0]:
        shut.append(tried(f"{stage}, a read-only disk", functools.partial(read_only_disk, folder, stage)))
    reached, bad = sum(row["said"] != ROOM for row in filled), [row for row in refused + filled + shut if row["wrong"]]
    click.echo(
        f"writes refused: {len(refused)} ({len({kind(a) for s in NUMBERS for a in stages[s]['asked']})} kinds in all); full disks: "
        + (f"{reached} of {full}; read-only ones: {len(shut)}" if mounted else "left out, nothing can be mounted here")
        + f"; not as promised: {len(bad)}"
    )
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
