"""How much memory distilling Stable Diffusion 1.5 takes: `python -m study.memory`.

Nothing is loaded and nothing computed: parameters are counted on networks without data (PyTorch's
device "meta"), and so are the activations that the backward pass needs. What the GPU's libraries
and temporary results take comes on top.
"""

import torch

import model
from harness.hub import library
from harness.plan import GIB, kept_bytes
from harness.script import make_parser, run_script


def stable_diffusion(**more):
    """The UNet of Stable Diffusion 1.5 with random weights, or none on the device meta."""
    return library("diffusers").UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, **more)


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def activations(unet, function):
    """GiB that function() keeps for the backward pass, without and with checkpointing."""
    return [kept_bytes(unet, function, checkpoint) / GIB
            for checkpoint in (None, unet.enable_gradient_checkpointing)]


def rows(theta, disc, head):
    """[(name, {part: GiB})] of four ways to train, before activations; of numbers of parameters."""
    four = {"teacher": 4, "student": 4, "gradients": 4, "Adam": 8, "theta~": 4, "EMA": 4}
    frozen = disc - head
    ways = [
        ("in fp32", four, 16 * disc),
        ("in bf16", four | {"teacher": 2}, 16 * disc),
        ("--ema-on-cpu --disc-trunk frozen", four | {"teacher": 2, "EMA": 0},
         2 * frozen + 16 * head),
        ("--ema-on-cpu --disc-trunk frozen --adam8bit",
         four | {"teacher": 2, "EMA": 0, "Adam": 2}, 2 * frozen + 10 * head),
    ]
    return [(name, {part: theta * each / GIB for part, each in bytes_.items()} | {
        "D": d / GIB}) for name, bytes_, d in ways]


def main(argv=None):
    make_parser(__doc__).parse_args(argv)
    with torch.device("meta"):
        unet, half = stable_diffusion(), stable_diffusion().bfloat16().train()
        disc = model.UNetDiscriminator(unet, torch.zeros(77, 768))
        counts = parameters(unet), parameters(disc), parameters(disc.head)
        z, t, y = (x.bfloat16() for x in (torch.zeros(1, 4, 64, 64), torch.ones(1),
                                          torch.zeros(1, 77, 768)))
        student = activations(half, lambda: half(z, t, y))
        half.disable_gradient_checkpointing()
        encoder = model.UNetEncoder(half)
        critic = activations(half, lambda: encoder(z, y))
    print(f"UNet {counts[0]:,} parameters, discriminator {counts[1]:,} (its head {counts[2]:,})\n")
    table = rows(*counts)
    print("| GiB | " + " | ".join([*table[0][1], "sum"]) + " |")
    print("|" + "---|" * (len(table[0][1]) + 2))
    for name, parts in table:
        cells = [f"{gib:.1f}" for gib in [*parts.values(), sum(parts.values())]]
        print(f"| {name} | " + " | ".join(cells) + " |")
    for name, times, (whole, less) in (("student", 3, student), ("discriminator", 2, critic)):
        print(f"\n{name}: one sample keeps {whole:.2f} GiB of activations in bf16, {less:.3f} GiB "
              f"with --checkpointing.\nEach sample of a batch passes {times} times, so a batch of "
              f"40 keeps {40 * times * whole:.0f} GiB or {40 * times * less:.1f} GiB.")
    print(f"\nUnder bf16, each call of the student also keeps its weights in bf16: two calls, "
          f"{4 * counts[0] / GIB:.1f} GiB.\n--grad-accum N divides the activations by N, and "
          "leaves one call at a time.")


if __name__ == "__main__":
    run_script(main)
