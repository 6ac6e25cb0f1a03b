"""The paper's data sets, and their relatives: CIFAR through torchvision, MedMNIST through medmnist's own table of files.

Files lie under `data_root`, are fetched there if they are missing, and are read only if their MD5 is the official one.
"""

import functools
import hashlib
import http.client
import importlib.util
import os
import sys
import tarfile
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from sdlab.data.images import DatasetFacts, ImageDataset, Split
from sdlab.data.npz import as_split, read_npz
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

    It is written beside and renamed when its MD5 is right: a cut download leaves nothing that is read, and is started
    again, `len(PAUSES)` times.
    """
    begun = False
    for pause in (*PAUSES, None):
        if path.exists():
            break
        try:
            download(url, path, md5, what)
        except (OSError, http.client.HTTPException) as error:
            # A server's refusal would be the same again; and so, before anything was sent, would a network's that is not there.
            hopeless = isinstance(error, urllib.error.HTTPError) or (
                isinstance(error, urllib.error.URLError) and not begun
            )
            if pause is None or hopeless:
                raise BadInput(
                    f"{path.name} of {what} is not in {path.parent} and could not be fetched from {url} ({error}): put it there, "
                    "or set `data_root` to the folder that has it."
                ) from None
            begun = True
            print(f"{path.name} could not be fetched ({error}): trying again in {pause:g} s", file=sys.stderr)
            time.sleep(pause)
    if not path.is_file():
        raise BadInput(f"{path} is no file, but the official file of {what} has to be there: move it away.")
    found = md5_of(path)
    if found != md5:
        raise BadInput(
            f"{path} has MD5 {found}, but the official file of {what} has {md5}: move it away, and it is fetched from {url}; "
            "to use your own version, give its path as `dataset`."
        )


def download(url: str, path: Path, md5: str, what: str) -> None:
    """Raises `OSError` for a network that fails, `BadInput` for a file that came whole and is not the official one."""
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
        check_folder(path.parent)
        with atomic_write(path) as beside:
            size = save(answer, beside, path.name)
            if (found := md5_of(beside)) != md5:
                raise BadInput(
                    f"What {url} sent as {path.name} for {what} has MD5 {found} ({size:,} bytes) instead of {md5}: it was "
                    "altered on the way, or is another file now; try again, or put the official one there."
                )


def save(answer: http.client.HTTPResponse, path: Path, name: str) -> int:
    """What a server sends, into `path`; the number of bytes. Raises `OSError`, also where they are fewer than it announced."""
    with path.open("wb") as file:
        total = int(answer.headers.get("Content-Length") or 0)
        with Progress(None, total or None, f"fetch {name}", "B") as bar:
            while chunk := answer.read(2**20):
                file.write(chunk)
                bar.update(len(chunk))
        if total > file.tell():
            raise ConnectionError(f"the connection ended after {file.tell():,} of {total:,} bytes")
        return file.tell()


def check_folder(folder: Path) -> None:
    """Raises `BadInput` for a folder that can be neither written nor made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"`data_root` is {folder}, which cannot be made ({error.strerror}).") from None
    if not os.access(folder, os.W_OK):
        raise BadInput(f"`data_root` is {folder}, where nothing can be written, and a file is missing there.")


CIFAR = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}  # torchvision's
CIFAR_FACTS = {
    "cifar10": DatasetFacts(40_000, 10_000, 10_000, 10, 32),
    "cifar100": DatasetFacts(40_000, 10_000, 10_000, 100, 32),
}


def cifar(name: str, data_root: Path, kind: Any = None, validation: int = 10_000) -> ImageDataset:
    """CIFAR as the authors split it: the last 10,000 training images validate.

    `kind` is torchvision's class, which knows the files, their MD5s and the address. The files are pickles: they are
    unpickled only after every MD5 was right. Raises `BadInput` for files that are missing or not the official ones.
    """
    if kind is None:
        import torchvision.datasets  # seconds: only where CIFAR is asked for

        kind = getattr(torchvision.datasets, CIFAR[name])
    folder = data_root / kind.base_folder
    members = dict([*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])])
    if not folder.exists():
        archive = data_root / kind.filename
        fetch(kind.url, archive, kind.tgz_md5, name)
        check_folder(data_root)
        unpack(archive, folder)
    for member, md5 in members.items():
        path = folder / member
        if not path.is_file():
            raise BadInput(
                f"{path} of {name} is missing: move {folder} away, and it is made anew from {kind.filename}."
            )
        if (found := md5_of(path)) != md5:
            raise BadInput(
                f"{path} has MD5 {found}, but the official file of {name} has {md5}: move {folder} away, and it is made anew from "
                f"{kind.filename} ({kind.url})."
            )
    train, test = kind(data_root, train=True), kind(data_root, train=False)
    images, labels = as_split(train.data, train.targets)
    return ImageDataset(
        name,
        f"torchvision {CIFAR[name]} ({kind.url}), {len(labels) - validation:,} of {len(labels):,} training images, the rest for validation",
        tuple(train.classes),
        Split(images[:-validation], labels[:-validation]),
        Split(images[-validation:], labels[-validation:]),
        Split(*as_split(test.data, test.targets)),
    )


def unpack(archive: Path, folder: Path) -> None:
    """`folder` as it stands in the archive, renamed into place when it is whole."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        try:
            (Path(scratch) / folder.name).rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run unpacked the same meanwhile
                raise


@functools.cache
def medmnist_table() -> dict[str, dict]:
    """medmnist's INFO of its two-dimensional sets with one label an image: address, MD5, counts, names, licence.

    Read from its info.py alone: importing the package takes seconds, for classes that are not needed here.
    """
    package = importlib.util.find_spec("medmnist").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("sdlab_medmnist_info", Path(package) / "info.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {
        name: info
        for name, info in module.INFO.items()
        if "3d" not in name and info["task"] != "multi-label, binary-class"
    }


def medmnist_facts(name: str, table: dict | None = None) -> DatasetFacts:
    info = (table or medmnist_table())[name]
    return DatasetFacts(*(info["n_samples"][s] for s in ("train", "val", "test")), len(info["label"]), 28)


def medmnist(name: str, data_root: Path, table: dict | None = None) -> ImageDataset:
    """A MedMNIST set at 28 pixels with its own splits. Raises `BadInput` for a file that is missing or not the official one."""
    info = (table or medmnist_table())[name]
    path = data_root / f"{name}.npz"
    fetch(info["url"], path, info["MD5"], name)
    splits = read_npz(path)
    expected = {s: info["n_samples"][s] for s in ("train", "val", "test")}
    found = {s: len(split) for s, split in splits.items()}
    if found != expected:
        raise BadInput(f"{path} has {found} images, but {name} has {expected}: move it away.")
    classes = tuple(info["label"][str(i)] for i in range(len(info["label"])))
    licence = info["license"]
    return ImageDataset(
        name, f"MedMNIST v2 {info['python_class']}, 28 px ({info['url']}; {licence})", classes, **splits
    )
