"""Captions: data sets for text to image that are drawn on the fly.

A picture (3, 28, 28) shows one or two objects in six colours on black, and its caption says what:
"a green ring", "a red cross left of a blue disc", "a yellow bar above a cyan square". The objects
are shapes, drawn by formula, or MNIST's digits ("a red three left of a blue seven"), which are
harder to learn. Some pairs of colour and object are never drawn, so that one can measure whether a
network composes them. `Captions.judge` decides whether a picture shows what its caption says.
"""

import torch
import torch.nn.functional as F

from harness import UserError

SIZE, LENGTH = 28, 8               # pixels per side, words of the longest caption
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0),
           "magenta": (1, 0, 1), "cyan": (0, 1, 1)}
RGB = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
WORDS = ("", "a", "left", "of", "above", *COLOURS)             # then come the names of the objects
FIRST_COLOUR, FIRST_OBJECT = WORDS.index("red"), len(WORDS)     # tokens: a word's is its place
SHAPES = ("disc", "square", "triangle", "ring", "cross", "bar")
ONE, TWO = 0.8, 0.6               # the scale of a digit alone, and of each of two
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OBJECTS = {"captions": SHAPES, "captions-digits": DIGITS}
HELD_OUT = {"captions": ("red ring", "green bar", "blue triangle", "yellow cross"),
            "captions-digits": ("red three", "green eight", "blue one", "yellow five",
                                "magenta nine", "cyan two")}
EXAMPLES = {
    "captions": ("a green ring", "a red cross left of a blue disc",
                 "a yellow bar above a cyan square", "a magenta triangle", "a red ring",
                 "a blue triangle left of a green bar", "a cyan disc above a red square",
                 "a yellow cross", "a green square left of a red disc", "a blue bar"),
    "captions-digits": ("a green five", "a red three left of a blue seven",
                        "a yellow nine above a cyan two", "a magenta four", "a red three",
                        "a blue one left of a green eight", "a cyan zero above a red six",
                        "a yellow five", "a green seven left of a red four", "a blue eight")}


# ----------------------------------------------------------------------------------- captions


def tokens(captions, dataset="captions"):
    """A list of captions -> their words' numbers, int64 (n, LENGTH), zeros behind the last word.

    The empty caption is the null condition. Raises UserError for unknown or too many words.
    """
    known, rows = (*WORDS, *OBJECTS[dataset]), torch.zeros(len(captions), LENGTH, dtype=torch.long)
    for row, caption in zip(rows, captions):
        words = caption.lower().split()
        if unknown := [word for word in words if word not in known]:
            raise UserError(f"the caption {caption!r} has the unknown word {unknown[0]!r}; the "
                            f"words are {', '.join(known[1:])}")
        if len(words) > LENGTH:
            raise UserError(f"the caption {caption!r} has {len(words)} words, and {LENGTH} are the "
                            "most; shorten it")
        row[:len(words)] = torch.tensor([known.index(word) for word in words])
    return rows


def dataset_of(prompts):
    """The data set that knows the words of prompts: that of digits if they name one."""
    words = set(" ".join(prompts).lower().split())
    return "captions-digits" if words & set(DIGITS) else "captions"


def caption(colours, objects, relation):
    """Tokens (n, LENGTH) of scenes: colours and objects int64 (n, 2), relation int64 (n,).

    relation: 0 for the first object alone, 1 for "left of", 2 for "above".
    """
    a, left, of, above = (torch.full_like(relation, WORDS.index(w)) for w in WORDS[1:5])
    colours, objects = FIRST_COLOUR + colours, FIRST_OBJECT + objects
    first, second = ([a, colours[:, k], objects[:, k]] for k in (0, 1))
    none = torch.zeros_like(a)
    forms = [[*first, *[none] * 5], [*first, left, of, *second], [*first, above, *second, none]]
    forms = torch.stack([torch.stack(form, 1) for form in forms])          # (3, n, LENGTH)
    return forms[relation, torch.arange(len(relation))]


def places(relation, generator=None):
    """Where objects lie: x, y, and size from 0.9 to 1.1, (n, 2) each; relations (n,) as above."""
    jitter, middle = torch.rand(len(relation), 2, 3, generator=generator), SIZE / 2
    two, above = (relation > 0)[:, None], (relation == 2)[:, None]
    # one object lies near the middle; two lie in halves, free to move along the border of these
    along = middle + torch.tensor([-7.0, 7.0]) + 1.0 * (jitter[..., 1] - 0.5)
    across = middle + 8.0 * (jitter[..., 2] - 0.5)
    alone = middle + 4.0 * (jitter[..., 1:] - 0.5)
    x = torch.where(two, torch.where(above, across, along), alone[..., 0])
    y = torch.where(two, torch.where(above, along, across), alone[..., 1])
    return x, y, 0.9 + 0.2 * jitter[..., 0]


