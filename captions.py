"""Captions: a data set for text to image that is drawn on the fly, without a download.

A picture (3, 28, 28) shows one or two shapes in six colours on black, and its caption says what:
"a green ring", "a red cross left of a blue disc", "a yellow bar above a cyan square". Some pairs of
colour and shape are never drawn, so that one can measure whether a network composes them.
`judge` decides by formula whether a picture shows what its caption says.
"""

import torch
import torch.nn.functional as F

from harness import UserError

SIZE, LENGTH = 28, 8               # pixels per side, words of the longest caption
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0),
           "magenta": (1, 0, 1), "cyan": (0, 1, 1)}
SHAPES = ("disc", "square", "triangle", "ring", "cross", "bar")
WORDS = ("", "a", "left", "of", "above", *COLOURS, *SHAPES)    # a word's token is its place here
HELD_OUT = (("red", "ring"), ("green", "bar"), ("blue", "triangle"), ("yellow", "cross"))
FIRST_COLOUR, FIRST_SHAPE = WORDS.index("red"), WORDS.index("disc")   # tokens
PAIRS = torch.tensor([[c, s] for c, colour in enumerate(COLOURS) for s, shape in enumerate(SHAPES)
                      if (colour, shape) not in HELD_OUT])     # (32, 2), those that are drawn
EXAMPLES = ("a green ring", "a red cross left of a blue disc", "a yellow bar above a cyan square",
            "a magenta triangle", "a red ring", "a blue triangle left of a green bar",
            "a cyan disc above a red square", "a yellow cross", "a green square left of a red disc",
            "a blue bar")


# ----------------------------------------------------------------------------------- captions


def tokens(captions):
    """A list of captions -> their words' numbers, int64 (n, LENGTH), zeros behind the last word.

    The empty caption is the null condition. Raises UserError for unknown or too many words.
    """
    rows = torch.zeros(len(captions), LENGTH, dtype=torch.long)
    for row, caption in zip(rows, captions):
        words = caption.lower().split()
        if unknown := [word for word in words if word not in WORDS]:
            raise UserError(f"the caption {caption!r} has the unknown word {unknown[0]!r}; the "
                            f"words are {', '.join(WORDS[1:])}")
        if len(words) > LENGTH:
            raise UserError(f"the caption {caption!r} has {len(words)} words, and {LENGTH} are the "
                            "most; shorten it")
        row[:len(words)] = torch.tensor([WORDS.index(word) for word in words])
    return rows


def caption(colours, shapes, relation):
    """Tokens (n, LENGTH) of scenes: colours and shapes int64 (n, 2), relation int64 (n,).

    relation: 0 for the first object alone, 1 for "left of", 2 for "above".
    """
    a, left, of, above = (torch.full_like(relation, WORDS.index(w)) for w in WORDS[1:5])
    first, second = ([a, FIRST_COLOUR + colours[:, k], FIRST_SHAPE + shapes[:, k]] for k in (0, 1))
    none = torch.zeros_like(a)
    forms = [[*first, *[none] * 5], [*first, left, of, *second], [*first, above, *second, none]]
    forms = torch.stack([torch.stack(form, 1) for form in forms])          # (3, n, LENGTH)
    return forms[relation, torch.arange(len(relation))]


def scenes(n, generator=None, pairs=PAIRS):
    """Random colours, shapes (n, 2) and relations (n,): 40 % one object, 30 % each relation."""
    chosen = pairs[torch.randint(len(pairs), (n, 2), generator=generator)]
    relation = (torch.rand(n, generator=generator) * 10).long()
    return chosen[..., 0], chosen[..., 1], (relation >= 4).long() + (relation >= 7).long()


# ----------------------------------------------------------------------------------- pictures


