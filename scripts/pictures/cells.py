"""Round bodies with granules and a nucleus, as cells are; branching lines on a lit ground, as vessels are."""

import torch
import torch.nn.functional as F

from pictures.drawing import (
    CANVAS,
    Dice,
    Pictures,
    apart,
    blob,
    canvas,
    each,
    inside,
    lump_noise,
    numbers,
    paint,
    palettes,
)

LOBES, OTHERS = 5, 6  # at most: lobes of a nucleus; other cells, and lesions


def cells(dice: Dice, count: int) -> Pictures:
    """One body in or near the middle, up to six others around it.

    Geometry: the body's radius, the nucleus' share of it, eccentricity, wobble, shift x, shift y. Rendering: strength
    of granules, their size (1: coarse, -1: fine), number of others around it, how pale their middle is, softness of
    edges, texture of the nucleus.
    """
    colours = palettes(dice, count)
    colours[:, 2] = apart(colours[:, 2], colours[:, 1], 0.08)  # a nucleus that can be told from its cell
    paper, ink, accent = colours.unbind(1)
    geometry, rendering = numbers(dice, count, 6, 6)
    number = tell_number(rendering, 2, (rendering[:, 2] + 1) * 3.5)
    rendering[number == 0, 3] = 0
    radius = 0.55 + 0.35 * geometry[:, 0]
    softness = each(0.03 + 0.03 * (rendering[:, 4] + 1))
    x, y = geometry[:, 4] * 0.2, geometry[:, 5] * 0.2
    images = paper[:, :, None, None] * (1 + 0.06 * lump_noise(dice, count, 3))

    # The others: a colour of their own in half the pictures, the body's in the rest; pale in the middle, as red cells.
    others = torch.where(dice.uniform(count, 1) < 0.5, ink, (paper + accent) / 2)
    around, size = dice.uniform(count, high=2 * torch.pi), dice.uniform(count, low=0.3, high=0.6)
    for index in range(OTHERS):
        angle = around + index * torch.pi / 3 + dice.normal(count) * 0.15
        away = dice.uniform(count, low=0.75, high=1.3)
        distance = blob(
            dice, away * angle.cos(), away * angle.sin(), size, dice.uniform(count) * 0.15, dice.uniform(count) * 0.3
        )
        pale = 1 - each(0.25 * (rendering[:, 3] + 1)) * inside(distance + each(size) * 0.55, 0.1)
        images = paint(images, others, inside(distance, softness) * pale * each((number > index).float()))

    body = blob(dice, x, y, radius, 0.12 * (geometry[:, 3] + 1), 0.25 * (geometry[:, 2] + 1))
    fine, coarse = lump_noise(dice, count, 24), lump_noise(dice, count, 12)
    rendering[:, 1] = torch.where(rendering[:, 1] > 0, 1.0, -1.0)
    granules = torch.where(each(rendering[:, 1]) > 0, coarse, fine)
    granules = torch.sigmoid((granules - 0.5) * 4) * each(0.35 * (rendering[:, 0] + 1))
    flesh = paint(ink[:, :, None, None] * (1 + 0.05 * lump_noise(dice, count, 8)), (accent + 2 * ink) / 3, granules)
    images = paint(images, flesh, inside(body, softness))

    # The nucleus: lobes on a circle around the body's middle, melted together.
    lobes = dice.one_of((0.15, 0.35, 0.15, 0.15, 0.1, 0.1), count)
    geometry[lobes == 0, 1], rendering[lobes == 0, 5] = 0, 0
    share = 0.55 + 0.3 * geometry[:, 1]
    nucleus = torch.full_like(body, 10.0)
    turn = dice.uniform(count, high=2 * torch.pi)
    for index in range(LOBES):
        angle = turn + index * 2 * torch.pi / lobes.clamp_min(1)
        spread = torch.where(lobes > 1, radius * share * 0.55, radius * 0.15)
        lobe_radius = radius * share / (1 + 0.28 * (lobes - 1).clamp_min(0)) * dice.uniform(count, low=0.85, high=1.15)
        lobe = blob(
            dice,
            x + spread * angle.cos(),
            y + spread * angle.sin(),
            lobe_radius,
            dice.uniform(count) * 0.3,
            dice.uniform(count) * 0.4,
        )
        there = each(lobes > index)
        nucleus = torch.where(there, -torch.logsumexp(torch.stack([-nucleus, -lobe]) / 0.06, 0) * 0.06, nucleus)
    nucleus = torch.maximum(nucleus, body + 0.02)  # inside its cell
    chromatin = 1 + each(0.09 * (rendering[:, 5] + 1)) * lump_noise(dice, count, 14)
    images = paint(images, accent[:, :, None, None] * chromatin, inside(nucleus, softness))
    return Pictures(
        images.clamp(0, 1), ["cell"] * count, [f"{n} lobes" for n in lobes.tolist()], colours, geometry, rendering
    )


def tell_number(rendering: torch.Tensor, column: int, number: torch.Tensor) -> torch.Tensor:
    """How many there are, 0 ... 6, of `number` rounded up; told in a column of `rendering` as -1 ... 1."""
    number = number.ceil().clamp(0, OTHERS)
    rendering[:, column] = number / OTHERS * 2 - 1
    return number


