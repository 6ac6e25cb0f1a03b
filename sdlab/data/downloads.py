"""Official files: downloaded if missing, again if the network breaks off, and used only with the right MD5."""

import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from sdlab.errors import BadInput
from sdlab.runs.files import atomic_write
from sdlab.runs.progress import Progress

TIMEOUT = 30  # seconds without a byte until a download is given up
PAUSES = (1.0, 10.0)  # seconds until it is started again


def md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def fetch(url: str, path: Path, md5: str, what: str) -> None:
    """Download to `path`, unless a file is there. Raises `BadInput` if it cannot be had, or is not the official one.

    A download that breaks off leaves nothing that is read, and is started again, `len(PAUSES)` times.
    """
    started = False
    for pause in (*PAUSES, None):
        if path.exists():
            break
        try:
            download(url, path, md5, what)
        except (OSError, http.client.HTTPException) as error:
            # A server's refusal would be repeated; so would the error of a network that was never there.
            refused = isinstance(error, urllib.error.HTTPError)
            if pause is None or refused or (isinstance(error, urllib.error.URLError) and not started):
                raise BadInput(
                    f"{path.name} of {what} is not in {path.parent} and could not be fetched from {url} ({error}): put "
                    "it there, or set `data_root` to the folder that has it."
                ) from None
            started = True
            print(f"{path.name} could not be fetched ({error}): trying again in {pause:g} s", file=sys.stderr)
            time.sleep(pause)
    if not path.is_file():
        raise BadInput(f"{path} is no file, but the official file of {what} has to be there: move it away.")
    check_md5(
        path,
        md5,
        what,
        f"move it away, and it is fetched from {url}; to use your own version, give its path as `dataset`",
    )


def check_md5(path: Path, md5: str, what: str, remedy: str) -> None:
    """Raises `BadInput` for a file that is not the official one."""
    if (found := md5_of(path)) != md5:
        raise BadInput(f"{path} has MD5 {found}, but the official file of {what} has {md5}: {remedy}.")


def download(url: str, path: Path, md5: str, what: str) -> None:
    """Raises `OSError` if the network fails, `BadInput` for a whole file that is not the official one."""
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
        check_folder(path.parent)
        with atomic_write(path) as partial:
            with partial.open("wb") as file:
                total = int(answer.headers.get("Content-Length") or 0)
                with Progress(None, total or None, f"fetch {path.name}", "B") as bar:
                    while chunk := answer.read(2**20):
                        file.write(chunk)
                        bar.update(len(chunk))
                if total > file.tell():
                    raise ConnectionError(f"the connection ended after {file.tell():,} of {total:,} bytes")
            if (found := md5_of(partial)) != md5:
                raise BadInput(
                    f"{url} sent a {path.name} for {what} with MD5 {found} ({partial.stat().st_size:,} bytes) instead of "
                    f"{md5}: it was altered on the way, or is another file now; try again, or put the official one there."
                )


def check_folder(folder: Path) -> None:
    """Raises `BadInput` for a folder that can be neither written nor made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"`data_root` is {folder}, which cannot be made ({error.strerror}).") from None
    if not os.access(folder, os.W_OK):
        raise BadInput(f"`data_root` is {folder}, where nothing can be written, and a file is missing there.")
