"""Files by content: what a worker needs of the driver's files lies in a cache folder under its sha256. Imports no torch.

The folder is `$SDLAB_CACHE`, by default `~/.cache/sdlab`. It holds at most `cluster_cache_gb`; the files that were used
longest ago go first. Workers of one machine share it.
"""

import contextlib
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdlab.errors import BadInput
from sdlab.runs.files import raise_on_write_error, sha256_of_file

CHUNK = 8 * 2**20  # bytes of a message
ABANDONED = 3600.0  # seconds after which a half-received file is no one's


def default_folder() -> Path:
    return Path(os.environ.get("SDLAB_CACHE") or "~/.cache/sdlab").expanduser()


OWN = re.compile(r"[0-9a-f]{64}(\.\w+\.part)?")  # names of the cache's files


@dataclass(frozen=True)
class BlobCache:
    """The cache folder of this machine, with a limit in bytes."""

    limit: float
    folder: Path = field(default_factory=default_folder)

    def path(self, sha256: str) -> Path:
        return self.folder / sha256

    def find(self, sha256: str) -> Path | None:
        """The file with this content, marked as used just now; None if it is not here."""
        try:
            os.utime(self.path(sha256))
        except FileNotFoundError:
            return None
        return self.path(sha256)

    def receive(self, sha256: str, offset: int, size: int, content: bytes, sender: str = "") -> None:
        """Write one chunk of a file of `size` bytes; the last one completes it.

        The chunks of a sender come in order; several may send the same file. Raises `BadInput` if the file's content is not
        what its name says, or the disk refuses.
        """
        partial = self.folder / f"{sha256}.{os.getpid()}{sender}.part"
        with raise_on_write_error(partial):
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial.open("r+b" if offset else "wb") as file:
                file.seek(offset)
                file.write(content)
            if offset + len(content) < size:
                return
            if sha256_of_file(partial) != sha256:
                partial.unlink()
                raise BadInput(f"{sha256[:12]} arrived with another content: repeat the command.")
            os.replace(partial, self.path(sha256))
        self.make_room(sha256)

    def make_room(self, but: str = "") -> None:
        """Remove the files that were used longest ago until the limit holds, never `but`."""
        files = []
        for path in self.folder.glob("*"):
            if not OWN.fullmatch(path.name):  # a user's file: the folder is theirs to name
                continue
            with contextlib.suppress(OSError):  # another worker removed it
                stat = path.stat()
                files.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        for used, size, path in sorted(files):
            receiving = path.suffix == ".part" and time.time() - used < ABANDONED
            if total > self.limit and path.name != but and not receiving:
                path.unlink(missing_ok=True)
                total -= size


def missing_files(limit: float, wanted: Iterable[str]) -> tuple[str, ...]:
    """Those of the files that this machine's cache lacks."""
    cache = BlobCache(limit)
    return tuple(sha256 for sha256 in dict.fromkeys(wanted) if cache.find(sha256) is None)


def receive(limit: float, *chunk: Any) -> None:
    BlobCache(limit).receive(*chunk)
