"""Crops of the photographs that come inside scikit-image, scikit-learn and matplotlib, all under free licences.

No medical one is among them (scikit-image also has a retina and a tissue section), so that medical data sets are new
to the base model. `sdlab/tiny/README.md` names each photograph's licence.
"""

from functools import cache

import matplotlib.cbook
import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_image

from pictures.drawing import CANVAS, GEOMETRY, RENDERING, Dice, Pictures, each

FROM_SKIMAGE = (
    "astronaut",
    "brick",
    "camera",
    "cat",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "rocket",
)
FROM_SKLEARN = ("china.jpg", "flower.jpg")
FROM_MATPLOTLIB = ("grace_hopper.jpg",)


@cache
def photographs() -> tuple[list[str], list[torch.Tensor]]:
    """Names, and pictures (3, h, w) in [0, 1] with at most 512 px on the shorter side."""
    names = [*FROM_SKIMAGE, *FROM_SKLEARN, *FROM_MATPLOTLIB]
    arrays = [getattr(skimage.data, name)() for name in FROM_SKIMAGE]
    arrays += [load_sample_image(name) for name in FROM_SKLEARN]
    for name in FROM_MATPLOTLIB:
        with matplotlib.cbook.get_sample_data(name) as file:
            arrays.append(np.asarray(Image.open(file).convert("RGB")))
    pictures = []
    for array in arrays:
        array = np.repeat(array[..., None], 3, 2) if array.ndim == 2 else array[..., :3]
        picture = torch.from_numpy(array.copy()).permute(2, 0, 1).float()[None] / 255
        scale = min(1.0, 512 / min(picture.shape[2:]))
        pictures.append(F.interpolate(picture, scale_factor=scale, mode="area")[0] if scale < 1 else picture[0])
    return names, pictures


def crops(dice: Dice, count: int) -> Pictures:
    """Squares of 40 px to the shorter side, mirrored or transposed; half of them in colours of their own.

    Colours: the means of the border, of the middle and of the brightest fifth. Geometry: size of the crop, position.
    """
    names, pictures = photographs()
    which = dice.integers(0, len(names), count)
    geometry, rendering = torch.zeros(count, GEOMETRY), torch.zeros(count, RENDERING)
    geometry[:, :3] = dice.uniform(count, 3, low=-1, high=1)
    images = torch.empty(count, 3, CANVAS, CANVAS)
    for row, index in enumerate(which.tolist()):
        picture = pictures[index]
        height, width = picture.shape[1:]
        side = round(40 * (min(height, width) / 40) ** ((geometry[row, 0].item() + 1) / 2))
        top = round((height - side) * (geometry[row, 1].item() + 1) / 2)
        left = round((width - side) * (geometry[row, 2].item() + 1) / 2)
        crop = picture[None, :, top : top + side, left : left + side]
        images[row] = F.interpolate(crop, CANVAS, mode="area" if side >= CANVAS else "bilinear")[0]

    images = torch.where(each(dice.uniform(count) < 0.5), images, images.flip(3))
    images = torch.where(each(dice.uniform(count) < 0.25), images.transpose(2, 3), images)
    # Other colours: the three channels mixed, stretched and shifted around grey, now and then turned to a negative.
    mix = torch.eye(3) + dice.normal(count, 3, 3) * 0.35
    mix = mix / mix.sum(2, keepdim=True).abs().clamp_min(0.5)
    mix = mix * torch.where(dice.uniform(count, 1, 1) < 0.2, -1.0, 1.0)
    other = torch.einsum("nij,njhw->nihw", mix, images - 0.5) * each(dice.uniform(count, low=0.5, high=1.3))
    other = (other + 0.5 + dice.normal(count, 3, 1, 1) * 0.15).clamp(0, 1)
    images = torch.where(each(dice.uniform(count) < 0.5), images, other)

    quarter = CANVAS // 4
    middle = images[:, :, quarter:-quarter, quarter:-quarter].mean((2, 3))
    border = (images.mean((2, 3)) * 4 - middle) / 3
    brightest = (
        images.flatten(2)
        .gather(2, images.mean(1).flatten(1).topk(CANVAS**2 // 5, 1).indices[:, None].expand(-1, 3, -1))
        .mean(2)
    )
    return Pictures(
        images,
        ["photograph"] * count,
        [names[i] for i in which],
        torch.stack([border, middle, brightest], 1),
        geometry,
        rendering,
    )
