"""Parameter files and notebook cells -> names and values, and the checks of a single value. Reads hostile YAML safely."""

import ast
import dataclasses
import math
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sdlab.errors import UNPRINTABLE, BadInput, brief, did_you_mean
from sdlab.paths import PARAMS, is_file, project_path

LONGEST_TEXT, LONGEST_NAME = 1000, 100  # characters
LARGEST_NUMBER = 2**31 - 1  # of whole numbers, where a setting has no other limit
LARGEST_FILE = 100_000  # bytes of a parameter file, which has a few dozen lines
FORM = "it holds lines of the form `name: value`"


class ParameterLoader(yaml.SafeLoader):
    """Refuses aliases, which a few lines can nest until they fill the memory, and a name that is given twice."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise RefusedYAML(problem="aliases, such as *name, are not read", problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise RefusedYAML(problem=f"{brief(key.value)} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class RefusedYAML(yaml.MarkedYAMLError):
    """Valid YAML that is not allowed in a parameter file."""


def from_yaml(text: str) -> Any:
    """The value of a YAML text. Raises `yaml.YAMLError` and nothing else."""
    try:
        return yaml.load(text, Loader=ParameterLoader)
    except yaml.YAMLError:
        raise
    except Exception as error:  # constructors raise whatever they like: a 30th of February, endless brackets
        raise yaml.YAMLError(type(error).__name__) from None


def read_parameters(path: str | Path) -> dict[str, Any]:
    """The names and values of a YAML file; only its form is checked. Raises `BadInput`."""
    try:
        if (size := Path(path).stat().st_size) > LARGEST_FILE:
            raise BadInput(f"The parameter file {path} has {size:,} bytes: {FORM}, {LARGEST_FILE:,} bytes at most.")
        given = from_yaml(Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise BadInput(f"The parameter file {path} is no UTF-8 text: save it as UTF-8; {FORM}.") from None
    except OSError as error:
        raise BadInput(f"The parameter file {path} cannot be read ({error.strerror}): give a readable one.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        why = f" ({error.problem})" if isinstance(error, RefusedYAML) else ""
        raise BadInput(f"The parameter file {path} is not valid YAML{line}{why}: {FORM}.") from None
    if not isinstance(given, dict):
        raise BadInput(f"The parameter file {path} holds no settings: it needs lines of the form `name: value`.")
    return given


def notebook_parameters(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Names and values that a notebook's parameter cells assigned.

    In a notebook, `In` holds the source of every cell that ran. Parameters are the assignments of the last run of the
    parameters cell (it assigns `experiment`) and of papermill's injected cell, however much the notebook has computed
    since. Elsewhere they are the plain values of the namespace.
    """
    cells = namespace.get("In")
    if cells is None:
        ignored = (types.ModuleType, types.FunctionType, type)
        return {k: v for k, v in namespace.items() if not k.startswith("_") and not isinstance(v, ignored)}
    edited, injected = [], []
    for source in cells:
        assigned = assigned_names(source)
        if source.startswith("# Parameters\n"):
            injected = assigned
            if "experiment" not in assigned:
                raise BadInput(
                    "The injected parameters name no `experiment`: a parameter file begins with `experiment: <name>` "
                    "(with papermill -p, add `-p experiment <name>`)."
                )
        elif "experiment" in assigned:
            edited = assigned
    return {name: namespace[name] for name in dict.fromkeys([*edited, *injected]) if name in namespace}


def assigned_names(source: str) -> list[str]:
    """Names that a cell assigns if it contains nothing but assignments of plain values, else none."""
    try:
        statements = ast.parse(source).body
    except SyntaxError:
        return []
    names = []
    for statement in statements:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target = statement.targets[0]
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            target = statement.target
        else:
            return []
        try:
            ast.literal_eval(statement.value)
        except ValueError:
            return []
        if not isinstance(target, ast.Name):
            return []
        names.append(target.id)
    return names


def known_experiments() -> list[str]:
    return sorted(path.stem for path in PARAMS.glob("*.yaml"))


