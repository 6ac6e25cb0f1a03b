"""How people name things: splits, classes, masks, and what systems leave in folders. One table each."""

import csv
import fnmatch
import re
import unicodedata
from collections.abc import Iterable

from sdlab.errors import BadInput, printable

# Words of a name that say nothing; and that say which split, alone or joined to those ("Train_Set", "testimages").
FILLER = r"(?:data|sub)?sets?|data|images?|imgs?|pictures?|pics?|photos?|samples?|splits?|folders?|dirs?|files?|parts?"
SPLIT = re.compile(
    rf"(?:{FILLER})*(?:(?P<train>train(?:ing)?|trn)|(?P<val>val(?:id(?:at(?:e|ion))?)?|dev(?:el(?:opment)?)?)"
    rf"|(?P<test>test(?:s|ing)?|tst|eval(?:uation)?|holdout))(?:{FILLER})*"
)
# Words of files and folders that accompany images and are no images of the class.
COMPANION = (
    r"masks?|seg|segmentations?|segmented|annot|annotations?|labels?|gts?|groundtruths?|truths?|trimaps?"
    r"|thumbs?|thumbnails?|previews?"
)
# Left by systems, network disks and programs; compared without case.
SYSTEM = (".*", "@eadir", "@tmp", "@recycle", "@__thumb", "@recently-snapshot", "#recycle", "#snapshot", "__macosx",
          "__pycache__", "$recycle.bin", "system volume information", "lost+found", "network trash folder",
          "temporary items", "thumbs.db", "ehthumbs*.db", "desktop.ini", "icon\r", "~$*")  # fmt: skip


def composed(name: str) -> str:
    """In one Unicode form: disks store an accented letter as one character or as two."""
    return unicodedata.normalize("NFC", name)


def words_of(name: str) -> list[str]:
    """`Train_Set2`, `trainSet` -> train, set."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", composed(name))
    return [word.casefold() for word in re.findall(r"[^\W\d_]+", spaced)]


def split_of(name: str) -> tuple[str, tuple[str, ...]]:
    """The one split that a name holds ("" for none or several), and its other words."""
    matches = {word: SPLIT.fullmatch(word) for word in words_of(name)}
    splits = [match.lastgroup for match in matches.values() if match]
    return splits[0] if len(splits) == 1 else "", tuple(word for word, match in matches.items() if not match)


def is_filler(name: str) -> bool:
    """Whether a name is of words that say nothing, as `image_files` is."""
    words = words_of(name)
    return bool(words) and all(re.fullmatch(FILLER, word) for word in words)


def is_companion(name: str) -> bool:
    """Whether a file's or folder's name says that it holds masks, annotations or thumbnails."""
    return any(re.fullmatch(COMPANION, word) for word in words_of(name))


def plain_stems(stem: str) -> set[str]:
    """A file's name, and its parts around words of the tables above: `img_007` and `007_mask` share 007."""
    parts = re.split(rf"(?i)(?<![^\W\d_])(?:{COMPANION}|{FILLER})(?![^\W\d_])", stem)
    return {stem, *(part.strip(" _-.") for part in parts)} - {""}


def is_system(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name.casefold(), pattern) for pattern in SYSTEM)


def split_patterns(exclude: str) -> list[str]:
    """The setting `exclude`: names or patterns, separated by commas; one that holds a comma stands in double quotes."""
    rows = csv.reader([exclude], skipinitialspace=True)
    return [composed(pattern.strip().strip("/")) for row in rows for pattern in row if pattern.strip(" /")]


def matching_pattern(path: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that is, or matches, a path (relative, with `/`) or its last part."""
    path = composed(path)
    names = (path, path.rpartition("/")[2])
    return next((p for p in patterns if p in names or any(fnmatch.fnmatchcase(name, p) for name in names)), None)


def ordered(names: Iterable[str]) -> list[str]:
    """Class names in the order of their labels: as numbers if all are whole numbers, else as texts."""
    names = set(names)
    numbers = all(re.fullmatch(r"[+-]?\d+", name) for name in names)
    return sorted(names, key=lambda name: (int(name) if numbers else 0, name))


def check_twins(names: Iterable[str], where: object) -> None:
    """Raises `BadInput` for two class names that a reader could not tell apart, or that another disk would merge."""
    seen = {}
    for name in names:
        visible = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
        other = seen.setdefault(unicodedata.normalize("NFKC", visible.casefold()).strip(), name)
        if other != name:
            raise BadInput(
                f"{where} has the classes {other!a} and {name!a}, which differ only in case, surrounding space or "
                "Unicode form: rename one, or put the images of both into one."
            )


def join_names(names: Iterable[str], count: int = 5) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(printable, names[:count])) + more
