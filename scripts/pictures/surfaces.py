"""Pictures without a story: dead leaves, stripes, gradients, noise textures, silhouettes."""

import torch

from pictures.drawing import (
    CANVAS,
    Dice,
    Pictures,
    blob,
    canvas,
    each,
    inside,
    lump_noise,
    natural_noise,
    numbers,
    paint,
    palettes,
)


def ground(colours: torch.Tensor) -> torch.Tensor:
    """Paper's colour everywhere: (count, 3, 64, 64)."""
    return colours[:, 0, :, None, None].expand(len(colours), 3, CANVAS, CANVAS)


def mixed(dice: Dice, colours: torch.Tensor) -> torch.Tensor:
    """A colour between a picture's three, and a little off: (count, 3)."""
    weights = dice.uniform(len(colours), 3, 1) ** 3 + 1e-3
    colour = (colours * weights).sum(1) / weights.sum(1)
    return (colour + dice.normal(*colour.shape) * 0.05).clamp(0, 1)


def leaves(dice: Dice, count: int) -> Pictures:
    """Dead leaves: shapes that hide each other, many small and few large ones, as things in photographs do.

    Geometry: size, evenness of sizes, eccentricity, wobble. Rendering: shading, texture, softness of edges.
    """
    colours = palettes(dice, count)
    geometry, rendering = numbers(dice, count, 4, 3)
    images = ground(colours)
    smallest, power = 0.14 + 0.08 * geometry[:, 0], 1 + 0.6 * (geometry[:, 1] + 1)
    for _ in range(24):
        radius = (smallest * dice.uniform(count, low=0.05).pow(-1 / (power + 1))).clamp_max(0.9)
        x, y = dice.uniform(2, count, low=-1.1, high=1.1)
        leaf = blob(dice, x, y, radius, 0.3 * (geometry[:, 3] + 1), (geometry[:, 2] + 1) * 0.5)
        shading = 1 + each(0.25 * (rendering[:, 0] + 1) / radius) * leaf * dice.uniform(count, 1, 1, 1)
        texture = 1 + each(0.08 * (rendering[:, 1] + 1)) * lump_noise(dice, count, 16)
        images = paint(
            images,
            mixed(dice, colours)[:, :, None, None] * shading * texture,
            inside(leaf, each(0.02 + 0.02 * (rendering[:, 2] + 1))),
        )
    return Pictures(images.clamp(0, 1), ["leaves"] * count, [""] * count, colours, geometry, rendering)


def stripes(dice: Dice, count: int) -> Pictures:
    """Bars, checks or rings of two colours, sharp or soft, bent or straight.

    Geometry: direction (not of rings), frequency, bend, share of the ink, middle x and y (not of bars). Rendering:
    sharpness, the checks' second frequency.
    """
    colours = palettes(dice, count)
    colours[:, 2] = colours[:, 1]
    geometry, rendering = numbers(dice, count, 6, 2)
    kind = dice.integers(0, 3, count)
    geometry[kind == 2, 0], geometry[kind == 0, 4:], rendering[kind != 1, 1] = 0, 0, 0
    x, y = canvas()
    bend = each(geometry[:, 2]) * 0.15 * lump_noise(dice, count, 3)
    x, y = x - each(geometry[:, 4]) * 0.5 + bend, y - each(geometry[:, 5]) * 0.5 + bend
    turn = each(geometry[:, 0]) * torch.pi / 2
    along, across = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
    frequency = each(2 ** (1 + 1.6 * geometry[:, 1])) * torch.pi
    phase = each(dice.uniform(count, high=2 * torch.pi) * (kind != 1))
    first = torch.sin(frequency * along + phase)
    checks = first * torch.sin(frequency * each(1 + 0.5 * rendering[:, 1]) * across)
    rings = torch.sin(frequency * (along**2 + across**2 + 1e-6).sqrt() + phase)
    wave = torch.stack([first, checks, rings])[kind, torch.arange(count)]
    cover = torch.sigmoid((wave + each(geometry[:, 3]) * 0.5) * each(2 ** (2 + 2 * rendering[:, 0])))
    images, names = paint(ground(colours), colours[:, 1], cover), ["bars", "checks", "rings"]
    return Pictures(images, ["stripes"] * count, [names[i] for i in kind], colours, geometry, rendering)


