"""Paths of settings: relative ones start at the project's root, never at the working directory."""

from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[1]
PARAMS = PROJECT_ROOT / "params"


def project_path(text: str | Path) -> Path:
    """A setting's path: absolute, or relative to the project; `~` is the home folder."""
    return PROJECT_ROOT / Path(text).expanduser()


def relative_to_project(path: Path) -> str:
    """A path for a reader: relative to the project if it is inside."""
    return str(path.relative_to(PROJECT_ROOT)) if path.is_relative_to(PROJECT_ROOT) else str(path)


def is_file(path: Path) -> bool:
    """`Path.is_file`; False for a name that is too long for any file."""
    try:
        return path.is_file()
    except OSError:
        return False
