"""TODO runs.checkpoints."""

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import torch

from sdlab.errors import BadInput, first_line
from sdlab.runs.files import atomic_write, is_inside, read_json, sha256_of_file, sha256_of_json, write_json

if TYPE_CHECKING:
    from diffusers import ModelMixin, UNet2DConditionModel


def checkpoint_hashes(folder: Path) -> dict[str, str]:
    """The files of a checkpoint, name -> sha256, by its manifest. Raises `BadInput` if that is missing or names no files."""
    hashes = read_json(folder / "manifest.json", "train it first.")
    if not isinstance(hashes, dict) or not all(
        is_file_name(name) and isinstance(sha, str) for name, sha in hashes.items()
    ):
        raise BadInput(f"{folder / 'manifest.json'} is damaged: it has to name the files beside it and their hashes.")
    return hashes


def is_file_name(name: str) -> bool:
    """Whether a name that a file gives is that of a file beside it."""
    return is_inside(name) and PurePosixPath(name).name == name


def checkpoint_sha(folder: Path, epoch: int) -> str:
    """One hash for the weights and config of `folder/epoch_NN`: what a generated set is made from."""
    return sha256_of_json(checkpoint_hashes(folder / f"epoch_{epoch:02d}"))


def epoch_folder(folder: Path, epoch: int) -> Path:
    return folder / f"epoch_{epoch:02d}"


def save_checkpoint(model: "ModelMixin", folder: Path) -> None:
    """What later steps need of a model, in diffusers' folder format, with a manifest of its files' hashes.

    A Class-Encoder is kept as its table, a UNet in half precision: sampling needs no more, and a run has many of
    them. The full weights are in the resume state. A checkpoint that is there stays.

    Raises `BadInput` if it is there and damaged: it is not written over, and not taken for good.
    """
    if folder.exists():
        if not is_intact(folder):
            raise BadInput(f"{folder} is damaged: move the folder {folder.parent} away and run its step again.")
        return
    kept = model.tabulated() if hasattr(model, "tabulated") else half_precision_copy(model)
    with atomic_write(folder) as beside:
        kept.save_pretrained(beside, safe_serialization=True)
        files = {file.name: sha256_of_file(file) for file in sorted(beside.iterdir())}
        write_json(beside / "manifest.json", files)


def half_precision_copy(unet: "UNet2DConditionModel") -> "UNet2DConditionModel":
    """A copy in float16, without a second one in float32. Raises `BadInput` if a weight is beyond its range."""
    # Where its base lay is this machine's, and would give other bytes elsewhere.
    config = {name: value for name, value in unet.config.items() if name != "_name_or_path"}
    with torch.device("meta"):
        copy = type(unet).from_config(config)
    weights = {name: value.half() for name, value in unet.state_dict().items()}
    if beyond := [name for name, value in weights.items() if not torch.isfinite(value).all()]:
        raise BadInput(f"The UNet's weights {beyond[0]} are beyond the range of float16: try a smaller learning rate.")
    copy.load_state_dict(weights, assign=True)
    return copy


def is_intact(folder: Path) -> bool:
    return (folder / "manifest.json").is_file() and not find_damage(folder)


def find_damage(folder: Path) -> str:
    """The first file of a checkpoint that is not as it was written, in words; empty if all are."""
    for name, sha in checkpoint_hashes(folder).items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256_of_file(folder / name) != sha:
            return f"{name} is truncated or altered"
    return ""


def load_checkpoint(
    kind: "type[ModelMixin]",
    folder: Path,
    epoch: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> "ModelMixin":
    """The model of one epoch, its files' hashes checked. Raises `BadInput`: weights are never made up."""
    path = epoch_folder(folder, epoch)
    if not (path / "manifest.json").is_file():
        found = sorted(int(p.name[6:]) for p in folder.glob("epoch_*"))
        has = f"epochs {found[0]} to {found[-1]}" if found else "no checkpoint"
        raise BadInput(f"There is no checkpoint of epoch {epoch} in {folder}, which has {has}.")
    broken = find_damage(path)
    if broken:
        raise BadInput(f"The checkpoint {path} is damaged: {broken}. Move {folder} away and run its step again.")
    try:
        model = kind.from_pretrained(path, local_files_only=True, use_safetensors=True, torch_dtype=dtype)
    except Exception as error:
        raise BadInput(f"The checkpoint {path} cannot be loaded: {first_line(error)}") from None
    return model.to(device).requires_grad_(False).eval()
