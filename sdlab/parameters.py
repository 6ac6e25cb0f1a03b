"""TODO parameters."""

import ast
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sdlab.errors import BadInput, brief

LARGEST_FILE = 100_000  # bytes of a parameter file, whose lines are a few dozen


class Flat(yaml.SafeLoader):
    """Without aliases, which a few lines can nest until they fill the memory, and without a name's silent second value."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise Unused(problem="aliases, as *name, are not read", problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise Unused(problem=f"{brief(key.value)} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class Unused(yaml.MarkedYAMLError):
    """YAML that a parameter file has no use for."""


def from_yaml(text: str) -> Any:
    """What a YAML text holds. Raises `yaml.YAMLError`, and that alone, for whatever is none."""
    try:
        return yaml.load(text, Loader=Flat)
    except yaml.YAMLError:
        raise
    except Exception as error:  # of a 30th of February, of brackets without end: whatever its constructors raise
        raise yaml.YAMLError(type(error).__name__) from None


def read_parameters(path: str | Path) -> dict[str, Any]:
    """The names and values of a YAML file, unchecked but for its form. Raises `BadInput`."""
    form = "it holds lines of the form `name: value`"
    try:
        if (size := Path(path).stat().st_size) > LARGEST_FILE:
            raise BadInput(f"The parameter file {path} has {size:,} bytes: {form}, {LARGEST_FILE:,} bytes at most.")
        given = from_yaml(Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise BadInput(f"The parameter file {path} is no UTF-8 text: save it as such; {form}.") from None
    except OSError as error:
        raise BadInput(f"The parameter file {path} cannot be read ({error.strerror}): give one that can.") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        why = f" ({error.problem})" if isinstance(error, Unused) else ""
        raise BadInput(f"The parameter file {path} is not valid YAML{line}{why}: {form}.") from None
    if not isinstance(given, dict):
        raise BadInput(f"The parameter file {path} holds no settings: it needs lines of the form `name: value`.")
    return given


def notebook_parameters(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Names and values that a notebook's parameter cells assigned.

    In a notebook, `In` holds the source of every cell that ran: parameters are what the parameters cell (it assigns
    `experiment`) and papermill's injected one assigned when they were last run, however much the notebook has computed
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
        elif "experiment" in assigned:  # the parameters cell, as it was run last
            edited = assigned
    return {name: namespace[name] for name in dict.fromkeys([*edited, *injected]) if name in namespace}


def assigned_names(source: str) -> list[str]:
    """Names that a cell assigns, if it does nothing but assign plain values; else none."""
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
