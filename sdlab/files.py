"""Files that are written whole or not at all, and read only as they were written: hashes, sealed JSON, a disk's refusals.

Everything is written beside its name, flushed and renamed into place, so a half file is never read. Imports no torch.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from sdlab.settings import BadInput


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# What a disk or the system answers when something cannot be written, and what to do about it.
REFUSALS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make that folder writable, or name another one"),
    errno.EFBIG: "that disk takes no files of this size: name another one",
    errno.EIO: "the disk is failing: name another one",
}


def refusal(error: BaseException) -> int:
    """The errno of an error that stands for one of `REFUSALS`, else 0. safetensors and SQLite have theirs in words."""
    number = getattr(error, "errno", None) or 0
    if not number and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    words = {"disk is full": errno.ENOSPC, "readonly database": errno.EROFS, "disk I/O error": errno.EIO}
    for said, meant in words.items():
        if said in str(error):
            number = meant
    return number if number in REFUSALS else 0


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises `BadInput` where the block fails since the disk or the system lets nothing be written at `path`."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        if not (number := refusal(error)):
            raise
        raise BadInput(cannot_write(path, number)) from None


def cannot_write(path: Path | str, number: int) -> str:
    return (
        f"{path} cannot be written ({os.strerror(number)}): {REFUSALS[number]}. What was finished before is intact, and the "
        "same command goes on from there."
    )


def check_room(path: Path, wanted: float, what: str) -> None:
    """Raises `BadInput` if the disk that `path` is to lie on has fewer than `wanted` bytes free."""
    there = next(above for above in (path, *path.absolute().parents) if above.exists())
    free = shutil.disk_usage(there).free
    if wanted > free:
        raise BadInput(
            f"{what} takes {wanted / 1e9:.3g} GB, and the disk of {there} has {free / 1e9:.3g} GB free: free some space; what was "
            "finished before is intact, and the same command goes on from there."
        )


@contextlib.contextmanager
def written_beside(path: Path, lasting: bool = True) -> Iterator[Path]:
    """A name beside `path` to write a file or folder under; renamed into place when the block ends well, else removed.

    `lasting`: its bytes are on the disk before it has its name, so that not even a power cut leaves a half file.
    Raises `BadInput` for a disk that is full, read-only or broken.
    """
    beside = path.with_name(f".{path.name}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if beside.is_dir():  # left by a process that was killed: never read, only ours
            shutil.rmtree(beside)
        try:
            yield beside
            if lasting:
                for written in [beside, *(beside.rglob("*") if beside.is_dir() else ())]:
                    flush(written)
            os.replace(beside, path)
            if lasting:
                flush(path.parent)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any, lasting: bool = True) -> None:
    with written_beside(path, lasting) as beside:
        beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path, how_to_make: str = "") -> Any:
    """Raises `BadInput` if the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path} is missing{': ' + how_to_make if how_to_make else '.'}") from None
    except (ValueError, UnicodeDecodeError):
        raise BadInput(f"{path} is damaged (it is not JSON): move it away and run its step again.") from None


def write_sealed(path: Path, value: dict) -> None:
    """JSON with a hash of itself, under `sha256`."""
    value = json.loads(json.dumps(value))
    write_json(path, value | dict(sha256=sha256_of_json(value)))


def read_sealed(path: Path, how_to_make: str = "") -> dict:
    """What `write_sealed` wrote. Raises `BadInput` if it is missing, or not what was written."""
    value = read_json(path, how_to_make)
    whole = path.read_bytes().endswith(b"}\n")
    if not whole or not isinstance(value, dict) or value.pop("sha256", None) != sha256_of_json(value):
        raise BadInput(f"{path} is damaged (its hash is not that of its content): move it away and run its step again.")
    return value


def inside(name: str) -> bool:
    """Whether a name that a file gives stays inside the folder it speaks of."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name


def checkpoint_sha(folder: Path, epoch: int) -> str:
    """One hash for the weights and config of `folder/epoch_NN`: what a generated set is made from."""
    return sha256_of_json(read_json(folder / f"epoch_{epoch:02d}" / "manifest.json", "train it first."))