def parameter_file(name_or_path: str) -> Path:
    """`digits` or `path/to/file.yaml` -> the file. Raises `BadInput`."""
    for path in (PARAMS / f"{name_or_path}.yaml", Path(name_or_path)):
        if is_file(path):
            return path
    known = known_experiments()
    name = name_or_path if name_or_path.isprintable() and len(name_or_path) < 200 else brief(name_or_path)
    raise BadInput(
        f"There is no parameter file for `{name}`: give the path of one, or a name in params/, which has "
        f"{', '.join(known)}.{did_you_mean(name_or_path, known)}"
    )


# -------------------------------------------------------------------------------------------------- one value


def check_value(f: dataclasses.Field, value: Any) -> Any:
    """One value, of the field's type and within its range. Raises `BadInput`."""
    text, low, high, choices = (f.metadata[name] for name in ("text", "low", "high", "choices"))
    value = check_type(f, value)
    if choices and value not in choices:
        allowed = ", ".join(map(repr, choices))
        raise BadInput(f"`{f.name}` is {brief(value)}: allowed are {allowed}.{did_you_mean(value, choices)}")
    if f.type not in (int, float):
        return value
    most = high if high is not None else LARGEST_NUMBER if f.type is int else math.inf
    if (low is not None and value < low) or value > most:
        allowed = f"at least {low}" if high is None and value <= most else f"{low} to {most}"
        raise BadInput(f"`{f.name}` is {brief(value)}: allowed is {allowed} ({text}).")
    return value


def check_type(f: dataclasses.Field, value: Any) -> Any:
    """The value as the field's type; a whole number may stand for a float. Raises `BadInput`."""
    text = f.metadata["text"]
    allowed = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[f.type]
    right = isinstance(value, f.type) or (f.type is float and isinstance(value, int))
    if not right or isinstance(value, bool) != (f.type is bool):
        hint = ""
        if f.type in (int, float) and isinstance(value, str) and is_number(value):
            number = int(float(value)) if f.type is int else float(value)
            hint = f" Write {brief(number)} without quotes; YAML reads an exponent only after a point, such as 1.0e-4."
        raise BadInput(
            f"`{f.name}` is {brief(value)} ({type(value).__name__}), but it has to be {allowed} ({text}).{hint}"
        )
    if f.type is float:
        try:
            value = float(value)
        except OverflowError:  # a whole number of hundreds of digits
            value = math.inf
        if not math.isfinite(value):
            raise BadInput(f"`{f.name}` is {value}, but it has to be finite ({text}).")
    if f.type is str:
        if odd := UNPRINTABLE.search(value):
            raise BadInput(
                f"`{f.name}` is {brief(value)}, which holds the character {odd[0]!a}: give one printable line."
            )
        if len(value) > LONGEST_TEXT:
            raise BadInput(
                f"`{f.name}` has {len(value)} characters ({brief(value)}): at most {LONGEST_TEXT} are allowed."
            )
    return value


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def check_places(s: Any) -> None:
    """Raises `BadInput` for an experiment's name or a path that no file system can have."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", s.experiment):
        raise BadInput(f"`experiment` is {s.experiment!r}: it names a folder; use letters, digits, and . _ - only.")
    if len(s.experiment) > LONGEST_NAME:
        raise BadInput(
            f"`experiment` has {len(s.experiment)} characters ({brief(s.experiment)}): it names folders, at most "
            f"{LONGEST_NAME} are allowed."
        )
    for name in ("dataset", "base_model", "data_root", "runs_root", "reports_root"):
        text, below = getattr(s, name), s.experiment if name in ("runs_root", "reports_root") else ""
        try:
            path = project_path(text) / below
            existing = next(p for p in (path, *path.parents) if p.is_symlink() or p.exists())
            is_folder = existing.is_dir()
        except PermissionError:  # of another user, or on another machine: whoever opens it reports it
            continue
        except (OSError, RuntimeError) as error:  # too long, a ring of links, the home folder of nobody
            why = getattr(error, "strerror", None) or error
            raise BadInput(
                f"`{name}` is {brief(text)}, which cannot be a path here ({why}): give another one."
            ) from None
        if below and not is_folder:
            raise BadInput(
                f"`{name}` is {brief(text)}, but {existing} is not a folder: move it away, or give another `{name}`."
            )
