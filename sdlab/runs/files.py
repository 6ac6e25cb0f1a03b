"""Atomic writes, file locks, hashes, JSON that checks itself, and the sentences for a disk that refuses.

A file is written under a temporary name, flushed and renamed, so nobody reads a half-written one. Imports no torch.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from sdlab.errors import BadInput

MOVE_AWAY = "move it away and run its stage again"
# Errors of a write that the disk or the system causes, and what the user can do.
WRITE_ERRORS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make that folder writable, or name another one"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "let more files be open (`ulimit -n`)"),
    errno.EFBIG: "that disk, or `ulimit -f`, takes no files of this size: name another one",
    errno.EIO: "the disk is failing: name another one",
    # Lustre without `-o flock`, and some network disks.
    **dict.fromkeys(
        (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP),
        "that disk supports no file locks, which keep two runs apart: name another one",
    ),
}


def sha256_of_file(path: Path) -> str:
    """Raises `BadInput` for a file that cannot be read."""
    with raise_on_read_error(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha256_of_json(value: Any) -> str:
    return sha256_of_bytes(json.dumps(value, sort_keys=True).encode())


def write_errno(error: BaseException) -> int:
    """The errno of an error if it is one of `WRITE_ERRORS`, else 0. safetensors and databases give theirs in words."""
    words = {
        "disk is full": errno.ENOSPC,
        "No space left on device": errno.ENOSPC,
        "readonly database": errno.EROFS,
        "disk I/O error": errno.EIO,
    }
    number = next((number for text, number in words.items() if text in str(error)), getattr(error, "errno", None))
    if not number and (match := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(match[1])
    return number if number in WRITE_ERRORS else 0


@contextlib.contextmanager
def raise_on_write_error(path: Path) -> Iterator[None]:
    """Raises `BadInput` if the block fails because the disk or the system refuses to write at `path`."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        if not (number := write_errno(error)):
            raise
        raise BadInput(cannot_write(path, number)) from None


def cannot_write(path: Path | str, number: int) -> str:
    return (
        f"{path} cannot be written ({os.strerror(number)}): {WRITE_ERRORS[number]}. What was finished before is intact, "
        "and the same command resumes there."
    )


@contextlib.contextmanager
def raise_on_read_error(path: Path) -> Iterator[None]:
    """Raises `BadInput` if the block fails because the system refuses to read at `path`: a mode, a disk, a network."""
    try:
        yield
    except OSError as error:
        # A library's own error, or an offset that a damaged file names.
        if error.errno in (None, errno.EINVAL, errno.EOVERFLOW):
            raise
        raise BadInput(cannot_read(error.filename or path, error)) from None


def cannot_read(path: Path | str, error: OSError) -> str:
    return f"{path} cannot be read ({error.strerror}): mend that, and give the same command."


def free_space(path: Path) -> int:
    """Free bytes on the disk of `path`, which need not exist."""
    return shutil.disk_usage(existing_parent(path)).free


