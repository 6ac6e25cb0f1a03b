"""What a folder of images means: which subfolders are splits, which are classes, and which files are left out."""

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sdlab.data import naming
from sdlab.data.images import Entry
from sdlab.data.pictures import FORMATS, supported_formats
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
        others += [file for file in files if not is_image(file)] or ([] if files else [f"{path}/ (is empty)"])
        if files and not images:
            lost = lost or lost_class(folder, name, len(files), f"{files[0]} is none of {', '.join(FORMATS)}")
        companions |= find_companions(path, images)
        entries += [Entry(file, name, split) for file in images if file not in companions]
    inside = {*companions, *(entry.file for entry in entries)}
    loose = [file for file in tree.files_below("") if is_image(file) and file not in inside]
    if not entries:
        count = len(tree.files_below(""))
        raise BadInput(
            f"{folder} has {len(loose)} images without a class: {LAYOUT} (if it is a class itself, its parent folder)."
            if loose
            else f"{folder} has {count} files, none of them an image that is read ({', '.join(FORMATS)}): {LAYOUT}."
        )
    if lost:
        raise lost
    if len({entry.class_name for entry in entries}) == 1 and not entries[0].split:
        suggest_subfolder(tree, entries[0].file.partition("/")[0])
    others = [f"{file} (in no class)" for file in loose] + others
    kinds = tree.left_out | {
        "masks, annotations or thumbnails were left out, named like images next to them": sorted(companions),
        "files or folders give no image": others,
    }
    remarks += [f"{len(paths)} {why}: {naming.join_names(paths)}." for why, paths in kinds.items() if paths]
    return Listing(folder, tuple(entries), tree.dead, tuple(remarks))


def is_image(file: str) -> bool:
    return PurePosixPath(file).suffix.lower() in supported_formats()[1]


def lost_class(folder: Path, name: str, count: int, why: str) -> BadInput:
    """The refusal of a class of which nothing can be read: the study would go on with fewer classes."""
    return BadInput(
        f"The class `{name}` of {folder} has {count} files and no image that can be read ({printable(why)[-200:]}): "
        f"convert or repair them, or leave the class out by the setting `exclude: {name}`."
    )


def find_companions(path: str, images: Sequence[str]) -> set[str]:
    """Of a class folder's images: masks and the like, which their folder's or their own name and that of an image tell."""
    below = {file: PurePosixPath(file[len(path) + 1 :]) for file in images}
    named = {file for file, inner in below.items() if any(map(naming.is_companion, (*inner.parts[:-1], inner.stem)))}
    stems = {stem for file in below.keys() - named for stem in naming.plain_stems(below[file].stem)}
    return {file for file in named if stems & naming.plain_stems(below[file].stem)}


# ---------------------------------------------------------------------------------------------- what is there


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

    def has_images(self, path: str, below: bool = False) -> bool:
        """Whether there are images in this folder, or in any folder below it too."""
        return any(map(is_image, self.files_below(path) if below else self.files[path]))


def read_tree(root: Path, patterns: Sequence[str]) -> Tree:
    """Follows links. Raises `BadInput` for a ring of links, an unreadable folder, and a pattern that matches nothing."""

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
        raise BadInput(f"{folder} is a link to a folder that holds it: remove it; {LAYOUT}.")


# ----------------------------------------------------------------------------------------------- what it means


def find_classes(tree: Tree, remarks: list[str]) -> list[tuple[str, str, str]]:
    """Each class folder's path, class and split ("" where none is given); `remarks` grows by what is ambiguous.

    Raises `BadInput` for subfolders that are neither clearly classes nor clearly splits.
    """
    levels = find_splits(tree, remarks)
    for level in {"": "", **levels}:
        check_subfolders(tree, level)
    classes = [(path, class_name(path), split) for level, split in levels.items() for path in tree.folders[level]]
    naming.check_twins({name for _, name, _ in classes}, tree.root)
    with_splits = {path: plain_splits(tree.folders[path]) for path, _, _ in classes}
    if levels == {"": ""} and all(with_splits.values()) and not any(map(tree.has_images, with_splits)):
        for splits in with_splits.values():
            check_once(tree, splits)
        return [(inner, name, split) for path, name, _ in classes for inner, split in with_splits[path].items()]
    for level in levels:
        check_classes(tree, tree.folders[level])
    return classes


def class_name(path: str) -> str:
    return naming.composed(path.rpartition("/")[2])


def plain_splits(paths: Sequence[str]) -> dict[str, str]:
    """Path -> split, if all of these folders have a split's name and no other word in it; else nothing."""
    splits = {path: naming.split_of(class_name(path)) for path in paths}
    plain = all(split and all(map(naming.is_filler, rest)) for split, rest in splits.values())
    return {path: split for path, (split, _) in splits.items()} if plain else {}


