"""Resume states (`resume.safetensors`): full-precision weights, Adam's moments, and the position of a training."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import safe_open

from sdlab.errors import BadInput, first_line
from sdlab.runs.files import atomic_write, check_fields, check_free_space, raise_on_read_error, read_json

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TrainingPosition:
    """Where a training is: after `epochs` whole epochs and `steps` training steps of the next."""

    epochs: int = 0
    steps: int = 0
    generator: "torch.Tensor | None" = None  # its state, uint8, if steps > 0
    losses: "list[torch.Tensor]" = field(default_factory=list)  # of those steps, scalars
    seconds: float = 0.0  # measured for them


def load_history(folder: Path, lineage: str) -> list[dict]:
    """The records of the epochs trained so far. Raises `BadInput` if the folder holds another training."""
    path = folder / "history.json"
    if not path.exists():
        return []
    history = check_fields(read_json(path), dict(lineage=str, plan=dict, epochs=list), path)
    if history["lineage"] != lineage:
        raise BadInput(
            f"{folder} holds a training with another plan or other inputs: give the experiment another name, "
            "or move the folder away."
        )
    return history["epochs"]


def save_resume_state(
    path: Path, lineage: str, at: TrainingPosition, model: "torch.nn.Module", optimizer: "torch.optim.Optimizer", scaler
) -> None:
    """Write one rolling state, with a hash of all of it, so that an altered one is not resumed from.

    For SD 2.0's UNet it has 10.4 GB: tensors are written from where they are, without a copy (on a GPU: one in RAM).
    """
    import torch
    from safetensors.torch import save_file

    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"adam.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    if at.steps:
        tensors |= {"generator": at.generator, "losses": torch.stack(at.losses).float()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    about = dict(lineage=lineage, epochs=at.epochs, steps=at.steps, seconds=at.seconds, scaler=scaler.state_dict())
    about["sha256"] = state_digest(about, ((name, tensors[name].numpy()) for name in sorted(tensors)))
    check_free_space(path, sum(value.nbytes for value in tensors.values()), f"The resume state {path.name}")
    with atomic_write(path) as temporary:  # one entry of metadata: the order of several is random
        save_file(tensors, temporary, metadata={"sdlab": json.dumps(about)})


def state_digest(about: dict, tensors: Iterable[tuple[str, np.ndarray]]) -> str:
    """sha256 over a state's metadata (without its own hash), names and values."""
    sha = hashlib.sha256(json.dumps(about).encode())
    for name, value in tensors:
        sha.update(name.encode())
        sha.update(value.reshape(-1).view(np.uint8))
    return sha.hexdigest()


def read_about(path: Path) -> tuple[dict, list[str]]:
    """A state's metadata and the sorted names of its tensors. Raises whatever a damaged file makes the parsers raise."""
    with safe_open(path, "np") as file:
        return json.loads(file.metadata()["sdlab"]), sorted(file.keys())


def read_tensors(path: Path, names: Sequence[str], at_a_time: int = 16) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors one by one. The file is opened for a few at a time, so that a large one is not mapped in memory as a whole."""
    for first in range(0, len(names), at_a_time):
        with safe_open(path, "np") as file:
            for name in names[first : first + at_a_time]:
                yield name, file.get_tensor(name)


def is_resume_state_intact(path: Path) -> bool:
    """True if the state is as `save_resume_state` wrote it."""
    try:
        about, names = read_about(path)
        return about.pop("sha256") == state_digest(about, read_tensors(path, names))
    except Exception:  # whatever a damaged file makes the parsers raise
        return False


def is_behind(path: Path, epochs: int) -> bool:
    """True if the resume state is older than the final checkpoint: the training was killed between the two writes."""
    try:
        return read_about(path)[0]["epochs"] < epochs
    except Exception:  # none, or a damaged one: nothing needs it any more, and `sdlab verify` names it
        return False


def load_resume_state(
    path: Path, lineage: str, model: "torch.nn.Module", optimizer: "torch.optim.Optimizer", scaler
) -> TrainingPosition:
    """Fill `model`, `optimizer` and `scaler` from a state; the position of its training. Raises `BadInput`."""
    import torch

    if not path.exists():
        return TrainingPosition()
    weights, parameters, rest = model.state_dict(), dict(model.named_parameters()), {}

    def fill() -> Iterator[tuple[str, np.ndarray]]:
        """Yield each tensor for the digest after it was copied to its place."""
        for name, value in read_tensors(path, names):
            kind, _, key = name.partition(".")
            tensor = torch.from_numpy(value)
            if kind == "model":
                weights.pop(key).copy_(tensor)
            elif kind == "adam":
                of, _, moment = key.rpartition(".")
                optimizer.state[parameters[of]][moment] = tensor.to(parameters[of].device, copy=True)
            else:
                rest[name] = tensor.clone()
            yield name, value

    try:
        with raise_on_read_error(path):  # safetensors would say that it does not exist
            path.open("rb").close()
        about, names = read_about(path)
        sha256 = about.pop("sha256")
        if about["lineage"] != lineage:
            raise BadInput(f"{path} belongs to a training with another plan or other inputs: move its folder away.")
        with torch.no_grad():
            intact = state_digest(about, fill()) == sha256
        if weights or not intact:
            raise ValueError("its content is not what was written")
        losses = list(rest.get("losses", torch.empty(0)).to(next(model.parameters()).device))
        at = TrainingPosition(about["epochs"], about["steps"], rest.get("generator"), losses, about["seconds"])
        if about["scaler"]:
            scaler.load_state_dict(about["scaler"])
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(
            f"{path} is damaged ({first_line(error)}): move its folder away and run its stage again."
        ) from None
    return at
