"""Files that are written whole or not at all, and read only as they were written: hashes, sealed JSON, a disk's refusals.

Everything is written beside its name, flushed and renamed into place, so a half file is never read. Imports no torch.
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


def sha256_of_file(path: Path) -> str:
    """Raises `BadInput` for a file that cannot be read."""
    with raise_on_read_error(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# What a disk or the system answers when something cannot be written, and what to do about it.
WRITE_ERRORS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make that folder writable, or name another one"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "let more files be open (`ulimit -n`)"),
    errno.EFBIG: "that disk, or `ulimit -f`, takes no files of this size: name another one",
    errno.EIO: "the disk is failing: name another one",
    # As Lustre's without `-o flock`, and some networks'.
    **dict.fromkeys(
        (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP),
        "that disk keeps no locks, by which two runs are kept apart: name another one",
    ),
}


def write_errno(error: BaseException) -> int:
    """The errno of an error that stands for one of `WRITE_ERRORS`, else 0. safetensors and SQLite have theirs in words."""
    number = getattr(error, "errno", None) or 0
    if not number and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    words = {"disk is full": errno.ENOSPC, "readonly database": errno.EROFS, "disk I/O error": errno.EIO}
    for said, meant in words.items():
        if said in str(error):
            number = meant
    return number if number in WRITE_ERRORS else 0


@contextlib.contextmanager
def raise_on_write_error(path: Path) -> Iterator[None]:
    """Raises `BadInput` where the block fails since the disk or the system lets nothing be written at `path`."""
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
        f"{path} cannot be written ({os.strerror(number)}): {WRITE_ERRORS[number]}. What was finished before is intact, and the "
        "same command goes on from there."
    )


@contextlib.contextmanager
def raise_on_read_error(path: Path) -> Iterator[None]:
    """Raises `BadInput` where the block fails since the system lets nothing be read at `path`: a mode, a disk, a network."""
    try:
        yield
    except OSError as error:
        # A library's own error, or a place in the file that a damaged one named.
        if error.errno in (None, errno.EINVAL, errno.EOVERFLOW):
            raise
        raise BadInput(cannot_read(error.filename or path, error)) from None


def cannot_read(path: Path | str, error: OSError) -> str:
    return f"{path} cannot be read ({error.strerror}): mend that, and give the same command."


def check_free_space(path: Path, wanted: float, what: str) -> None:
    """Raises `BadInput` if the disk that `path` is to lie on has fewer than `wanted` bytes free."""
    there = next(above for above in (path, *path.absolute().parents) if above.exists())
    free = shutil.disk_usage(there).free
    if wanted > free:
        raise BadInput(
            f"{what} takes {wanted / 1e9:.3g} GB, and the disk of {there} has {free / 1e9:.3g} GB free: free some space; what was "
            "finished before is intact, and the same command goes on from there."
        )


@contextlib.contextmanager
def atomic_write(path: Path, lasting: bool = True) -> Iterator[Path]:
    """A name to write a file or folder under; renamed to `path` when the block ends well, else removed.

    It lies in a folder of its own beside `path`, locked for as long as it is written to: two may write the same at once, and
    what a process that was killed left there, a library's own half files too, is told from what is at work. `lasting`: its
    bytes are on the disk before it has its name, so that not even a power cut leaves a half file. Raises `BadInput` for a
    disk that is full, read-only or broken.
    """
    with raise_on_write_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_partial_writes(path.parent.glob(f".{glob.escape(path.name[:40])}.*.part"))
        part, lock = new_partial_folder(path)
        try:
            beside = part / path.name
            yield beside
            if lasting:
                for written in [beside, *(beside.rglob("*") if beside.is_dir() else ())]:
                    flush(written)
            os.replace(beside, path)
            if lasting:
                flush(path.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            os.close(lock)


def new_partial_folder(path: Path) -> tuple[Path, int]:
    """A new folder beside `path`, and the descriptor by which this process holds it."""
    while True:
        part = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.part")
        part.mkdir()
        lock = os.open(part, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if part.is_dir():  # nobody took it for left over before it was locked
            return part, lock
        os.close(lock)


def remove_partial_writes(parts: Iterable[Path]) -> None:
    """Remove what processes that were killed left of their writes: half files, which nothing reads and nobody holds."""
    for part in list(parts):
        with contextlib.suppress(OSError):  # gone meanwhile, or held
            lock = os.open(part, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(part) if part.is_dir() else part.unlink()
            finally:
                os.close(lock)


def files_below(folder: Path) -> Iterator[Path]:
    """All files, in order, but for half ones; folders that vanish meanwhile are no error. Raises `BadInput` for an unreadable one."""

    def shut(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise BadInput(cannot_read(error.filename, error))

    for root, folders, names in os.walk(folder, onerror=shut):
        folders[:] = sorted(name for name in folders if not is_partial(name))
        yield from (Path(root, name) for name in sorted(names) if not is_partial(name))


def partial_writes(folder: Path) -> Iterator[Path]:
    """What writes that are at work, or were killed, have below a folder."""
    for root, folders, names in os.walk(folder):
        yield from (Path(root, name) for name in (*folders, *names) if is_partial(name))
        folders[:] = [name for name in folders if not is_partial(name)]


def is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(".part")


def folder_size(folder: Path) -> int:
    """Bytes of all files."""
    size = 0
    for path in files_below(folder):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


@contextlib.contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path` for the block: whether it was to be had (without `wait`: another may hold it).

    The system frees it when its process ends, however it ends. Threads of one process exclude each other too.
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
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any, lasting: bool = True) -> None:
    with atomic_write(path, lasting) as beside:
        beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path, how_to_make: str = "") -> Any:
    """Raises `BadInput` if the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path} is missing{': ' + how_to_make if how_to_make else '.'}") from None
    except OSError as error:
        raise BadInput(cannot_read(path, error)) from None
    except (ValueError, RecursionError):
        raise BadInput(f"{path} is damaged (it is not JSON): move it away and run its step again.") from None


def write_hashed_json(path: Path, value: dict) -> None:
    """JSON with a hash of itself, under `sha256`."""
    value = json.loads(json.dumps(value))
    write_json(path, value | dict(sha256=sha256_of_json(value)))


def read_hashed_json(path: Path, how_to_make: str = "") -> dict:
    """What `write_hashed_json` wrote. Raises `BadInput` if it is missing, or not what was written."""
    value = read_json(path, how_to_make)
    whole = path.read_bytes().endswith(b"}\n")
    if not whole or not isinstance(value, dict) or value.pop("sha256", None) != sha256_of_json(value):
        raise BadInput(f"{path} is damaged (its hash is not that of its content): move it away and run its step again.")
    return value


def check_fields(value: Any, form: dict[str, Any], path: Path) -> dict:
    """`value`, if it is a dict with the keys of `form`, each of its kind. Raises `BadInput` that names `path`."""
    wrong = ["its braces"] if not isinstance(value, dict) else []
    wrong += [
        name for name, kind in form.items() if not wrong and not (name in value and isinstance(value[name], kind))
    ]
    if wrong:
        raise BadInput(f"{path} is damaged ({wrong[0]} is not what was written): move it away and run its step again.")
    return value


def is_inside(name: str) -> bool:
    """Whether a name that a file gives is one that a file can have, inside the folder it speaks of."""
    path = PurePosixPath(name)
    try:
        lengths = [len(os.fsencode(part)) for part in path.parts]
    except UnicodeEncodeError:
        return False
    possible = lengths and max(lengths) <= 255 and sum(lengths) < 2000 and "\0" not in name
    return bool(possible) and not path.is_absolute() and ".." not in path.parts and "\\" not in name
