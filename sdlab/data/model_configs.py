"""Checks of a base model's configs: can the method condition, train and sample this model, and does it fit its weights?"""

from pathlib import Path

from safetensors import safe_open

from sdlab.data.model_files import PARTS
from sdlab.errors import BadInput, brief

# UNets that need more than latents, timesteps and encoder_hidden_states cannot be conditioned by classes alone.
EXTRA_INPUTS = (
    "addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "num_class_embeds", "time_cond_proj_dim",
)  # fmt: skip
# Limits of a config: more than any Stable Diffusion needs, and nothing that fills the memory.
# name -> (largest number, longest list of such numbers; 1: no list)
MODEL_NUMBERS = dict(
    block_out_channels=(2**14, 16), layers_per_block=(64, 16), transformer_layers_per_block=(64, 16), in_channels=(64, 1),
    out_channels=(64, 1), latent_channels=(64, 1), cross_attention_dim=(2**14, 1),
)  # fmt: skip
OTHER_NUMBERS = dict(max_position_embeddings=(4096, 1), num_train_timesteps=(100_000, 1))


def check_configs(unet: dict, vae: dict, scheduler: dict, text_encoder: dict) -> None:
    """Raises `BadInput` for a model that the method cannot condition, train or sample."""
    for config, kind in ((unet, PARTS["unet"]), (vae, PARTS["vae"])):
        if config.get("_class_name", kind) != kind:
            raise BadInput(f"it has a {str(config['_class_name'])[:80]} where a {kind} is needed.")
        if not isinstance(config.get("block_out_channels"), list):
            raise BadInput(f"the config of its {kind} names no block_out_channels: take a whole copy of that model.")
    if extra := [name for name in EXTRA_INPUTS if unet.get(name)]:
        raise BadInput(f"its UNet has {extra[0]} = {brief(unet[extra[0]])}: it needs more than a class (as SDXL does).")
    if not isinstance(unet.get("cross_attention_dim"), int):
        width = brief(unet.get("cross_attention_dim"))
        raise BadInput(f"its UNet's cross_attention_dim is {width}: one whole number is needed.")
    if not isinstance(text_encoder.get("max_position_embeddings"), int):
        raise BadInput(
            "its text_encoder/config.json has no max_position_embeddings, the number of tokens: take a whole copy of that model."
        )
    for what, config, limits in (
        ("UNet", unet, MODEL_NUMBERS),
        ("VAE", vae, MODEL_NUMBERS),
        ("text encoder", text_encoder, OTHER_NUMBERS),
        ("scheduler", scheduler, OTHER_NUMBERS),
    ):
        for name, (largest, longest) in limits.items():
            check_numbers(what, config, name, largest, longest)
    taken, given, latent = unet.get("in_channels", 4), unet.get("out_channels", 4), vae.get("latent_channels", 4)
    if len({taken, given, latent}) > 1:
        raise BadInput(
            f"its UNet takes {taken} channels and gives {given}, its VAE has {latent}: they have to be equal (those of "
            "inpainting and upscaling models differ)."
        )
    if vae.get("shift_factor"):
        raise BadInput("its VAE shifts latents (shift_factor), which Stable Diffusion 1 and 2 do not.")
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


def check_numbers(what: str, config: dict, name: str, largest: int, longest: int) -> None:
    """Raises `BadInput` for anything but a whole number up to `largest`, or a list of at most `longest` of them."""
    numbers = flatten_numbers(config.get(name, 1))
    right = all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= largest for n in numbers)
    is_list = isinstance(config.get(name), list)
    if not right or (is_list and (longest == 1 or not 1 <= len(numbers) <= longest)):
        several = f", or a list of {longest} at most" if longest > 1 else ""
        raise BadInput(
            f"the {name} of its {what} is {brief(config[name])}: allowed is a whole number from 1 to {largest}{several}."
        )


def flatten_numbers(value: object) -> list:
    """A number, or a list of numbers or of such lists, as one list."""
    if not isinstance(value, list):
        return [value]
    return [n for inner in value for n in (inner if isinstance(inner, list) else [inner])]


def check_shapes(unet: dict, vae: dict, weights: list[Path], source: str) -> None:
    """Raises `BadInput` if the headers of the weight files belong to another model than the configs.

    It needs no model in memory, so it comes before anything is written; `base_models.load_part` sees the rest.
    """
    shapes = {"unet": {}, "vae": {}}
    for path in weights:
        with safe_open(path, "pt") as file:
            shapes[path.parent.name] |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    problem, remedy = f"The base model {source} cannot be used: its", "take both from one copy of that model."
    for part, config, name, channels in (
        ("unet", unet, "conv_in.weight", 4),
        ("vae", vae, "encoder.conv_in.weight", 3),
    ):
        blocks, layers = config["block_out_channels"], flatten_numbers(config.get("layers_per_block", 1))
        least = sum(layers) * (len(blocks) if len(layers) == 1 else 1)
        expected = (blocks[0], config.get("in_channels", channels))
        if (shape := shapes[part].get(name, expected)[:2]) != expected:
            raise BadInput(
                f"{problem} {part}/config.json asks for {name} of {expected}, and the weights have {shape}; {remedy}"
            )
        if least > len(shapes[part]):
            raise BadInput(
                f"{problem} {part}/config.json asks for {least} layers, and the weights have {len(shapes[part])} tensors; {remedy}"
            )
    width = unet["cross_attention_dim"]
    for name, shape in shapes["unet"].items():
        if name.endswith("attn2.to_k.weight") and shape[1:] != (width,):
            raise BadInput(
                f"{problem} unet/config.json has cross_attention_dim {width}, and {name} is of {shape}; {remedy}"
            )