def find_splits(tree: Tree, remarks: list[str]) -> dict[str, str]:
    """The folders whose subfolders are the classes, and their splits: {"": ""} if there are no splits."""
    top, alike = tree.folders[""], defaultdict(dict)  # other words in a name ("asl" of asl_train) -> path -> split
    for path in top:
        split, rest = naming.split_of(path)
        if split:
            alike[tuple(word for word in rest if not naming.is_filler(word))][path] = split
    levels = alike[()] or next((splits for splits in alike.values() if len(splits) > 1), {})
    if not levels:
        return {"": ""}
    if others := [path for path in top if path not in levels]:
        (first, *more) = levels
        if not more and naming.words_of(first) == ["train"] and tree.has_images(first) and not tree.folders[first]:
            remarks.append(
                f"{first}/ is read as a class, as {naming.join_names(others)} next to it are, not as a split."
            )
            return {"": ""}
        raise BadInput(
            f"{tree.root} has {naming.join_names(levels)}, read as splits, and {naming.join_names(others)} next to them, "
            f"which is neither train, val nor test: move or rename what does not belong, or leave it out by `exclude`; {LAYOUT}."
        )
    check_once(tree, levels)

    def wrapped(path: str, split: str) -> bool:  # seg_train/seg_train/..., train/images/...
        inner = [class_name(inner) for inner in tree.folders[path]]
        same = len(inner) == 1 and (naming.is_filler(inner[0]) or naming.split_of(inner[0])[0] == split)
        return same and not tree.has_images(path) and not tree.has_images(tree.folders[path][0])

    while all(wrapped(path, split) for path, split in levels.items()):
        levels = {tree.folders[path][0]: split for path, split in levels.items()}
    return levels


def check_once(tree: Tree, levels: dict[str, str]) -> None:
    """Raises `BadInput` for two folders of one split."""
    for split, count in Counter(levels.values()).items():
        if count > 1:
            same = [path for path in levels if levels[path] == split]
            raise BadInput(
                f"{tree.root} has {' and '.join(map(ascii, same))}, which name the same split ({split}): put their "
                "images into one, or leave one out by `exclude`."
            )


def check_subfolders(tree: Tree, level: str) -> None:
    """Raises `BadInput` for subfolders whose names cannot be shown or told apart, and for a link to one that is gone."""
    folder, inner = tree.root / level, [path.rpartition("/")[2] for path in tree.folders[level]]
    for name in inner:
        if printable(name) != name:
            raise BadInput(f"{folder} has the subfolder {printable(name)!r}: rename it, in printable UTF-8.")
    naming.check_twins(inner, folder)
    for path in tree.files[level]:
        if path in tree.dead and not is_image(path):
            raise BadInput(
                f"{tree.root / path} is {tree.dead[path]}, where a class is expected: make its target available, remove "
                f"it, or leave it out by the setting `exclude: {path}`."
            )


def check_classes(tree: Tree, paths: Sequence[str]) -> None:
    """Raises `BadInput` for folders that hold splits, sets or kinds of files rather than classes."""

    def is_kind(path: str) -> bool:
        return naming.is_filler(class_name(path)) or naming.is_companion(class_name(path))

    if len(paths) > 1 and all(map(is_kind, paths)):
        raise BadInput(
            f"{tree.root} has {naming.join_names(paths)}, which are kinds of files and no classes: {LAYOUT}."
        )
    paths = [path for path in paths if tree.has_images(path, below=True)]
    inner = [{class_name(i).casefold() for i in tree.folders[path] if not is_kind(i)} for path in paths]
    if len(paths) > 1 and all(inner) and not any(map(tree.has_images, paths)):
        shared = set.intersection(*inner)
        if len(shared) > 1 or all(names == shared for names in inner):
            raise BadInput(
                f"{tree.root} has {naming.join_names(paths)}, which hold the same subfolders ({naming.join_names(sorted(shared))}) "
                "and no images: if they are splits, name them train, val and test; if they are classes, put their images "
                "into them directly."
            )


def suggest_subfolder(tree: Tree, path: str) -> None:
    """Raises `BadInput`, for a folder of one class, if the classes seem to be further down."""
    while len(tree.folders[path]) == 1 and not tree.has_images(path):
        path = tree.folders[path][0]
    inner = [class_name(below) for below in tree.folders[path] if tree.has_images(below, below=True)]
    if len(inner) > 1 and not tree.has_images(path):
        raise BadInput(
            f"{tree.root} has one class only; if {naming.join_names(inner)} are the classes, give {tree.root / path} as `dataset`."
        )
