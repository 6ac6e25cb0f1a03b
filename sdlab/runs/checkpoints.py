"""Checkpoints (`class_encoder/epoch_NN`, `unet/epoch_NN`): the weights that sampling needs, with a manifest of hashes."""

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from sdlab.errors import BadInput, first_line
from sdlab.runs.files import atomic_write, is_inside, read_json, sha256_of_file, sha256_of_json, write_json

if TYPE_CHECKING:
    import torch
    from diffusers import ModelMixin, UNet2DConditionModel


def epoch_folder(folder: Path, epoch: int) -> Path:
    return folder / f"epoch_{epoch:02d}"


def checkpoint_hashes(folder: Path) -> dict[str, str]:
    """File name -> sha256, by a checkpoint's manifest. Raises `BadInput` if that is missing or names no files."""
    hashes = read_json(folder / "manifest.json", "train it first.")
    if not isinstance(hashes, dict) or not all(
        is_file_name(name) and isinstance(sha, str) for name, sha in hashes.items()
    ):
        raise BadInput(f"{folder / 'manifest.json'} is damaged: it has to name the files next to it and their hashes.")
    return hashes


def is_file_name(name: str) -> bool:
    """True if a name from a manifest is that of a file in the manifest's own folder."""
    return is_inside(name) and PurePosixPath(name).name == name


def checkpoint_sha(folder: Path, epoch: int) -> str:
    """One hash for the weights and config of an epoch: the identity of what a synthetic set is made from."""
    return sha256_of_json(checkpoint_hashes(epoch_folder(folder, epoch)))


def save_checkpoint(model: "ModelMixin", folder: Path) -> None:
    """Save in diffusers' folder format: a Class-Encoder as its table of conditions, a UNet in half precision.

    Sampling needs no more, and a run has many checkpoints; the full weights are in the resume state. A checkpoint that
    exists is kept. Raises `BadInput` if it exists and is damaged: it is neither overwritten nor trusted.
    """
    if folder.exists():
        if not is_intact(folder):
            raise BadInput(f"{folder} is damaged: move the folder {folder.parent} away and run its stage again.")
        return
    saved = model.tabulated() if hasattr(model, "tabulated") else half_precision_copy(model)
    with atomic_write(folder) as temporary:
        saved.save_pretrained(temporary, safe_serialization=True)
        files = {file.name: sha256_of_file(file) for file in sorted(temporary.iterdir())}
        write_json(temporary / "manifest.json", files)


def half_precision_copy(unet: "UNet2DConditionModel") -> "UNet2DConditionModel":
    """A float16 copy, without a second float32 one in memory. Raises `BadInput` if a weight exceeds float16's range."""
    import torch

    # The path of its base model differs between machines, and so would the config's bytes.
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
    """Names the first file of a checkpoint that is missing or altered; empty if there is none."""
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
    device: "torch.device | str" = "cpu",
    dtype: "torch.dtype | None" = None,
) -> "ModelMixin":
    """The frozen model of one epoch, in `dtype` (float32 by default). Raises `BadInput` for a missing or damaged one."""
    import torch

    path = epoch_folder(folder, epoch)
    if not (path / "manifest.json").is_file():
        epochs = sorted(int(p.name[6:]) for p in folder.glob("epoch_*"))
        has = f"epochs {epochs[0]} to {epochs[-1]}" if epochs else "no checkpoint"
        raise BadInput(f"There is no checkpoint of epoch {epoch} in {folder}, which has {has}.")
    if damage := find_damage(path):
        raise BadInput(f"The checkpoint {path} is damaged: {damage}. Move {folder} away and run its stage again.")
    try:
        model = kind.from_pretrained(
            path, local_files_only=True, use_safetensors=True, torch_dtype=dtype or torch.float32
        )
    except Exception as error:
        raise BadInput(f"The checkpoint {path} cannot be loaded: {first_line(error)}") from None
    return model.to(device).requires_grad_(False).eval()
