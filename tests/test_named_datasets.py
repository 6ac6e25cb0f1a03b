"""CIFAR and MedMNIST: small files in the true formats, checked, fetched, and refused when they are not what they should be."""

import functools
import http.server
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from make_data import md5, write_cifar, write_medmnist

from sdlab.data import downloads
from sdlab.data import named_datasets as official
from sdlab.data.datasets import load_dataset
from sdlab.data.downloads import fetch
from sdlab.data.images import DatasetFacts
from sdlab.data.named_datasets import cifar, known_names, medmnist, medmnist_table, named_facts
from sdlab.errors import BadInput
from sdlab.paths import PROJECT_ROOT
from sdlab.settings import Settings

SHARED = PROJECT_ROOT.parent / "shared" / "data"


@pytest.fixture
def server(tmp_path):
    """A web server on 127.0.0.1 that serves `folder`; where `cut` says so it hangs up in the middle of a file."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        cut, asked = 0, 0  # how many answers more are cut

        def log_message(self, *_):
            pass

        def copyfile(self, source, outputfile):
            Handler.asked += 1
            content = source.read()
            outputfile.write(content[: len(content) // 2] if Handler.cut else content)
            Handler.cut = max(Handler.cut - 1, 0)

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=web.serve_forever, daemon=True).start()
    web.folder, web.handler, web.url = folder, Handler, f"http://127.0.0.1:{web.server_port}"
    yield web
    web.shutdown()


# ------------------------------------------------------------------------------------------------------ CIFAR


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_split_as_the_authors_did(tmp_path, name):
    """All training images but the last validate; here 150 and 50 (10: 5 batches of 40) or 60 and 20 (100: one of 80)."""
    kind = write_cifar(tmp_path, name)
    validation = 50 if name == "cifar10" else 20
    data = cifar(name, tmp_path, kind, validation)
    assert [len(s) for s in data.splits.values()] == ([150, 50, 40] if name == "cifar10" else [60, 20, 40])
    assert data.num_classes == {"cifar10": 10, "cifar100": 100}[name] and data.image_size == 32
    last = kind.train_list[-1][0]
    batch = pickle.loads((tmp_path / kind.base_folder / last).read_bytes())
    assert np.array_equal(data.val.images[-1], batch["data"][-1].reshape(3, 32, 32))  # channels first, as stored
    labels = batch["labels" if name == "cifar10" else "fine_labels"]
    assert data.val.labels.tolist() == (labels[-validation:] if name == "cifar100" else (labels * 2)[-validation:])


def test_the_official_split_is_40000_10000_10000(tmp_path):
    """By default the last 10,000 validate: here of five batches of 2,002."""
    kind = write_cifar(tmp_path, "cifar10", per_batch=2002)
    assert [len(s) for s in cifar("cifar10", tmp_path, kind).splits.values()] == [10, 10_000, 2002]
    assert official.CIFAR_FACTS["cifar10"].train + 10_000 == 50_000
    for name, folder in official.CIFAR_FOLDERS.items():
        assert getattr(torchvision.datasets, official.CIFAR[name]).base_folder == folder


def test_cifar_is_fetched_and_unpacked(tmp_path, server):
    kind = write_cifar(server.folder, "cifar10")
    kind.url = f"{server.url}/{kind.filename}"
    root = tmp_path / "data"
    whole = cifar("cifar10", root, kind, 50)
    assert whole.fingerprint() == cifar("cifar10", server.folder, kind, 50).fingerprint()
    assert server.handler.asked == 1 and {p.name for p in root.iterdir()} == {kind.filename, kind.base_folder}
    cifar("cifar10", root, kind, 50)
    assert server.handler.asked == 1  # what is there is not fetched again


def test_a_batch_that_is_not_the_official_one_is_not_unpickled(tmp_path):
    """A pickle can run code: the MD5 comes first."""

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    kind = write_cifar(tmp_path, "cifar10")
    batch = tmp_path / kind.base_folder / "data_batch_3"
    batch.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(BadInput, match=r"data_batch_3 has MD5 .* but the official file of cifar10 has .* move"):
        cifar("cifar10", tmp_path, kind, 50)
    assert not (tmp_path / "ran").exists()
    batch.unlink()
    with pytest.raises(BadInput, match=r"data_batch_3 of cifar10 is missing"):
        cifar("cifar10", tmp_path, kind, 50)


# --------------------------------------------------------------------------------------------------- MedMNIST


@pytest.mark.parametrize("name", ["pathmnist", "dermamnist", "bloodmnist", "retinamnist", "breastmnist"])
def test_medmnist_has_its_own_splits_and_names(tmp_path, name):
    info = write_medmnist(tmp_path, name)
    data = medmnist(name, tmp_path, {name: info})
    assert [len(s) for s in data.splits.values()] == [60, 20, 30] and data.image_size == 28
    assert data.class_names == tuple(medmnist_table()[name]["label"].values())
    kept = np.load(tmp_path / f"{name}.npz")
    assert np.array_equal(data.test.images[3], kept["test_images"][3].transpose(2, 0, 1))
    assert data.test.labels.tolist() == kept["test_labels"][:, 0].tolist()


def test_the_table_is_medmnists_own():
    """Read without importing the package, which takes seconds."""
    from medmnist import INFO

    assert all(medmnist_table()[name] == INFO[name] for name in medmnist_table())
    assert {"pathmnist", "dermamnist", "bloodmnist", "retinamnist"} <= set(medmnist_table())
    assert not {"chestmnist", "organmnist3d"} & set(known_names())  # several labels an image; volumes
    assert named_facts("retinamnist") == DatasetFacts(1080, 120, 400, 5, 28)


def test_a_wrong_md5_is_refused(tmp_path):
    """The real check, with the official sum: a file of the right name and form, and other pixels."""
    write_medmnist(tmp_path, "retinamnist", (1080, 120, 400))
    settings = Settings.from_mapping(dict(experiment="x", dataset="retinamnist", data_root=str(tmp_path)))
    with pytest.raises(
        BadInput, match=r"has MD5 .*, but the official file of retinamnist has bd4c0672f1bba3e3a89f0e4e876791e4"
    ):
        load_dataset(settings)


def test_other_counts_than_the_official_ones_are_refused(tmp_path):
    info = write_medmnist(tmp_path, "retinamnist")
    info["n_samples"] = dict(train=61, val=20, test=30)
    with pytest.raises(BadInput, match=r"has .*60.*but retinamnist has .*61"):
        medmnist("retinamnist", tmp_path, {"retinamnist": info})


@pytest.mark.skipif(not (SHARED / "retinamnist.npz").exists(), reason="the official file is not on this machine")
def test_the_official_retinamnist():
    data = load_dataset(
        Settings.from_mapping(dict(experiment="x", dataset="retinamnist", data_root=str(SHARED), image_size=28))
    )
    assert [len(s) for s in data.splits.values()] == [1080, 120, 400]
    assert data.counts()["train"] == [486, 128, 206, 194, 66] and data.majority_share() == 0.435


# -------------------------------------------------------------------------------------------------- downloads


def test_a_file_is_fetched_once_with_its_md5_checked(tmp_path, server):
    (server.folder / "x.bin").write_bytes(bytes(range(256)) * 9000)
    path = tmp_path / "new" / "x.bin"
    for _ in range(2):
        fetch(f"{server.url}/x.bin", path, md5(server.folder / "x.bin"), "x")
    assert path.read_bytes() == (server.folder / "x.bin").read_bytes() and server.handler.asked == 1


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(downloads, "PAUSES", (0.01, 0.02))


def test_a_lost_network_starts_the_download_again(tmp_path, server, capsys, at_once):
    """Twice; what came in part is thrown away, and what is whole is checked."""
    (server.folder / "x.bin").write_bytes(bytes(range(256)) * 9000)
    server.handler.cut = 2
    fetch(f"{server.url}/x.bin", tmp_path / "x.bin", md5(server.folder / "x.bin"), "x")
    assert md5(tmp_path / "x.bin") == md5(server.folder / "x.bin") and server.handler.asked == 3
    said = "x.bin could not be fetched (the connection ended after 1,152,000 of 2,304,000 bytes): trying again in"
    assert capsys.readouterr().err.count(said) == 2


def test_a_network_that_stays_lost_leaves_nothing_that_is_read(tmp_path, server, at_once):
    (server.folder / "x.bin").write_bytes(bytes(range(256)) * 9000)
    right, path = md5(server.folder / "x.bin"), tmp_path / "new" / "x.bin"
    server.handler.cut = 3
    with pytest.raises(BadInput, match=r"x.bin of x is not in .*could not be fetched .*1,152,000 of 2,304,000 bytes"):
        fetch(f"{server.url}/x.bin", path, right, "x")
    assert list(path.parent.iterdir()) == []
    fetch(f"{server.url}/x.bin", path, right, "x")
    assert md5(path) == right


def test_what_would_be_the_same_again_is_not_asked_for_again(tmp_path, server, at_once, capsys):
    (server.folder / "x.bin").write_bytes(b"another file")
    with pytest.raises(BadInput, match=r"with MD5 .* instead of 000.*altered on the way"):
        fetch(f"{server.url}/x.bin", tmp_path / "x.bin", "0" * 32, "x")
    with pytest.raises(BadInput, match=r"could not be fetched .*404"):
        fetch(f"{server.url}/none.bin", tmp_path / "x.bin", "0" * 32, "x")
    assert server.handler.asked == 1 and capsys.readouterr().err.count("trying again") == 0


def test_no_network_says_which_file_from_where_into_which_folder(tmp_path, at_once):
    url = "http://127.0.0.1:9/x.npz"  # nobody listens
    with pytest.raises(
        BadInput, match=rf"x\.npz of retinamnist is not in {tmp_path}/none and could not be fetched from {url}"
    ):
        fetch(url, tmp_path / "none" / "x.npz", "0" * 32, "retinamnist")
    assert not (tmp_path / "none").exists()


def test_a_file_of_the_users_own_is_never_written_over(tmp_path, server):
    (server.folder / "x.npz").write_bytes(b"official")
    (tmp_path / "x.npz").write_bytes(b"mine")
    with pytest.raises(BadInput, match=r"move it away"):
        fetch(f"{server.url}/x.npz", tmp_path / "x.npz", md5(server.folder / "x.npz"), "x")
    assert (tmp_path / "x.npz").read_bytes() == b"mine" and server.handler.asked == 0
