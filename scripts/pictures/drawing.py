"""What all painters share: random numbers, a canvas, soft shapes, noise, palettes.

Images are float (count, 3, 64, 64) in [0, 1] until `mixture.py` averages them down to 32 px; glyphs have 32 px already.
Positions on the canvas go from -1 (left, top) to 1.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

SIZE, CANVAS = 32, 64  # pixels of an image; of the canvas that it is drawn on
COLOURS, GEOMETRY, RENDERING = 9, 6, 6  # numbers that describe a picture beside what it shows


@dataclass
class Pictures:
    """A batch of one kind and what it shows: all that the throwaway text encoder is told."""

    images: torch.Tensor  # (count, 3, h, w) in [0, 1]
    subject: list[str]  # "a", "7", "cell", ...
    variant: list[str]  # a glyph's font, a cell's number of lobes, ...
    colours: torch.Tensor  # (count, 3, 3) in [0, 1]: paper, ink and accent
    geometry: torch.Tensor  # (count, 6), about -1 ... 1; its meaning is the kind's own
    rendering: torch.Tensor  # (count, 6), about -1 ... 1


class Dice:
    """Random tensors from one generator."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return torch.rand(*shape, generator=self.generator) * (high - low) + low

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """From `low` to `high` - 1."""
        return torch.randint(low, high, shape, generator=self.generator)

    def one_of(self, shares: tuple[float, ...], count: int) -> torch.Tensor:
        """Indices (count,), index i as often as its share."""
        return torch.multinomial(torch.tensor(shares), count, replacement=True, generator=self.generator)