def draw(colours, shapes, relation, generator=None):
    """Pictures of scenes, float32 (n, 3, SIZE, SIZE) in [-1, 1], with jitter of size and place."""
    n, middle = len(relation), SIZE / 2
    jitter = torch.rand(n, 2, 3, generator=generator)
    two = (relation > 0)[:, None]
    radius = torch.where(two, 4.2 + 1.3 * jitter[..., 0], 6 + 3 * jitter[..., 0])

    # one object lies near the middle; two lie in halves, free to move along the border of these
    along = middle + torch.tensor([-7.0, 7.0]) + 2.0 * (jitter[..., 1] - 0.5)
    across = middle + 8.0 * (jitter[..., 2] - 0.5)
    alone = middle + 4.0 * (jitter[..., 1:] - 0.5)
    above = (relation == 2)[:, None]
    x = torch.where(two, torch.where(above, across, along), alone[..., 0])
    y = torch.where(two, torch.where(above, along, across), alone[..., 1])

    rgb = torch.tensor(list(COLOURS.values()), dtype=torch.float32)[colours]   # (n, 2, 3)
    cover = coverage(shapes, x, y, radius)                                 # (n, 2, SIZE, SIZE)
    cover[:, 1] *= two[:, :, None]
    return 2 * torch.einsum("nohw,noc->nchw", cover, rgb).clamp(max=1) - 1


def coverage(shapes, x, y, r):
    """How much of each pixel a shape covers, in 0 ... 1; all (n, 2) -> (n, 2, SIZE, SIZE)."""
    pixel = torch.arange(SIZE) + 0.5
    r = r[..., None, None]
    u, v = torch.broadcast_tensors(pixel - x[..., None, None], (pixel - y[..., None])[..., None])
    au, av, distance = u.abs(), v.abs(), (u.square() + v.square()).sqrt()
    signed = torch.stack([                         # distance to the edge, negative inside
        distance - r,
        torch.maximum(au, av) - 0.85 * r,
        torch.maximum(0.866 * au - 0.5 * v, v) - 0.6 * r,
        (distance - 0.72 * r).abs() - 0.28 * r,
        torch.minimum(torch.maximum(au - r, av - r / 3), torch.maximum(au - r / 3, av - r)),
        torch.maximum(au - r, av - r / 2.6),
    ])
    chosen = shapes[..., None, None].expand(u.shape)[None]
    return (0.5 - signed.gather(0, chosen)[0]).clamp(0, 1)


class Captions:
    """The data set: endless, every batch is drawn anew; y are tokens int64 (n, LENGTH)."""

    size, key, shape = None, "captions-1", (3, SIZE, SIZE)

    def __init__(self, conditional=True):
        self.conditional = conditional

    def batch(self, n, draws):
        scene = scenes(n * draws.world, draws.generator)
        z0 = draws.mine(draw(*scene, draws.generator))
        return z0, draws.mine(caption(*scene)) if self.conditional else None

    def conditions(self, n, generator):
        """Captions of n samples that are still to be made, int64 (n, LENGTH), or None."""
        return caption(*scenes(n, generator)) if self.conditional else None

    def decode(self, z0):
        return z0


# -------------------------------------------------------------------------------------- judge


def mask_of(pictures):
    """How much an object covers each pixel, (n, 3, h, w) -> (n, h, w); faint noise counts as 0."""
    return ((pictures.amax(1) + 0.2) / 1.2).clamp(0, 1)


def moments(mask):
    """Mass, centre u and v, and spread of masks (n, h, w), each float (n,), in pixels."""
    v, u = torch.meshgrid(*(torch.arange(k) + 0.5 for k in mask.shape[1:]), indexing="ij")
    mass = mask.sum((1, 2)).clamp(min=1e-6)
    cu, cv = ((mask * c).sum((1, 2)) / mass for c in (u, v))
    away = (u - cu[:, None, None]).square() + (v - cv[:, None, None]).square()
    return mass, cu, cv, ((mask * away).sum((1, 2)) / mass).sqrt().clamp(min=0.5)


def normalised(mask, side=16):
    """Masks (n, h, w) -> (n, side * side): moved and scaled to one centre and spread, mean 0."""
    n, h, w = mask.shape
    _, cu, cv, spread = moments(mask)
    steps = spread[:, None] * torch.linspace(-2, 2, side)                  # (n, side)
    at_u, at_v = (cu[:, None] + steps) * 2 / w - 1, (cv[:, None] + steps) * 2 / h - 1
    grid = torch.stack([at_u[:, None, :].expand(n, side, side),
                        at_v[:, :, None].expand(n, side, side)], dim=-1)
    flat = F.grid_sample(mask[:, None], grid, align_corners=False).flatten(1)
    return F.normalize(flat - flat.mean(1, keepdim=True), dim=1)


