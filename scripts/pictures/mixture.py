"""One batch of all kinds: what is shown, averaged down to 32 px, through a lens and with a camera's noise."""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from pictures.cells import LOBES, cells, vessels
from pictures.drawing import CANVAS, COLOURS, GEOMETRY, RENDERING, SIZE, Dice, Pictures, each, gaussian_blur, lump_noise
from pictures.glyphs import CHARACTERS, glyph_bank, glyphs
from pictures.photographs import crops, photographs
from pictures.surfaces import gradients, leaves, silhouettes, stripes, textures

# The kinds of pictures, by who paints them and by name.
PAINTERS = (glyphs, cells, vessels, leaves, stripes, gradients, textures, silhouettes, crops)
KINDS = ("glyph", "cell", "vessels", "leaves", "stripes", "gradient", "texture", "silhouette", "photograph")
# How often each is drawn. A VAE has to know whatever an image may look like, a UNet what people have data sets of.
VAE_SHARES = (0.20, 0.14, 0.10, 0.08, 0.04, 0.04, 0.08, 0.07, 0.25)
UNET_SHARES = (0.40, 0.20, 0.12, 0.05, 0.03, 0.02, 0.05, 0.06, 0.07)
CAMERA = 4  # numbers: strength of blur, noise, uneven light and loss of contrast, 0 ... 1


@dataclass
class Batch:
    """Images (count, 3, 32, 32) in [-1, 1] and what each shows: indices (count,) and numbers, about -1 ... 1."""

    images: torch.Tensor
    subject: torch.Tensor
    variant: torch.Tensor
    colours: torch.Tensor  # (count, 9)
    geometry: torch.Tensor  # (count, 6)
    rendering: torch.Tensor  # (count, 6 + 4)

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, indices: torch.Tensor) -> "Batch":
        return Batch(*(getattr(self, name)[indices] for name in self.__dataclass_fields__))


@cache
def subjects() -> dict[str, int]:
    """What a picture can show -> its index: 62 characters, then the other kinds."""
    return {name: index for index, name in enumerate((*CHARACTERS, *KINDS[1:]))}


def kind_of(subject: torch.Tensor) -> torch.Tensor:
    """Indices of subjects -> indices of KINDS: all characters are of the first."""
    return (subject - len(CHARACTERS) + 1).clamp_min(0)


@cache
def variants() -> dict[str, int]:
    """Name -> index: fonts, numbers of lobes, kinds of vessels, stripes and others, photographs."""
    names = ["", *glyph_bank()[1], *(f"{n} lobes" for n in range(LOBES + 1)), "aperture", "no aperture",
             "bars", "checks", "rings", "round", "straight", "clouds", "islands", "ridges", "mirrored", "free",
             *photographs()[0]]  # fmt: skip
    return {name: index for index, name in enumerate(names)}


def draw(count: int, generator: torch.Generator, shares: tuple[float, ...]) -> Batch:
    """`count` images of all kinds in random order."""
    dice = Dice(generator)
    numbers = torch.bincount(dice.one_of(shares, count), minlength=len(PAINTERS)).tolist()
    parts = [painted(painter, dice, number) for painter, number in zip(PAINTERS, numbers, strict=True) if number]
    whole = Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in Batch.__dataclass_fields__))
    return whole.rows(torch.randperm(count, generator=generator))


def painted(painter, dice: Dice, count: int) -> Batch:
    """`count` images of one kind: averaged down to 32 px, seen through a camera, described in numbers."""
    pictures: Pictures = painter(dice, count)
    images = pictures.images
    if images.shape[-1] == CANVAS:
        images = F.avg_pool2d(images, CANVAS // SIZE)
    images, camera = through_a_camera(dice, images, plain=0.8 if painter is glyphs else 0.3)
    return Batch(
        images * 2 - 1,
        torch.tensor([subjects()[name] for name in pictures.subject]),
        torch.tensor([variants()[name] for name in pictures.variant]),
        (pictures.colours.flatten(1) * 2 - 1).reshape(count, COLOURS),
        pictures.geometry.reshape(count, GEOMETRY),
        torch.cat([pictures.rendering.reshape(count, RENDERING), camera], 1),
    )


def through_a_camera(dice: Dice, images: torch.Tensor, plain: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Blur, uneven light, contrast and noise, none of them for a share `plain`; and their strengths (count, 4)."""
    count = len(images)
    strength = dice.uniform(count, CAMERA) ** 2 * (dice.uniform(count, 1) >= plain)
    blur, noise, light, contrast = strength.unbind(1)
    images = gaussian_blur(images, blur * 1.2)
    lit = F.interpolate(lump_noise(dice, count, 2), size=images.shape[-1], mode="area")
    images = images * (1 + 0.25 * each(light) * lit)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = mean + (images - mean) * each(1 - 0.6 * contrast)
    images = images + each(noise) * 0.03 * dice.normal(*images.shape)
    return images.clamp(0, 1), strength