def gradients(dice: Dice, count: int) -> Pictures:
    """Two or three colours that run into each other: straight, or round a point.

    Geometry: direction (if straight), middle x and y (if round), steepness. Rendering: 1 with a third colour, else -1.
    """
    colours = palettes(dice, count)
    geometry, rendering = numbers(dice, count, 4, 1)
    is_round = dice.uniform(count) < 0.5
    geometry[is_round, 0], geometry[~is_round, 1:3] = 0, 0
    rendering[:, 0] = torch.where(rendering[:, 0] > 0, 1.0, -1.0)
    colours[:, 2] = torch.where(rendering[:, :1] > 0, colours[:, 2], colours[:, 1])
    x, y = canvas()
    turn = each(geometry[:, 0]) * torch.pi
    straight = x * turn.cos() + y * turn.sin()
    around = ((x - each(geometry[:, 1])) ** 2 + (y - each(geometry[:, 2])) ** 2).sqrt() - 0.7
    where = torch.where(each(is_round), around, straight) * each(2 ** geometry[:, 3])
    images = paint(ground(colours), colours[:, 1], ((where + 1) / 2).clamp(0, 1))
    images = paint(images, colours[:, 2], (where.abs() * -1.5 + 1).clamp(0, 1) * each((rendering[:, 0] > 0).float()))
    variants = ["round" if one else "straight" for one in is_round.tolist()]
    return Pictures(images, ["gradient"] * count, variants, colours, geometry, rendering)


def textures(dice: Dice, count: int) -> Pictures:
    """Noise of natural spectra in two colours: clouds, islands of one colour in another, ridges.

    Geometry: slope of the spectrum, share of the ink (not of ridges), noise in each channel of its own. Rendering:
    sharpness (not of clouds), contrast (of clouds).
    """
    colours = palettes(dice, count)
    colours[:, 2] = colours[:, 1]
    geometry, rendering = numbers(dice, count, 3, 2)
    kind = dice.integers(0, 3, count)
    geometry[kind == 2, 1], rendering[kind == 0, 0], rendering[kind != 0, 1] = 0, 0, 0
    slope = 1.2 + 0.8 * geometry[:, 0]
    field, own = natural_noise(dice, slope), natural_noise(dice, slope, channels=3)
    clouds = torch.sigmoid(field * each(1 + rendering[:, 1]) + each(geometry[:, 1]))
    islands = torch.sigmoid((field + each(geometry[:, 1]) * 0.8) * each(2 ** (3 + 2 * rendering[:, 0])))
    ridges = torch.exp(-field.abs() * each(2 ** (2 + rendering[:, 0])))
    cover = torch.stack([clouds, islands, ridges])[kind, torch.arange(count)]
    images = paint(ground(colours), colours[:, 1], cover) + own * each(0.05 * (geometry[:, 2] + 1))
    names = ["clouds", "islands", "ridges"]
    return Pictures(images.clamp(0, 1), ["texture"] * count, [names[i] for i in kind], colours, geometry, rendering)


def silhouettes(dice: Dice, count: int) -> Pictures:
    """One thing on a plain ground, like its mirror image or not, with a contour of five waves.

    Geometry: size, width, x, y, how uneven its contour is. Rendering: shading, texture in the accent's colour (0: no
    texture), 1 with a hole (else -1), softness.
    """
    colours = palettes(dice, count)
    geometry, rendering = numbers(dice, count, 5, 4)
    rendering[:, 1] = rendering[:, 1].clamp_min(0)
    rendering[:, 2] = torch.where(rendering[:, 2] > 0.4, 1.0, -1.0)
    colours[:, 2] = torch.where(rendering[:, 1:2] > 0, colours[:, 2], colours[:, 1])
    grid_x, grid_y = canvas()
    middle_x, middle_y = geometry[:, 2] * 0.2, geometry[:, 3] * 0.2
    x, y = (grid_x - each(middle_x)) / each(1 + 0.4 * geometry[:, 1]), grid_y - each(middle_y)
    mirrored = dice.uniform(count) < 0.5
    x = torch.where(each(mirrored), x.abs(), x)
    distance, angle = (x**2 + y**2 + 1e-6).sqrt(), torch.atan2(x, y)
    contour = 1.0
    for frequency in range(1, 6):
        weight = each(dice.normal(count) * 0.25 / frequency**0.5) * each(1 + geometry[:, 4])
        contour = contour + weight * torch.cos(frequency * angle + each(dice.uniform(count, high=2 * torch.pi)))
    thing = distance - each(0.55 + 0.25 * geometry[:, 0]) * contour.clamp(0.15, 1.8)
    cover = inside(thing, each(0.03 + 0.02 * rendering[:, 3]))
    hole = blob(dice, middle_x + dice.normal(count) * 0.1, middle_y + dice.normal(count) * 0.1, dice.uniform(count, low=0.1, high=0.3),
                dice.uniform(count) * 0.3, dice.uniform(count))  # fmt: skip
    cover = cover * (1 - inside(hole, 0.03) * each((rendering[:, 2] > 0).float()))
    surface = colours[:, 1, :, None, None] * (1 + each(0.3 * (rendering[:, 0] + 1)) * (grid_x + grid_y) / 2)
    pattern = torch.sigmoid(natural_noise(dice, torch.full((count,), 1.0)) * 3)
    surface = paint(surface, colours[:, 2], pattern * each(rendering[:, 1]))
    images = paint(ground(colours), surface, cover)
    variants = ["mirrored" if one else "free" for one in mirrored.tolist()]
    return Pictures(images.clamp(0, 1), ["silhouette"] * count, variants, colours, geometry, rendering)
