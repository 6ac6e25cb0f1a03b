"""What a folder of images means: which subfolders are splits, which are classes, and which files are left out."""

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sdlab.data import naming
from sdlab.data.image_decoding import FORMATS, supported_formats
from sdlab.data.images import Entry
from sdlab.errors import BadInput, printable
from sdlab.runs.files import raise_on_read_error, sha256_of_json

LAYOUT = "give a folder with one subfolder per class, or with such subfolders inside train/, val/ and test/"
MOST_VISITS = 100  # of one linked folder: links to folders of links could multiply without end


@dataclass(frozen=True)
class Listing:
    """The image files of a folder, each with its class, and its split ("" where the folder has none)."""

    folder: Path
    entries: tuple[Entry, ...]
    dead: dict[str, str]  # files that cannot be opened, and why
    remarks: tuple[str, ...]

    def origin(self, *settings: object) -> str:
        """Changes whenever a file is added, removed or written, or a setting that the images depend on."""
        with raise_on_read_error(self.folder):
            stats = [(self.folder / e.file).stat() for e in self.entries if e.file not in self.dead]
        return sha256_of_json([self.entries, self.remarks, [(s.st_size, s.st_mtime_ns) for s in stats], *settings])


def list_folder(folder: Path, exclude: str = "") -> Listing:
    """The labelled images of a folder. Raises `BadInput` where it is no set of labelled images."""
    tree = read_tree(folder, naming.split_patterns(exclude))
    entries, companions, others, lost, remarks = [], set(), [], None, []
    for path, name, split in find_classes(tree, remarks):
        files = tree.files_below(path)
        images = [file for file in files if is_image(file)]
        others += [file for file in files if not is_image(file)] if files else [f"{path}/ (is empty)"]
        if files and not images:
            lost = lost or lost_class(folder, name, len(files), f"{files[0]} is none of {', '.join(FORMATS)}")
        companions |= find_companions(path, images)
        entries += [Entry(file, name, split) for file in images if file not in companions]
    in_classes = {*companions, *(entry.file for entry in entries)}
    loose = [file for file in tree.files_below("") if is_image(file) and file not in in_classes]
    if not entries:
        found = f"{len(tree.files_below(''))} files, none of them an image that is read ({', '.join(FORMATS)})"
        found = f"{len(loose)} images in no class (if they are one, give its parent folder)" if loose else found
        raise BadInput(f"{folder} has {found}: {LAYOUT}.")
    if lost:
        raise lost
    if len({entry.class_name for entry in entries}) == 1:
        suggest_subfolder(tree)
    left_out = tree.left_out | {
        "masks, annotations or thumbnails were left out, named like images next to them": sorted(companions),
        "files or folders give no image": [f"{file} (in no class)" for file in loose]
        + [f"{file} ({tree.dead[file]})" if file in tree.dead else file for file in others],
    }
    remarks += [f"{len(paths)} {why}: {naming.join_names(paths)}." for why, paths in left_out.items() if paths]
    return Listing(folder, tuple(entries), tree.dead, tuple(remarks))


def is_image(file: str) -> bool:
    return PurePosixPath(file).suffix.lower() in supported_formats()[1]


def lost_class(folder: Path, name: str, count: int, why: str) -> BadInput:
    """The refusal of a class of which nothing can be read: the study would go on with fewer classes."""
    return BadInput(
        f"The class `{name}` of {folder} has {count} files and no image that can be read ({printable(why)[-200:]}): "
        f"convert, repair or restore them, or leave the class out by the setting `exclude: {name}`."
    )


def find_companions(path: str, images: Sequence[str]) -> set[str]:
    """Of a class folder's images: those that are masks or thumbnails of others, by their own or their folder's name."""
    below = {file: PurePosixPath(file[len(path) + 1 :]) for file in images}
    named = {file for file, inner in below.items() if any(map(naming.is_companion, (*inner.parts[:-1], inner.stem)))}
    stems = {stem for file in below.keys() - named for stem in naming.plain_stems(below[file].stem)}
    return {file for file in named if stems & naming.plain_stems(below[file].stem)}


