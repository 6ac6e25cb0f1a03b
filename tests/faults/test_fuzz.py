"""Whatever reads a file that others wrote: any content at all is read, or refused in one sentence.

SDLAB_FUZZ is the number of examples of each property; the byte fuzzer (fuzz.py) takes twenty times as many inputs.
"""

import contextlib
import dataclasses
import json
import os
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import SMOKE, command
from fake_run import KEY, write_run
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as at_depth
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from PIL import Image

from sdlab.data.image_decoding import read_image
from sdlab.data.npz import read_arrays
from sdlab.errors import BadInput
from sdlab.paths import PROJECT_ROOT
from sdlab.runs.checkpoints import checkpoint_sha
from sdlab.runs.files import read_hashed_json, read_json, sha256_of_file, sha256_of_json
from sdlab.runs.parameters import from_yaml
from sdlab.runs.records import read_record
from sdlab.runs.shards import read_shards
from sdlab.runs.stages import STAGES, stage_state
from sdlab.runs.verify import Finding, verify
from sdlab.settings import Settings

EXAMPLES = int(os.environ.get("SDLAB_FUZZ", 60))  # `make faults` sets more
set_hypothesis_home_dir(Path(tempfile.gettempdir()) / f"sdlab-hypothesis-{os.getuid()}")  # not in the repository
FIELDS = {f.name: f for f in dataclasses.fields(Settings)}
many = at_depth(
    max_examples=EXAMPLES, deadline=5000, database=None, derandomize=True, report_multiple_bugs=False, suppress_health_check=list(HealthCheck)
)  # fmt: skip


def one_sentence(refusal):
    said = str(refusal)
    assert said and len(said.splitlines()) == 1 and len(said) < 1500, said


def read_or_refused(read, *arguments):
    """What `read` gives; None for a refusal. Anything else that it raises is an error."""
    try:
        return read(*arguments)
    except BadInput as refusal:
        one_sentence(refusal)
        return None


# -------------------------------------------------------------------------------------------- parameter files

NAMES = st.sampled_from(list(FIELDS))
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([2**31, 2**63, 10**30, 10**400, -1, 0, 1e308, 1e-320]))
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=40), st.dates(), st.binary(max_size=9))
VALUES = st.recursive(
    PLAIN, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=9), inner, max_size=4))
)
# What YAML makes something unexpected of.
ODD = st.sampled_from(
    ["0x" + "f" * 5000, "9" * 5000, "1:30:59", "2001-02-30", "!!int a", "!!float", "!!python/name:os.system", "!!binary _", "!!set {a}", "*a", "&a [*a]",
     "<<: x", "? [a]", "=", "~", ".nan", "-.inf", "[" * 3000, "{" * 3000, "'", '"\\ud800"', '"\\0"', "|", "!!timestamp x", "%", "@", "`", "0o9", "1e5", "---", "..."]
)  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("parameters") / "given.yaml"


def from_bytes(file, content):
    file.write_bytes(content)
    found = read_or_refused(Settings.from_file, file)
    assert found is None or isinstance(found, Settings)
    return found


@many
@given(st.binary(max_size=300))
def test_any_bytes_are_settings_or_a_refusal(file, content):
    from_bytes(file, content)


@many
@given(st.text(max_size=300))
def test_any_text_is_settings_or_a_refusal(file, content):
    from_bytes(file, ("experiment: x\ndataset: digits\n" + content).encode("utf-8", "surrogatepass"))


@many
@given(
    st.lists(
        st.tuples(
            st.one_of(NAMES, ODD), st.one_of(ODD, NUMBERS.map(lambda n: f"{n:.5g}" if isinstance(n, float) else hex(n)))
        ),
        max_size=6,
    )
)
def test_any_lines_are_settings_or_a_refusal(file, lines):
    from_bytes(file, ("experiment: x\ndataset: digits\n" + "".join(f"{n}: {v}\n" for n, v in lines)).encode())


@many
@given(st.dictionaries(st.one_of(NAMES, st.text(max_size=20), st.integers()), VALUES, max_size=8))
def test_any_values_are_settings_or_a_refusal(given_values):
    found = read_or_refused(Settings.from_mapping, {"experiment": "x", "dataset": "digits"} | given_values)
    assert found is None or all(getattr(found, name) == value for name, value in given_values.items())


