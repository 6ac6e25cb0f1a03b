"""TODO runs.resume."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import safe_open, save_file

from sdlab.errors import BadInput, first_line
from sdlab.runs.files import atomic_write, check_fields, check_free_space, raise_on_read_error, read_json


@dataclass(frozen=True)
class TrainingPosition:
    """Where a training is: after `epochs` whole epochs and `steps` more of the next."""

    epochs: int = 0
    steps: int = 0
    generator: torch.Tensor | None = None  # its state, uint8, where steps > 0
    losses: list[torch.Tensor] = field(default_factory=list)  # of those steps, scalars
    seconds: float = 0.0  # clocked for them


def load_history(folder: Path, lineage: str) -> list[dict]:
    """The epochs already trained. Raises `BadInput` if the folder holds another training."""
    if not (folder / "history.json").exists():
        return []
    path, form = folder / "history.json", dict(lineage=str, plan=dict, epochs=list)
    kept = check_fields(read_json(path), form, path)
    if kept["lineage"] != lineage:
        raise BadInput(
            f"{folder} holds a training with another plan or other inputs: give the experiment another name, "
            "or move the folder away."
        )
    return kept["epochs"]


def save_resume_state(
    path: Path, lineage: str, at: TrainingPosition, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scaler
) -> None:
    """Weights and Adam's moments in full precision, in one safetensors file: one rolling state, not one an epoch.

    For SD 2.0's UNet these are 10.4 GB: they are written from where they lie, without a copy (on a GPU: one in RAM).
    With them goes a hash of them all, so that a state that was altered is not gone on from.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"adam.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    if at.steps:
        tensors |= {"generator": at.generator, "losses": torch.stack(at.losses).float()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    kept = dict(lineage=lineage, epochs=at.epochs, steps=at.steps, seconds=at.seconds, scaler=scaler.state_dict())
    digest = hashlib.sha256(json.dumps(kept).encode())
    for name in sorted(tensors):
        hash_tensor(digest, name, tensors[name])
    check_free_space(path, sum(value.nbytes for value in tensors.values()), f"The resume state {path.name}")
    kept["sha256"] = digest.hexdigest()
    with atomic_write(path) as beside:  # one entry of metadata: several come in any order
        save_file(tensors, beside, metadata={"sdlab": json.dumps(kept)})


def is_behind(path: Path, epochs: int) -> bool:
    """Whether a state is of before the end of its training: that was killed between its last checkpoint and its last state."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["sdlab"])["epochs"] < epochs
    except Exception:  # none, or none that can be read: nothing needs it any more, and `sdlab verify` names it
        return False


def hash_tensor(digest, name: str, value: torch.Tensor) -> None:
    """Its name and bytes, to a hash."""
    digest.update(name.encode())
    digest.update(value.reshape(-1).view(torch.uint8).numpy())


@torch.no_grad()
def load_resume_state(
    path: Path, lineage: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scaler
) -> TrainingPosition:
    """Fill `model`, `optimizer` and `scaler` from the state file; where that training was. Raises `BadInput`."""
    if not path.exists():
        return TrainingPosition()
    try:
        with raise_on_read_error(path):  # safetensors would say that it is not there
            path.open("rb").close()
        with safe_open(path, "pt") as file:
            kept, names = json.loads(file.metadata()["sdlab"]), sorted(file.keys())
        sha256 = kept.pop("sha256")
        digest = hashlib.sha256(json.dumps(kept).encode())
        if kept["lineage"] != lineage:
            raise BadInput(f"{path} belongs to a training with another plan or other inputs: move its folder away.")
        weights, parameters, more = model.state_dict(), dict(model.named_parameters()), {}
        for name in names:
            value = read_tensor(path, name)
            hash_tensor(digest, name, value)
            kind, _, rest = name.partition(".")
            if kind == "model":
                weights.pop(rest).copy_(value)
            elif kind == "adam":
                of, _, key = rest.rpartition(".")
                optimizer.state[parameters[of]][key] = value.to(parameters[of].device, copy=True)
            else:
                more[name] = value.clone()
        if weights or digest.hexdigest() != sha256:
            raise ValueError("its content is not what was written")
        losses = list(more.get("losses", torch.empty(0)).to(next(model.parameters()).device))
        at = TrainingPosition(kept["epochs"], kept["steps"], more.get("generator"), losses, kept["seconds"])
        if kept["scaler"]:
            scaler.load_state_dict(kept["scaler"])
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(
            f"{path} is damaged ({first_line(error)}): move its folder away and run its step again."
        ) from None
    return at


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor of a file. Opened anew for each, so that not all of a large file stays mapped in memory at once."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)