# ---------------------------------------------------------------------------------------------- reading the tree


@dataclass(frozen=True)
class Tree:
    """All below a folder but what systems left and `exclude` names. Paths are relative to it; its own is ""."""

    root: Path
    folders: dict[str, list[str]]  # of each folder: the paths of its folders
    files: dict[str, list[str]]  # of each folder: the paths of its files
    dead: dict[str, str]  # files that cannot be opened, and why
    left_out: dict[str, list[str]]  # why -> paths

    def files_below(self, path: str) -> list[str]:
        files, folders = [], [path]
        for folder in folders:  # grows
            files += self.files[folder]
            folders += self.folders[folder]
        return sorted(files, key=lambda file: file.split("/"))

    def has_images(self, path: str) -> bool:
        """Whether there are images in this very folder."""
        return any(map(is_image, self.files[path]))


def read_tree(root: Path, patterns: Sequence[str]) -> Tree:
    """Follows links. Raises `BadInput` for a ring of links, an unreadable folder, a pattern that matches nothing."""

    def stop(error: OSError) -> None:
        raise error

    tree, unused, visits = Tree(root, {}, {}, {}, defaultdict(list)), set(patterns), Counter()
    with raise_on_read_error(root):
        for here, folders, files in os.walk(root, onerror=stop, followlinks=True):
            above = Path(here).relative_to(root).as_posix().removeprefix(".")
            tree.folders[above], tree.files[above], is_folder = [], [], set(folders)
            folders.clear()
            for name in sorted((*is_folder, *files)):
                path, full = f"{above}/{name}".lstrip("/"), Path(here, name)
                if pattern := naming.matching_pattern(path, patterns):
                    unused.discard(pattern)
                    tree.left_out["files or folders were left out by `exclude`"].append(path)
                elif naming.is_system(name):
                    tree.left_out["hidden or system files or folders were left out"].append(path)
                elif name in is_folder:
                    check_link(root, full, visits)
                    tree.folders[above].append(path)
                    folders.append(name)
                else:
                    tree.files[above].append(path)
                    if not full.is_file():
                        tree.dead[path] = "a link that leads nowhere" if full.is_symlink() else "a pipe or device"
    if unused:
        raise BadInput(f"`exclude` names {min(unused)!r}, which matches nothing in {root}: correct or remove it.")
    return tree


def check_link(root: Path, folder: Path, visits: Counter) -> None:
    """Raises `BadInput` for a link to a folder that would be read without end."""
    if not folder.is_symlink():
        return
    target = folder.resolve()
    visits[target] += 1
    above = [folder.parent, *folder.parent.parents]
    above = [path.resolve() for path in above[: above.index(root) + 1]]
    if visits[target] > MOST_VISITS or any(path.is_relative_to(target) for path in above):
        raise BadInput(f"{folder} is a link to a folder that holds it, or that is linked over and over: remove it.")


# ----------------------------------------------------------------------------------------------- what it means


def find_classes(tree: Tree, remarks: list[str]) -> list[tuple[str, str, str]]:
    """Each class folder's path, class and split ("" where none is given); `remarks` grows by what is ambiguous.

    Raises `BadInput` for subfolders that are neither clearly classes nor clearly splits.
    """
    levels = find_splits(tree, remarks)
    for level in {"": "", **levels}:
        inner = [path.rpartition("/")[2] for path in tree.folders[level]]
        if odd := [name for name in inner if printable(name) != name]:
            raise BadInput(
                f"{tree.root / level} has the subfolder {printable(odd[0])!r}: rename it, in printable UTF-8."
            )
        naming.check_twins(inner, tree.root / level)
        if dead := [path for path in tree.files[level] if path in tree.dead and not is_image(path)]:
            raise BadInput(
                f"{tree.root / dead[0]} is {tree.dead[dead[0]]}, where a class is expected: make its target available, "
                f"or leave it out by the setting `exclude: {dead[0]}`."
            )
    for level in levels:
        check_classes(tree, tree.folders[level])
    classes = [(path, class_name(path), split) for level, split in levels.items() for path in tree.folders[level]]
    naming.check_twins({name for _, name, _ in classes}, tree.root)
    return classes