def vessels(dice: Dice, count: int) -> Pictures:
    """Branching lines on a shaded ground, with a disc that they leave from, a dark spot across from it, lesions, and in
    half the pictures a round aperture.

    Geometry: the disc's x and y, its radius, the lines' bend, their width, how far they spread. Rendering: strength of
    the lines, the disc and the lesions, the lesions' number, shade towards the edge, the ground's mottling.
    """
    colours = palettes(dice, count, contrast=0.05)
    paper, ink, accent = colours.unbind(1)
    geometry, rendering = numbers(dice, count, 6, 6)
    number = tell_number(rendering, 3, (rendering[:, 3] + 1) * 3)
    rendering[number == 0, 2] = 0
    grid_x, grid_y = canvas()
    distance_from_middle = (grid_x**2 + grid_y**2).sqrt()
    disc_x, disc_y = geometry[:, 0] * 0.75, geometry[:, 1] * 0.5
    shade = 1 - each(0.25 * (rendering[:, 4] + 1)) * distance_from_middle**2
    images = paper[:, :, None, None] * shade * (1 + each(0.06 * (rendering[:, 5] + 1)) * lump_noise(dice, count, 6))

    # A darker spot on the other side of the middle than the disc, as the fovea lies in an eye.
    spot = blob(
        dice,
        -0.6 * disc_x,
        dice.normal(count) * 0.1,
        dice.uniform(count, low=0.1, high=0.3),
        torch.zeros(count),
        torch.zeros(count),
    )
    images = images * (1 - 0.3 * inside(spot, 0.12))

    images = paint(
        images, ink, each(0.45 * (rendering[:, 0] + 1.2)).clamp_max(1) * branching_lines(dice, disc_x, disc_y, geometry)
    )
    disc = blob(
        dice, disc_x, disc_y, 0.14 + 0.07 * geometry[:, 2], torch.full((count,), 0.05), torch.full((count,), 0.1)
    )
    images = paint(images, accent, inside(disc, 0.05) * each(0.5 * (rendering[:, 1] + 1)))

    for index in range(OTHERS):
        there = number > index
        radius = dice.uniform(count, low=0.02, high=0.16)
        place = dice.uniform(2, count, low=-0.8, high=0.8)
        lesion = blob(dice, place[0], place[1], radius, dice.uniform(count) * 0.5, dice.uniform(count) * 0.5)
        colour = torch.where(dice.uniform(count, 1) < 0.5, accent, ink * 0.7)
        images = paint(images, colour, inside(lesion, 0.04) * each(0.45 * (rendering[:, 2] + 1) * there))

    aperture = dice.uniform(count) < 0.5
    edge = dice.uniform(count, low=0.88, high=1.1)
    outside = (1 - inside(distance_from_middle - each(edge), 0.02)) * each(aperture.float())
    images = paint(images, dice.uniform(count, 1).expand(count, 3) * 0.08, outside)
    variants = ["aperture" if round_one else "no aperture" for round_one in aperture.tolist()]
    return Pictures(images.clamp(0, 1), ["vessels"] * count, variants, colours, geometry, rendering)


def branching_lines(dice: Dice, start_x: torch.Tensor, start_y: torch.Tensor, geometry: torch.Tensor) -> torch.Tensor:
    """How much of each pixel lines cover that leave (start_x, start_y) and fork twice: (count, 1, 64, 64) in [0, 1]."""
    count = len(start_x)
    angle = dice.uniform(count, 1, high=2 * torch.pi) + torch.arange(4) * torch.pi / 2 + dice.normal(count, 4) * 0.3
    x, y = start_x[:, None].expand(count, 4), start_y[:, None].expand(count, 4)
    width = (0.035 + 0.02 * geometry[:, 4:5]).expand(count, 4)
    bend = dice.normal(count, 4) * (0.15 + 0.1 * geometry[:, 3:4])
    lines = []
    for level, segments in enumerate((5, 5, 3)):
        length = 0.11 + 0.05 * geometry[:, 5:6]
        for _ in range(segments):
            next_x, next_y = x + length * angle.cos(), y + length * angle.sin()
            lines.append(torch.stack([x, y, next_x, next_y, width], 2))
            x, y, angle = next_x, next_y, angle + bend
            width = width * 0.93
        if level < 2:  # every line forks: one part stays almost straight, the other turns away
            away = dice.uniform(count, x.shape[1], low=0.3, high=0.9) * dice.normal(count, x.shape[1]).sign()
            angle = torch.cat([angle - away * 0.3, angle + away], 1)
            x, y, width, bend = (torch.cat([v, v], 1) for v in (x, y, width * 0.75, bend))
            bend = bend + dice.normal(count, bend.shape[1]) * 0.08
    x0, y0, x1, y1, width = torch.cat(lines, 1).unbind(2)  # (count, lines) each

    # On every second pixel: distances to a hundred lines are what takes time.
    grid_x, grid_y = (v[..., ::2, ::2].reshape(1, 1, -1) + 1 / CANVAS for v in canvas())
    nearest = torch.full((count, grid_x.shape[2]), 10.0)
    for part in torch.arange(x0.shape[1]).split(20):  # 20 at a time: all at once would take half a gigabyte
        ax, ay, bx, by = (v[:, part, None] for v in (x0, y0, x1 - x0, y1 - y0))
        along = (((grid_x - ax) * bx + (grid_y - ay) * by) / (bx**2 + by**2 + 1e-8)).clamp(0, 1)
        distance = ((grid_x - ax - along * bx) ** 2 + (grid_y - ay - along * by) ** 2 + 1e-8).sqrt()
        nearest = torch.minimum(nearest, (distance - width[:, part, None]).amin(1))
    nearest = nearest.view(count, 1, CANVAS // 2, CANVAS // 2)
    return inside(F.interpolate(nearest, size=CANVAS, mode="bilinear", align_corners=False), 0.015)