# ------------------------------------------------------------------------------- the data sets


class Captions:
    """The data set of shapes: endless, every batch is drawn anew; y are tokens (n, LENGTH)."""

    name, size, key, shape = "captions", None, "captions-2", (3, SIZE, SIZE)

    def __init__(self, conditional=True):
        self.conditional = conditional
        self.held_out = torch.tensor([[list(COLOURS).index(colour), OBJECTS[self.name].index(kind)]
                                      for colour, kind in map(str.split, HELD_OUT[self.name])])
        every = torch.cartesian_prod(torch.arange(len(COLOURS)),
                                     torch.arange(len(OBJECTS[self.name])))
        self.pairs = every[~(every[:, None] == self.held_out).all(2).any(1)]   # those it draws

    def scenes(self, n, generator=None):
        """Random colours, objects (n, 2), relations (n,): 40 % one object, 30 % each relation."""
        chosen = self.pairs[torch.randint(len(self.pairs), (n, 2), generator=generator)]
        relation = (torch.rand(n, generator=generator) * 10).long()
        return chosen[..., 0], chosen[..., 1], (relation >= 4).long() + (relation >= 7).long()

    def draw(self, colours, objects, relation, generator=None):
        """Pictures of scenes, float32 (n, 3, SIZE, SIZE) in [-1, 1], jittered in size and place."""
        two = (relation > 0)[:, None]
        cover = self.cover(objects, *places(relation, generator), two, generator)
        cover[:, 1] *= two[:, :, None]
        return 2 * torch.einsum("nohw,noc->nchw", cover, RGB[colours]).clamp(max=1) - 1

    def cover(self, shapes, x, y, size, two, generator):
        return coverage(shapes, x, y, size * torch.where(two, 5.5, 7.5))

    def batch(self, n, draws):
        scene = self.scenes(n * draws.world, draws.generator)
        z0 = draws.mine(self.draw(*scene, draws.generator))
        return z0, draws.mine(caption(*scene)) if self.conditional else None

    def conditions(self, n, generator):
        """Captions of n samples that are still to be made, int64 (n, LENGTH), or None."""
        return caption(*self.scenes(n, generator)) if self.conditional else None

    def decode(self, z0):
        return z0

    # ---- measuring

    def questions(self, n, seed=0):
        """n captions to measure by, (n, LENGTH): half of drawn pairs, half with one held out."""
        generator = torch.Generator().manual_seed(seed)
        colours, objects, relation = self.scenes(n, generator)
        unseen = self.held_out[torch.randint(len(self.held_out), (n // 2,), generator=generator)]
        colours[: n // 2, 0], objects[: n // 2, 0] = unseen.T
        return caption(colours, objects, relation)

    def object_of(self, pictures, mask, two):
        """The one object in pictures (n, 3, h, w), int64 (n,): the nearest template's."""
        every, middle = torch.arange(len(SHAPES))[:, None], torch.full((len(SHAPES), 1), SIZE / 2)
        templates = normalised(coverage(every, middle, middle, middle / 1.75)[:, 0])
        return (normalised(mask) @ templates.T).argmax(1)

    def judge(self, pictures, y):
        """Whether pictures (n, 3, SIZE, SIZE) show their captions y: a dict of bool (n,).

        colour, object: of everything in the caption. relation: one object is alone; of two, each
        lies in its half, and further from the other along the relation than across. all: all three.
        """
        n, half = len(y), SIZE // 2
        right = {name: torch.zeros(n, dtype=torch.bool)
                 for name in ("colour", "object", "relation")}
        left, above = (y[:, 3] == WORDS.index(word) for word in ("left", "above"))
        for kind, at in enumerate(([1], [1, 6], [1, 5])):      # where the colours' words stand
            rows = left.long() + 2 * above.long() == kind
            if not rows.any():
                continue
            parts = [pictures[rows]] if kind == 0 else pictures[rows].split(half, dim=4 - kind)
            masks = [mask_of(part) for part in parts]
            colours = [colour_of(part, mask) for part, mask in zip(parts, masks)]
            objects = [self.object_of(part, mask, kind > 0) for part, mask in zip(parts, masks)]
            right["colour"][rows] = torch.stack([
                y[rows, p] - FIRST_COLOUR == found for p, found in zip(at, colours)]).all(0)
            right["object"][rows] = torch.stack([
                y[rows, p + 1] - FIRST_OBJECT == found for p, found in zip(at, objects)]).all(0)

            (m1, *c1, spread), (m2, *c2, _) = moments(masks[0]), moments(masks[-1])
            if kind == 0:
                right["relation"][rows] = spread < 7.5         # a second object would spread it
            else:
                across = (c1[kind % 2] - c2[kind % 2]).abs()   # v for left of, u for above
                along = (c1[kind - 1] - c2[kind - 1] - half).abs()
                right["relation"][rows] = (torch.minimum(m1, m2) > 5) & (across < along)
        return right | {"all": torch.stack([*right.values()]).all(0)}

    def scores(self, pictures, y):
        """`judge` by kind of caption: {what is right: bool (k,), of the captions it is about}."""
        right, two = self.judge(pictures, y), y[:, 3] > 0
        pairs = torch.stack([y[:, p : p + 2] for p in (1, 5, 6)], 1)[:, :, None]   # (n, 3, 1, 2)
        first = torch.tensor([FIRST_COLOUR, FIRST_OBJECT])
        held_out = (pairs == self.held_out + first).all(3).flatten(1).any(1)
        return {"all right, one object": right["all"][~held_out & ~two],
                "all right, two objects": right["all"][~held_out & two],
                "all right, pairs never drawn": right["all"][held_out],
                **{name: right[name][~held_out] for name in ("colour", "object", "relation")}}


class CaptionedDigits(Captions):
    """The same with MNIST's digits, uint8 (N, 1, 28, 28) and int64 (N,): `key` is that of these.

    classify tells digits (n, 1, 28, 28) in [-1, 1] apart, int64 (n,); only judging needs it.
    """

    name = "captions-digits"

    def __init__(self, images, labels, key, conditional=True, classify=None):
        super().__init__(conditional)
        self.images, self.key, self.classify = images, f"captions-digits-1-{key}", classify
        self.counts = labels.bincount(minlength=10)
        self.order = labels.argsort(stable=True)   # the digits of a kind lie side by side
        self.starts = self.counts.cumsum(0) - self.counts

    def cover(self, digits, x, y, size, two, generator):
        chance = torch.rand(digits.shape, generator=generator)
        one = self.order[self.starts[digits] + (chance * self.counts[digits]).long()].flatten()
        moved = moved_to(self.images[one].float() / 255, x.flatten(), y.flatten(),
                         (size * torch.where(two, TWO, ONE)).flatten())
        return moved.view(*digits.shape, SIZE, SIZE)

    def object_of(self, pictures, mask, two):
        """The digit in pictures (n, 3, h, w), by the classifier, on a canvas of its own."""
        _, u, v, _ = moments(mask)
        scale, middle = torch.full_like(u, 1 / (TWO if two else ONE)), SIZE / 2
        grey = ((pictures.amax(1, keepdim=True) + 1) / 2).clamp(0, 1)
        canvas = F.pad(grey, (0, SIZE - grey.shape[3], 0, SIZE - grey.shape[2]))
        centred = moved_to(canvas, middle + (middle - u) * scale, middle + (middle - v) * scale,
                           scale)
        return self.classify(2 * centred - 1)


# ------------------------------------------------------------------------------------- drawing


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


def moved_to(images, x, y, scale):
    """Images (n, 1, SIZE, SIZE) whose middle is moved to x, y (n,) and scaled by scale (n,)."""
    zero, half = torch.zeros_like(x), SIZE / 2
    theta = torch.stack([torch.stack([1 / scale, zero, (half - x) / half / scale], 1),
                         torch.stack([zero, 1 / scale, (half - y) / half / scale], 1)], 1)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


# --------------------------------------------------------------------------- reading a picture


def mask_of(pictures):
    """How much an object covers each pixel, (n, 3, h, w) -> (n, h, w); faint noise counts as 0."""
    return ((pictures.amax(1) + 0.2) / 1.2).clamp(0, 1)


def colour_of(pictures, mask):
    """The colour of the one object in pictures (n, 3, h, w): the nearest direction of mean rgb."""
    mean = (((pictures + 1) / 2).clamp(0, 1) * mask[:, None]).sum((2, 3))
    return (F.normalize(mean, dim=1) @ F.normalize(RGB, dim=1).T).argmax(1)


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