@many
@given(st.one_of(ODD, st.text(max_size=60)))
def test_yaml_is_read_or_refused_as_yaml(text):
    with contextlib.suppress(yaml.YAMLError):
        from_yaml(text)


def valid(f):
    """Values that a setting takes by itself."""
    low, high, choices = (f.metadata[name] for name in ("low", "high", "choices"))
    if choices:
        return st.sampled_from(choices)
    if f.type is bool:
        return st.booleans()
    if f.type is int:
        return st.integers(low, 2**31 - 1 if high is None else high)
    if f.type is float:
        return st.floats(low, 1e300 if high is None else high)
    return {"experiment": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)}.get(
        f.name, st.text(max_size=40)
    )


@many
@given(st.fixed_dictionaries({}, optional={name: valid(f) for name, f in FIELDS.items()}))
def test_settings_survive_the_way_through_yaml(file, chosen):
    """Each drawn value that goes with those before it is kept."""
    settings = Settings.from_mapping(dict(experiment="x", dataset="digits"))
    for name, value in chosen.items():
        found = read_or_refused(Settings.from_mapping, settings.as_dict() | {name: value})
        settings = found or settings
    assume(settings.deviations() or chosen == {})
    file.write_text(yaml.safe_dump(settings.as_dict()), encoding="utf-8")
    assert Settings.from_file(file) == settings


# ------------------------------------------------------------------------------------------------------- JSON

HOSTILE = st.sampled_from(
    ["../../../etc/passwd", "/etc/passwd", "a\\..\\b", "..", ".", "", "x" * 5000, "a\0b", "a\nb", "\ud800", "metrics", "99", "-1", "1e9", "٣", "0" * 64]
)  # fmt: skip
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20), HOSTILE),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.text(max_size=9), HOSTILE), inner, max_size=3)
    ),
)


@many
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")),
        JSON.map(lambda v: json.dumps(v).encode()),
        st.just(b"[" * 100_000),
    )
)
def test_any_bytes_are_json_or_a_refusal(file, content):
    path = file.with_name("any.json")
    path.write_bytes(content)
    for read in (read_json, read_hashed_json):
        read_or_refused(read, path)


def places(value, at=()):
    """Where something stands in it: keys and indices, from the outside in."""
    yield at
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*at, key))


@st.composite
def altered(draw, value):
    """A valid content with one to three things in it lost, exchanged or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(value))
        at = draw(st.sampled_from(found))
        how = draw(st.sampled_from(["lost", "other", "hostile", "renamed", "added"]))
        if not at:
            continue
        inner = value
        for key in at[:-1]:
            inner = inner[key]
        if how == "lost":
            del inner[at[-1]]
        elif how == "other":
            inner[at[-1]] = draw(JSON)
        elif how == "hostile":
            inner[at[-1]] = draw(HOSTILE)
        elif isinstance(inner, dict):
            kept = inner[at[-1]] if how == "added" else inner.pop(at[-1])
            inner[draw(st.one_of(HOSTILE, st.text(max_size=9)))] = kept
    return value


def seal(path, value):
    """As `write_sealed` does, without waiting for the disk."""
    value = json.loads(json.dumps(value))
    value = value | dict(sha256=sha256_of_json(value)) if isinstance(value, dict) else value
    path.write_text(json.dumps(value, indent=1) + "\n")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, and its settings. Whoever alters a file puts it back."""
    folder = tmp_path_factory.mktemp("fuzzed")
    where = dict(runs_root=str(folder / "runs"), reports_root=str(folder / "reports"))
    settings = Settings.from_mapping(yaml.safe_load(SMOKE.read_text()) | where)
    write_run(settings)
    assert verify(settings)[0] == [] and {stage_state(settings, n).state for n in STAGES} == {"done"}
    return settings


SET = f"synthetic/{KEY}/manifest.json"
SEALED = [*(f"records/{n}.json" for n in STAGES), "records/07.notebook.json", SET]