def existing_parent(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(above for above in (path, *path.absolute().parents) if above.exists())


def check_free_space(path: Path, size: float, what: str) -> None:
    """Raises `BadInput` if fewer than `size` bytes are free on the disk of `path`; `what` begins the sentence."""
    if size > (free := free_space(path)):
        raise BadInput(
            f"{what} takes {size / 1e9:.3g} GB, and the disk of {path} has {free / 1e9:.3g} GB free: free some space; what "
            "was finished before is intact, and the same command resumes there."
        )


@contextlib.contextmanager
def atomic_write(path: Path, lasting: bool = True) -> Iterator[Path]:
    """Yield a temporary name for a file or folder; rename it to `path` if the block succeeds, else remove it.

    The temporary name is in a folder of its own, which is locked meanwhile: two processes may write the same path at
    once, and what a killed process left, a library's own half files included, is told from work in progress. With
    `lasting` the bytes are on the disk before the rename: even a power cut leaves no half file. Raises `BadInput` for a
    disk that is full, read-only or failing.
    """
    with raise_on_write_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_partial_writes(path.parent.glob(f".{glob.escape(path.name[:40])}.*.part"))
        folder, lock = new_partial_folder(path)
        try:
            temporary = folder / path.name
            yield temporary
            if lasting:
                for written in [temporary, *(temporary.rglob("*") if temporary.is_dir() else ())]:
                    flush(written)
            os.replace(temporary, path)
            if lasting:
                flush(path.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def new_partial_folder(path: Path) -> tuple[Path, int]:
    """A new folder next to `path`, and the descriptor by which this process holds its lock."""
    while True:
        folder = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.part")
        folder.mkdir()
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():  # nobody removed it as abandoned before it was locked
            return folder, lock
        os.close(lock)


def remove_partial_writes(partial: Iterable[Path]) -> None:
    """Remove the half-written files of killed processes: those whose lock nobody holds."""
    for path in list(partial):
        with contextlib.suppress(OSError):  # vanished, or held
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(lock)


def files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder in order, without half-written ones. Raises `BadInput` for an unreadable folder."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):  # vanished meanwhile
            raise BadInput(cannot_read(error.filename, error))

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not is_partial(name))
        yield from (Path(root, name) for name in sorted(names) if not is_partial(name))


def partial_writes(folder: Path) -> Iterator[Path]:
    """The half-written files and folders below a folder, of running and of killed processes."""
    for root, folders, names in os.walk(folder):
        yield from (Path(root, name) for name in (*folders, *names) if is_partial(name))
        folders[:] = [name for name in folders if not is_partial(name)]


def is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(".part")


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    size = 0
    for path in files_below(folder):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


@contextlib.contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path` during the block; yields False if another holds it (only without `wait`).

    The system releases it when its process ends, however it ends. It excludes threads of one process too.
    """
    with raise_on_write_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
        held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
    with file:
        yield held


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any, lasting: bool = True) -> None:
    with atomic_write(path, lasting) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path, how_to_make: str = "") -> Any:
    """Raises `BadInput` if the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path} is missing{': ' + how_to_make if how_to_make else '.'}") from None
    except OSError as error:
        raise BadInput(cannot_read(path, error)) from None
    except (ValueError, RecursionError):
        raise BadInput(f"{path} is damaged (it is not JSON): {MOVE_AWAY}.") from None


def write_hashed_json(path: Path, value: dict) -> None:
    """JSON that contains its own hash, under `sha256`."""
    value = json.loads(json.dumps(value))
    write_json(path, value | dict(sha256=sha256_of_json(value)))


def read_hashed_json(path: Path, how_to_make: str = "") -> dict:
    """The value given to `write_hashed_json`. Raises `BadInput` if it is missing or was altered."""
    value = read_json(path, how_to_make)
    whole = path.read_bytes().endswith(b"}\n")
    if not whole or not isinstance(value, dict) or value.pop("sha256", None) != sha256_of_json(value):
        raise BadInput(f"{path} is damaged (its hash does not match its content): {MOVE_AWAY}.")
    return value


def check_fields(value: Any, form: dict[str, Any], path: Path) -> dict:
    """`value` if it is a dict with the keys of `form`, each of its type. Raises `BadInput` that names `path`."""
    wrong = ["its braces"] if not isinstance(value, dict) else []
    wrong += [
        name for name, kind in form.items() if not wrong and not (name in value and isinstance(value[name], kind))
    ]
    if wrong:
        raise BadInput(f"{path} is damaged ({wrong[0]} is not what was written): {MOVE_AWAY}.")
    return value


def is_inside(name: str) -> bool:
    """True if a name from a file is a possible relative path that stays inside its folder."""
    path = PurePosixPath(name)
    try:
        lengths = [len(os.fsencode(part)) for part in path.parts]
    except UnicodeEncodeError:
        return False
    possible = lengths and max(lengths) <= 255 and sum(lengths) < 2000 and "\0" not in name
    return bool(possible) and not path.is_absolute() and ".." not in path.parts and "\\" not in name