def class_name(path: str) -> str:
    return naming.composed(path.rpartition("/")[2])


def find_splits(tree: Tree, remarks: list[str]) -> dict[str, str]:
    """The folders whose subfolders are the classes, and their splits: {"": ""} if there are no splits."""
    top, alike = tree.folders[""], defaultdict(dict)  # other words in a name ("asl" of asl_train) -> path -> split
    for path in top:
        split, rest = naming.split_of(path)
        if split:
            alike[tuple(word for word in rest if not naming.is_filler(word))][path] = split
    levels = alike[()] or next((splits for splits in alike.values() if len(splits) > 1), {})
    others = [path for path in top if path not in levels]
    if levels and others:
        (first, *more), names = levels, naming.join_names(others)
        if more or naming.words_of(first) != ["train"] or tree.folders[first]:
            raise BadInput(
                f"{tree.root} has {naming.join_names(levels)}, read as splits, and next to them {names}, which names no "
                f"split: rename what is misunderstood, or leave out what does not belong (`exclude: {others[0]}`)."
            )
        remarks.append(f"{first}/ is read as a class, as {names} next to it are, not as a split.")
        levels = {}
    if len(set(levels.values())) < len(levels):
        raise BadInput(
            f"{tree.root} has {naming.join_names(levels)}, of which two name the same split: put their images into one, "
            "or leave one out by `exclude`."
        )

    def is_wrapper(path: str, split: str) -> bool:  # seg_train/seg_train/..., train/images/...
        inner = tree.folders[path]
        named = len(inner) == 1 and (
            naming.is_filler(class_name(inner[0])) or naming.split_of(class_name(inner[0]))[0] == split
        )
        return named and not tree.has_images(path) and bool(tree.folders[inner[0]])

    while levels and all(is_wrapper(path, split) for path, split in levels.items()):
        levels = {tree.folders[path][0]: split for path, split in levels.items()}
    return levels or {"": ""}


def check_classes(tree: Tree, paths: Sequence[str]) -> None:
    """Raises `BadInput` for folders that hold the same subfolders and no images: splits or parts, but no classes."""
    paths = [path for path in paths if any(map(is_image, tree.files_below(path)))]
    kinds = (naming.is_filler, naming.is_companion)  # cat/images, cat/masks
    inner = [{n.casefold() for n in map(class_name, tree.folders[p]) if not any(k(n) for k in kinds)} for p in paths]
    if len(paths) < 2 or not all(inner) or any(map(tree.has_images, paths)):
        return
    shared = set.intersection(*inner)
    if len(shared) > 1 or any(naming.split_of(name)[0] for name in shared):
        raise BadInput(
            f"{tree.root} has {naming.join_names(paths)}, which hold no images but the same subfolders "
            f"({naming.join_names(sorted(shared))}): splits have to be named train, val and test, outside the classes; "
            "a class has its images in it directly, or in subfolders of its own."
        )


def suggest_subfolder(tree: Tree) -> None:
    """Raises `BadInput`, for a folder of one class, if the classes or splits seem to be further down."""
    path, inner = "", [""]
    while len(inner) == 1:
        (path,) = inner
        inner = [below for below in tree.folders[path] if any(map(is_image, tree.files_below(below)))]
    if path and inner and not tree.has_images(path):
        names = naming.join_names(map(class_name, inner))
        raise BadInput(
            f"{tree.root} has one class only; if its classes or splits are {names}, give {tree.root / path} as `dataset`."
        )