class Altered:
    """A file of the run with other content for as long as the block lasts."""

    def __init__(self, path, data):
        self.path, self.kept = path, path.read_bytes()
        value = json.loads(self.kept)
        if "sha256" in value and len(value["sha256"]) == 64:
            value.pop("sha256")
        self.value = data.draw(st.one_of(altered(value), altered(value), altered(value), JSON))

    def __enter__(self):
        seal(self.path, self.value)

    def __exit__(self, *_):
        self.path.write_bytes(self.kept)


def whatever_reads(settings):
    """Everything that reads a record, a checkpoint's manifest or a set's."""
    for number in STAGES:
        read_or_refused(read_record, settings, number)
        read_or_refused(stage_state, settings, number)
    read_or_refused(lambda: list(read_shards(settings.run_folder / "synthetic" / KEY, 8)))
    for part in ("class_encoder", "unet"):
        read_or_refused(checkpoint_sha, settings.run_folder / part, 1)
    looked_at(settings)


EPOCH = "class_encoder/epoch_01/manifest.json"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("records/03.json", lambda v: v.pop("outputs")),
        ("records/03.json", lambda v: v.update(settings=[1])),
        ("records/03.json", lambda v: v["outputs"].update({"../x": dict(sha256="0", bytes=1)})),
        ("records/03.json", lambda v: v["outputs"].update({"a\0b": dict(sha256="0", bytes=1)})),
        (EPOCH, lambda v: v.update({"../x": "0"})),
        (SET, lambda v: v["shards"].update({"../x": dict(sha256="0", seconds=1)})),
        (SET, lambda v: v["plan"].update(shard_size=0)),
        ("records/03.json", lambda v: v.pop("finished")),
        (SET, lambda v: v.pop("made_from")),
        ("records/03.json", lambda v: v["outputs"].update({"x" * 300: dict(sha256="0", bytes=1)})),
        (EPOCH, lambda v: v.update({"x" * 300: "0"})),
        (SET, lambda v: v["made_from"]["checkpoints"].update(zzz="0")),
    ],
)  # fmt: skip
def test_what_was_found_by_altering(run, name, change):
    path = run.run_folder / name
    kept = path.read_bytes()
    value = json.loads(kept)
    sealed = value.pop("sha256", None)
    change(value)
    try:
        seal(path, value) if sealed else path.write_text(json.dumps(value))
        whatever_reads(run)
    finally:
        path.write_bytes(kept)


def looked_at(settings):
    found = read_or_refused(verify, settings)
    assert found is None or all(isinstance(finding, Finding) and finding.why for finding in found[0])
    for finding in found[0] if found else ():
        assert not Path(finding.path).is_absolute() and ".." not in Path(finding.path).parts, finding


@many
@given(st.data())
def test_a_sealed_record_of_any_content_has_a_state(run, data):
    number = data.draw(st.sampled_from(list(STAGES)))
    with Altered(run.run_folder / "records" / f"{number}.json", data):
        for n in STAGES:
            read_or_refused(read_record, run, n)
            read_or_refused(stage_state, run, n)


@many
@given(st.data())
def test_a_sealed_file_of_any_content_can_be_verified(run, data):
    with Altered(run.run_folder / data.draw(st.sampled_from(SEALED)), data):
        looked_at(run)


@many
@given(st.data())
def test_a_checkpoints_manifest_of_any_content_is_read_or_refused(run, data):
    part = data.draw(st.sampled_from(["class_encoder", "unet"]))
    path = run.run_folder / part / "epoch_01" / "manifest.json"
    kept = path.read_bytes()
    path.write_text(json.dumps(data.draw(st.one_of(altered(json.loads(kept)), JSON))))
    try:
        read_or_refused(checkpoint_sha, path.parents[1], 1)
        looked_at(run)
    finally:
        path.write_bytes(kept)


@many
@given(st.data())
def test_a_sets_manifest_of_any_content_is_read_or_refused(run, data):
    with Altered(run.run_folder / SET, data):
        read_or_refused(lambda: list(read_shards(run.run_folder / "synthetic" / KEY, 8)))