def numbers(dice: Dice, count: int, geometry: int, rendering: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Geometry and rendering of which so many numbers are used, in [-1, 1]; the rest is 0, as it is not shown."""
    widths = ((geometry, GEOMETRY), (rendering, RENDERING))
    drawn = [(dice.uniform(count, used, low=-1, high=1), torch.zeros(count, all_ - used)) for used, all_ in widths]
    return torch.cat(drawn[0], 1), torch.cat(drawn[1], 1)


def each(values: torch.Tensor) -> torch.Tensor:
    """One number an image, (count,), to be multiplied with (count, 1, h, w)."""
    return values[:, None, None, None]


@cache
def canvas() -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of every pixel's centre: (1, 1, 64, 64) each."""
    line = (torch.arange(CANVAS) + 0.5) / CANVAS * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    return x[None, None], y[None, None]


def paint(images: torch.Tensor, colour: torch.Tensor, cover: torch.Tensor) -> torch.Tensor:
    """`colour` (count, 3) or (count, 3, h, w) over the images, as far as `cover` (count, 1, h, w) goes (0 ... 1)."""
    if colour.dim() == 2:
        colour = colour[:, :, None, None]
    return images + (colour - images) * cover


def inside(distance: torch.Tensor, softness: torch.Tensor | float = 0.03) -> torch.Tensor:
    """1 where a signed distance is negative, 0 where it is positive, over an edge of that softness."""
    return torch.sigmoid(-distance / softness)


def blob(dice: Dice, x, y, radius: torch.Tensor, wobble: torch.Tensor, eccentricity: torch.Tensor) -> torch.Tensor:
    """Signed distance (count, 1, 64, 64), about, of a round shape at (x, y): an ellipse whose contour wobbles."""
    count = len(radius)
    grid_x, grid_y = canvas()
    dx, dy = grid_x - each(x), grid_y - each(y)
    turn = each(dice.uniform(count, high=torch.pi))
    along, across = dx * turn.cos() + dy * turn.sin(), dy * turn.cos() - dx * turn.sin()
    stretch = each(1 + 0.6 * eccentricity)
    along, across = along / stretch, across * stretch
    distance, angle = (along**2 + across**2 + 1e-6).sqrt(), torch.atan2(across, along)
    contour = 1.0
    for frequency in (2, 3, 5):
        phase = each(dice.uniform(count, high=2 * torch.pi))
        contour = contour + each(wobble) * 0.5 / frequency * torch.cos(frequency * angle + phase)
    return distance - each(radius) * contour


def lump_noise(dice: Dice, count: int, cells: int, channels: int = 1) -> torch.Tensor:
    """Smooth noise of unit variance, about, with lumps of 64 / cells pixels: (count, channels, 64, 64)."""
    noise = dice.normal(count, channels, cells, cells)
    return F.interpolate(noise, size=CANVAS, mode="bicubic", align_corners=False) * 1.3


@cache
def frequencies() -> torch.Tensor:
    """The length of each wave vector of a 64 px real FFT, in cycles an image, at least 1: (64, 33)."""
    rows, columns = torch.fft.fftfreq(CANVAS) * CANVAS, torch.fft.rfftfreq(CANVAS) * CANVAS
    return (rows[:, None] ** 2 + columns[None] ** 2).sqrt().clamp_min(1.0)


def natural_noise(dice: Dice, slope: torch.Tensor, channels: int = 1) -> torch.Tensor:
    """Noise whose amplitude falls as frequency ** -slope (photographs: about 1): unit variance,
    (count, channels, 64, 64)."""
    white = torch.fft.rfft2(dice.normal(len(slope), channels, CANVAS, CANVAS))
    noise = torch.fft.irfft2(white * frequencies() ** -each(slope), s=(CANVAS, CANVAS))
    noise = noise - noise.mean((2, 3), keepdim=True)
    return noise / noise.std((2, 3), keepdim=True).clamp_min(1e-6)


def gaussian_blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Blur each image of (count, channels, h, w) with its own width (pixels; 0: none)."""
    offsets = torch.arange(-4.0, 5.0)
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp_min(1e-3)[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    count, channels, height, width = images.shape
    kernel = kernel.repeat_interleave(channels, 0)
    flat = F.pad(images, (4, 4, 4, 4), mode="replicate").reshape(1, count * channels, height + 8, width + 8)
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=count * channels)
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=count * channels)
    return flat.view(count, channels, height, width)


def from_hsv(hue: torch.Tensor, saturation: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(..., 3) RGB of hue (any number, period 1), saturation and value (0 ... 1)."""
    sector = (hue[..., None] * 6 + torch.tensor([5.0, 3.0, 1.0])) % 6
    return value[..., None] * (1 - saturation[..., None] * torch.minimum(sector, 4 - sector).clamp(0, 1))


def palettes(dice: Dice, count: int, contrast: float = 0.15) -> torch.Tensor:
    """Paper, ink and accent of each picture (count, 3, 3): any colours, one hue, grey, stains on light paper, or dark
    paper. Ink and paper differ by `contrast` or more, averaged over R, G and B."""
    free = dice.uniform(count, 3, 3)
    base, spread = dice.uniform(count, 1), dice.normal(count, 3) * 0.06
    hued = from_hsv(base + spread, dice.uniform(count, 3), dice.uniform(count, 3, low=0.1))
    grey = dice.uniform(count, 3, 1).expand(count, 3, 3)
    saturation = dice.uniform(count, 3) * torch.tensor([0.25, 0.7, 1.0])
    value = torch.stack(
        [dice.uniform(count, low=0.75), dice.uniform(count, low=0.5), dice.uniform(count, low=0.2, high=0.8)], 1
    )
    stained = from_hsv(base + spread * 2, saturation, value)
    dark = torch.cat([dice.uniform(count, 1, 3) * 0.15, hued[:, 1:]], 1)
    which = dice.one_of((0.25, 0.25, 0.15, 0.2, 0.15), count)
    colours = torch.stack([free, hued, grey, stained, dark])[which, torch.arange(count)].clone()
    colours[:, 1] = apart(colours[:, 1], colours[:, 0], contrast)
    return colours


def apart(colour: torch.Tensor, other: torch.Tensor, contrast: float) -> torch.Tensor:
    """`colour` (count, 3), made much lighter or darker where it differs from `other` by less than `contrast`, averaged
    over R, G and B."""
    near = (colour - other).abs().mean(1, keepdim=True) < contrast
    far = torch.where(other.mean(1, keepdim=True) < 0.5, 1 - colour * 0.4, colour * 0.4)
    return torch.where(near, far, colour)
