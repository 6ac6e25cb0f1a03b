"""Letters and digits in the fonts that matplotlib ships: print, warped until it resembles handwriting."""

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from pictures.drawing import SIZE, Dice, Pictures, each, gaussian_blur, paint

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
DIGIT_SHARE = 0.5  # of all glyphs; the rest are letters
RESOLUTIONS = (8, 10, 12, 16, 24, 32)  # a glyph is averaged down to one of these, then bilinearly up to SIZE
RESOLUTION_SHARES = (0.30, 0.15, 0.15, 0.15, 0.10, 0.15)


@cache
def glyph_bank() -> tuple[torch.Tensor, list[str]]:
    """Every character in every font but those of symbols: masks (fonts, characters, 64, 64) in [0, 1]."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    banks, names = [], []
    for path in sorted(folder.glob("*.ttf")):
        # Symbol fonts map letters to other signs or to boxes.
        if any(word in path.stem for word in ("Siz", "NonUni", "cmsy", "cmex", "cmmi", "Display", "LastResort")):
            continue
        banks.append(np.stack([render(path, character) for character in CHARACTERS]))
        names.append(path.stem)
    return torch.from_numpy(np.stack(banks)).float() / 255, names


def render(path: Path, character: str) -> np.ndarray:
    """One glyph, scaled to fill 56 of 64 pixels in its longer direction and centred: uint8 (64, 64)."""
    font = ImageFont.truetype(str(path), 96)
    left, top, right, bottom = font.getbbox(character)
    image = Image.new("L", (max(right - left, 1), max(bottom - top, 1)))
    ImageDraw.Draw(image).text((-left, -top), character, fill=255, font=font)
    scale = 56 / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    square = Image.new("L", (64, 64))
    square.paste(image, ((64 - image.width) // 2, (64 - image.height) // 2))
    return np.asarray(square)


def glyphs(dice: Dice, count: int) -> Pictures:
    """Drawn at 32 px. Geometry: rotation, shear, scales and shifts; rendering: stroke, blur and resolution."""
    bank, fonts = glyph_bank()
    is_digit = dice.uniform(count) < DIGIT_SHARE
    digit, letter = dice.integers(0, 10, count), dice.integers(10, len(CHARACTERS), count)
    character, font = torch.where(is_digit, digit, letter), dice.integers(0, len(fonts), count)
    mask = bank[font, character][:, None]  # (count, 1, 64, 64)

    # Affine jitter and a smooth elastic warp: print becomes something like handwriting.
    geometry = dice.uniform(count, 6, low=-1, high=1)  # rotation, shear, scale x, scale y, shift x, shift y
    angle, shear = geometry[:, 0] * 0.35, geometry[:, 1] * 0.35
    scale_x, scale_y = 1.1 + 0.35 * geometry[:, 2], 1.0 + 0.2 * geometry[:, 3]
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([cos * scale_x, (shear * cos - sin) * scale_y, geometry[:, 4] * 0.1], 1)
    row_y = torch.stack([sin * scale_x, (shear * sin + cos) * scale_y, geometry[:, 5] * 0.1], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), [count, 1, 64, 64], align_corners=False)
    strength = dice.uniform(count, 1, 1, 1, high=0.13)
    warp = F.interpolate(dice.normal(count, 2, 4, 4) * strength, size=64, mode="bicubic")
    mask = F.grid_sample(mask, grid + warp.permute(0, 2, 3, 1), align_corners=False)

    # Stroke: blur and threshold makes thinner and thicker pens.
    stroke = dice.uniform(count, low=-1, high=1)
    mask = gaussian_blur(mask, torch.full((count,), 2.0))
    mask = torch.sigmoid((mask - each(0.42 - 0.22 * stroke)) * 14)
    mask = F.avg_pool2d(mask, 2)  # (count, 1, 32, 32)

    blur = dice.uniform(count).square() * 1.2
    mask = gaussian_blur(mask, blur)
    which = dice.one_of(RESOLUTION_SHARES, count)
    for index, resolution in enumerate(RESOLUTIONS):
        chosen = which == index
        if resolution < SIZE and chosen.any():
            small = F.adaptive_avg_pool2d(mask[chosen], resolution)
            mask[chosen] = F.interpolate(small, size=SIZE, mode="bilinear", align_corners=False)
    resolution = torch.log2(torch.tensor(RESOLUTIONS)[which] / 16.0)

    # Palette: white on black, black on white, or two colours far enough apart to be read.
    ink, paper = dice.uniform(count, 3), dice.uniform(count, 3)
    near = (ink - paper).abs().mean(1) < 0.25
    ink[near] = (paper[near] + 0.5) % 1.0
    kind = dice.uniform(count)
    level = dice.uniform(count, 1, low=0.85, high=1.0)
    ink, paper = torch.where(kind[:, None] < 0.35, level, ink), torch.where(kind[:, None] < 0.35, 1 - level, paper)
    black = (kind > 0.85)[:, None]
    ink, paper = torch.where(black, 1 - level, ink), torch.where(black, level, paper)
    images = paint(paper[:, :, None, None].expand(count, 3, SIZE, SIZE), ink, mask)

    rendering = torch.stack([stroke, blur, resolution, *[torch.zeros(count)] * 3], 1)
    return Pictures(images, [CHARACTERS[index] for index in character], [fonts[index] for index in font],
                    torch.stack([paper, ink, ink], 1), geometry, rendering)  # fmt: skip