def what(picture):
    """Colour and shape of the one object in pictures (n, 3, h, w), int64 (n,) each.

    The colour is the nearest direction of the mean rgb, the shape the nearest template.
    """
    light, mask = ((picture + 1) / 2).clamp(0, 1), mask_of(picture)
    rgb = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    mean = F.normalize((light * mask[:, None]).sum((2, 3)), dim=1)
    every, middle = torch.arange(len(SHAPES))[:, None], torch.full((len(SHAPES), 1), SIZE / 2)
    templates = normalised(coverage(every, middle, middle, middle / 1.75)[:, 0])
    return (mean @ F.normalize(rgb, dim=1).T).argmax(1), (normalised(mask) @ templates.T).argmax(1)


def judge(pictures, y):
    """Whether pictures (n, 3, SIZE, SIZE) show their captions y (n, LENGTH): a dict of bool (n,).

    colour, shape: of every object. relation: one object is alone; of two, each lies in its half,
    and further from the other along the relation than across. all: the three together.
    """
    n, half = len(y), SIZE // 2
    right = {name: torch.zeros(n, dtype=torch.bool) for name in ("colour", "shape", "relation")}
    left, above = (y[:, 3] == WORDS.index(word) for word in ("left", "above"))
    relation = left.long() + 2 * above.long()
    for kind, places in enumerate(([1], [1, 6], [1, 5])):      # where the colours' words stand
        rows = relation == kind
        if not rows.any():
            continue
        parts = [pictures[rows]] if kind == 0 else pictures[rows].split(half, dim=4 - kind)
        found = [what(part) for part in parts]
        for k, (name, token) in enumerate((("colour", FIRST_COLOUR), ("shape", FIRST_SHAPE))):
            asked = [y[rows, p + k] - token for p in places]
            right[name][rows] = torch.stack([f[k] == a for f, a in zip(found, asked)]).all(0)

        masses = [moments(mask_of(part)) for part in parts]
        if kind == 0:
            right["relation"][rows] = masses[0][3] < 7.5       # a second object would spread it
        else:
            (m1, *c1, _), (m2, *c2, _) = masses
            across = (c1[kind % 2] - c2[kind % 2]).abs()       # v for left of, u for above
            along = (c1[kind - 1] - c2[kind - 1] - half).abs()
            right["relation"][rows] = (torch.minimum(m1, m2) > 10) & (across < along)
    return right | {"all": torch.stack([*right.values()]).all(0)}


def questions(n, seed=0):
    """n captions to measure by, int64 (n, LENGTH): half of drawn pairs, half with one held out."""
    generator = torch.Generator().manual_seed(seed)
    colours, shapes, relation = scenes(n, generator)
    unseen = torch.tensor([[list(COLOURS).index(c), SHAPES.index(s)] for c, s in HELD_OUT])
    chosen = unseen[torch.randint(len(unseen), (n // 2,), generator=generator)]
    colours[: n // 2, 0], shapes[: n // 2, 0] = chosen.T
    return caption(colours, shapes, relation)


def scores(pictures, y):
    """`judge` by kind of caption: {what is right: bool (k,), of the captions that it is about}."""
    right, two = judge(pictures, y), y[:, 3] > 0
    held_out = torch.zeros(len(y), dtype=torch.bool)
    for colour, shape in HELD_OUT:
        for place in (1, 5, 6):
            held_out |= ((y[:, place] == WORDS.index(colour))
                         & (y[:, place + 1] == WORDS.index(shape)))
    return {"all right, one object": right["all"][~held_out & ~two],
            "all right, two objects": right["all"][~held_out & two],
            "all right, pairs never drawn": right["all"][held_out],
            **{name: right[name][~held_out] for name in ("colour", "shape", "relation")}}
