"""The searches on a real PostgreSQL server that asks for a password, is restarted in the middle, and loses connections."""

import contextlib
import dataclasses
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
from conftest import needs
from test_search import searched, whole_search, world

from sdlab import search as search_module
from sdlab.errors import BadInput
from sdlab.runs import patient_storage
from sdlab.runs.run import Run
from sdlab.runs.storage import check_storage

__all__ = ["world"]  # a fixture
PASSWORD = "half a secret"
FOLDERS = [*Path("/usr/lib/postgresql").glob("*/bin"), *map(Path, os.environ["PATH"].split(":"))]
PROGRAMS = next((folder for folder in FOLDERS if (folder / "initdb").exists()), None)


class Server:
    """A server in a folder of its own, as Debian's user `postgres` if this is root: it refuses to run as root."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.data, secret = folder / "data", folder / "password"
        secret.write_text(PASSWORD)
        if os.geteuid() == 0:
            for path in (folder, secret):
                shutil.chown(path, "postgres", "postgres")
        self.call("initdb", "--username=me", "--auth=scram-sha-256", f"--pwfile={secret}", "--no-sync", "-D", self.data)

    def call(self, program, *arguments) -> None:
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
        command = [*as_user, PROGRAMS / program, *arguments]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, cwd="/")

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -F"
        self.call("pg_ctl", "-w", "-D", self.data, "-l", self.data / "log", "-o", options, "start")

    def stop(self) -> None:
        self.call("pg_ctl", "-w", "-D", self.data, "-m", "immediate", "stop")

    def ask(self, sql: str) -> None:
        import psycopg

        with contextlib.closing(
            psycopg.connect(f"host=127.0.0.1 port={self.port} user=me dbname=postgres", autocommit=True)
        ) as c:
            c.execute(sql)


@pytest.fixture(scope="module")
def server():
    needs(PROGRAMS is not None, "PostgreSQL's server (Debian: postgresql)")
    pytest.importorskip("psycopg")
    folder = Path(tempfile.mkdtemp(prefix="sdlab-postgresql-"))  # pytest's own folders are closed to other users
    server = Server(folder)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(folder)


@pytest.fixture
def on_server(server, world, monkeypatch):
    """Settings of a search in a database of its own."""
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    server.ask("drop database if exists searches with (force)")
    server.ask("create database searches")
    return dataclasses.replace(world[0], storage=f"postgresql+psycopg://me@127.0.0.1:{server.port}/searches")


def test_a_restart_in_the_middle_waits_and_goes_through(server, world, on_server, data, tmp_path, monkeypatch, capsys):
    settings, log = world
    score = search_module.train_and_score_classifiers

    whole = whole_search(settings, data, tmp_path)
    tenth = len(log["scored"]) + 10

    def after_ten(*args, **kwargs):
        if len(log["scored"]) == tenth:
            server.stop()
            threading.Timer(3, server.start).start()
        return score(*args, **kwargs)

    monkeypatch.setattr(search_module, "train_and_score_classifiers", after_ten)
    started = time.monotonic()
    found, run = searched(on_server, data)
    assert without_seconds(found) == without_seconds(whole) and time.monotonic() - started > 3
    said = capsys.readouterr().out
    assert said.count(f"postgresql+psycopg://me@127.0.0.1:{server.port}/searches is away (") == 1
    secrets = [path for path in run.folder.rglob("*") if path.is_file() and PASSWORD.encode() in path.read_bytes()]
    assert not secrets and PASSWORD not in said


def test_connections_that_break_at_any_time_change_nothing(server, world, on_server, data, tmp_path):
    """Several trials at a time, while all connections are ended again and again."""
    four = dict(search_parallel=4)
    whole = whole_search(
        dataclasses.replace(world[0], experiment=on_server.experiment, **four), data, tmp_path / "four"
    )
    over, broken = threading.Event(), []

    def break_connections():
        while not over.wait(0.5) and len(broken) < 10:
            server.ask("select pg_terminate_backend(pid) from pg_stat_activity where datname = 'searches'")
            broken.append(1)

    breaking = threading.Thread(target=break_connections)
    breaking.start()
    try:
        found, _ = searched(dataclasses.replace(on_server, **four), data)
    finally:
        over.set()
        breaking.join()
    assert without_seconds(found) == without_seconds(whole) and len(broken) == 10


def test_a_server_that_stays_away_is_one_sentence(server, world, on_server, data, monkeypatch):
    monkeypatch.setattr(patient_storage, "PATIENCE", 0.5)
    score, stopped = search_module.train_and_score_classifiers, []

    def after_stop(*args, **kwargs):
        if not stopped:
            stopped.append(server.stop())
        return score(*args, **kwargs)

    monkeypatch.setattr(search_module, "train_and_score_classifiers", after_stop)
    try:
        with pytest.raises(
            BadInput, match=r"The `storage` of .* failed .*: when it is available again, repeat the command"
        ):
            searched(on_server, data)
    finally:
        server.start()
    assert len(searched(on_server, data)[0]["trials"]) == 24


def test_the_password_is_read_from_a_file_as_the_server_suggests(on_server, server, monkeypatch, tmp_path):
    monkeypatch.delenv("PGPASSWORD")
    with pytest.raises(BadInput, match=r"cannot be opened .*password"):
        check_storage(on_server)
    file = tmp_path / "pgpass"
    file.write_text(f"127.0.0.1:{server.port}:*:me:{PASSWORD}\n")
    file.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(file))
    check_storage(on_server)


def test_a_password_in_the_setting_is_refused_before_it_is_written(on_server, data):
    storage = on_server.storage.replace("me@", "me:secret@")
    with pytest.raises(BadInput, match=r"it has a password, .* PGPASSWORD or ~/.pgpass") as refused:
        Run(dataclasses.replace(on_server, experiment="other", storage=storage), "00_data_and_base_model", data)
    assert "secret" not in str(refused.value) and not (on_server.run_folder.parent / "other").exists()


def without_seconds(found: dict) -> list:
    """A search's trials without their clocks."""
    return [{name: value for name, value in trial.items() if "seconds" not in name} for trial in found["trials"]]