@many
@given(st.data())
def test_a_searchs_export_of_any_content_can_be_verified(run, data):
    """As a step would have left it: its record has its hash."""
    folder = run.run_folder
    export, record = folder / "metrics" / "search_1.json", folder / "records" / "02.json"
    kept = export.read_bytes(), record.read_bytes()
    export.write_text(json.dumps(data.draw(st.one_of(altered(json.loads(kept[0])), JSON))))
    value = json.loads(kept[1])
    value.pop("sha256")
    noted = dict(sha256=sha256_of_file(export), bytes=export.stat().st_size)
    seal(record, value | dict(outputs=value["outputs"] | {"metrics/search_1.json": noted}))
    try:
        looked_at(run)
    finally:
        export.write_bytes(kept[0])
        record.write_bytes(kept[1])


@pytest.mark.parametrize(
    "statement",
    [
        "update trials set state = 'FAIL'",
        "update trial_values set value = 'x'",
        "drop table trial_values",
        "delete from studies",
        "update trial_intermediate_values set step = null",
        "insert into trial_intermediate_values values (1, null, 1)",
        "update trials set state = 7",
        "update trial_params set param_value = 'x'",
        "update trial_params set distribution_json = '[]'",
        "update trial_params set distribution_json = 'x'",
    ],
)
def test_a_searchs_database_of_any_content_can_be_verified(run, statement):
    path = run.run_folder / "searches.db"
    kept = path.read_bytes()
    try:
        with contextlib.closing(sqlite3.connect(path)) as database, database:
            database.execute(statement)
        assert [finding.path for finding in verify(run)[0]] == ["searches.db"]
    finally:
        path.write_bytes(kept)


# ------------------------------------------------------------------------------------------------------ images


def gif_of(frames):
    """All alike, of one pixel."""
    head = b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff"
    return head + b"!\xf9\4\0\1\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0" * frames + b";"


def tiff_in_a_ring(path):
    """Whose last page says that the first comes next."""
    page = Image.new("L", (4, 4))
    page.save(path, save_all=True, append_images=[page] * 3)
    content = bytearray(path.read_bytes())
    first = at = int.from_bytes(content[4:8], "little")
    while at:
        place = at + 2 + 12 * int.from_bytes(content[at : at + 2], "little")
        at = int.from_bytes(content[place : place + 4], "little")
    content[place : place + 4] = first.to_bytes(4, "little")
    path.write_bytes(content)


def test_numbers_beyond_all_characters_are_no_text(tmp_path):
    """Python itself would stumble where it makes text of them."""
    np.savez(tmp_path / "x.npz", a=np.array([65, 0x110000], np.uint32).view("U1"), b=np.array(["é", ""]))
    with pytest.raises(
        BadInput, match=r"x.npz cannot be read as npz \(ValueError: a.npy holds texts that are none\): stop"
    ):
        read_arrays(tmp_path / "x.npz", ["a"], "stop")
    assert read_arrays(tmp_path / "x.npz", ["b"], "stop")["b"].tolist() == ["é", ""]


def test_pages_without_end_are_not_counted(tmp_path):
    (tmp_path / "x.gif").write_bytes(gif_of(300_000))
    tiff_in_a_ring(tmp_path / "x.tiff")
    for name in ("x.gif", "x.tiff"):
        started = time.monotonic()
        assert "several frames" in read_image(tmp_path / name, 4).traits[0]
        assert time.monotonic() - started < 1


# ------------------------------------------------------------------------------------------------------- bytes

KINDS = ("npz", "npz, one array", "kept images", "image", "PNG, right checksums", "shard", "manifest", "record", "resume state",
         "parameter file", "base model's config")  # fmt: skip


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    script = PROJECT_ROOT / "tests" / "faults" / "fuzz.py"
    done = command(sys.executable, script, "--folder", tmp_path_factory.mktemp("fuzz"), "--inputs", 20 * EXAMPLES)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_no_input_takes_long_or_fills_the_memory(fuzzed):
    """Seconds each; gigabytes together."""
    print(fuzzed)
    assert fuzzed["inputs"] == 20 * EXAMPLES and fuzzed["slowest"][0] < 5 and fuzzed["grown_bytes"] < 2**30


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused(fuzzed, kind):
    assert {name: said for name, said in fuzzed["failures"].items() if name.startswith(f"{kind}:")} == {}
    assert any(name.startswith(f"{kind}:") for name in fuzzed["counts"])
