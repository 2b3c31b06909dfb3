"""How much memory distilling Stable Diffusion 1.5 takes: `python -m study.memory`.

Nothing is loaded and nothing computed: parameters are counted on networks without data (PyTorch's
device "meta"), and so are the activations that the backward pass needs. What the GPU's libraries
and temporary results take comes on top.
"""

import torch

import model
from harness.hub import library
from harness.script import make_parser, run_script

GIB = 2**30


def stable_diffusion(**more):
    """The UNet of Stable Diffusion 1.5 with random weights, or none on the device meta."""
    return library("diffusers").UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, **more)


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def activations(network, *inputs):
    """Bytes that one forward pass keeps for the backward pass, without and with checkpointing."""
    kept = {}

    def keep(tensor):
        if torch.is_tensor(tensor):                # the tensor is held, or its address comes again
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes(), tensor

    def recomputed(block, *args):                  # keeps nothing but the block's inputs
        for argument in args:
            keep(argument)
        with torch.autograd.graph.saved_tensors_hooks(id, id):
            return block(*args)

    def total():
        with torch.autograd.graph.saved_tensors_hooks(lambda x: keep(x) or 0, id):
            network(*inputs)
        weights = {p.untyped_storage()._cdata for p in network.parameters()}
        size = sum(size for key, (size, _) in kept.items() if key not in weights)
        kept.clear()
        return size

    whole = total()
    network.enable_gradient_checkpointing(recomputed)
    return whole, total()


def rows(theta, disc, head):
    """[(name, {part: GiB})] of four ways to train, before activations; of numbers of parameters."""
    four = {"teacher": 4, "student": 4, "gradients": 4, "Adam": 8, "theta~": 4, "EMA": 4}
    frozen = disc - head
    ways = [
        ("fp32 weights, D trained", four, 16 * disc),
        ("the same in bf16 (teacher kept in bf16)", four | {"teacher": 2}, 16 * disc),
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
        unet = stable_diffusion()
        z, t, y = torch.zeros(1, 4, 64, 64), torch.ones(1), torch.zeros(1, 77, 768)
        disc = model.UNetDiscriminator(stable_diffusion(), torch.zeros(77, 768))
        counts = parameters(unet), parameters(disc), parameters(disc.head)
        plain, less = activations(unet.bfloat16().train(), *(x.bfloat16() for x in (z, t, y)))
    print(f"UNet {counts[0]:,} parameters, discriminator {counts[1]:,} (its head {counts[2]:,})\n")
    table = rows(*counts)
    print("| GiB | " + " | ".join([*table[0][1], "sum"]) + " |")
    print("|" + "---|" * (len(table[0][1]) + 2))
    for name, parts in table:
        cells = [f"{gib:.1f}" for gib in [*parts.values(), sum(parts.values())]]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(f"\nActivations of one sample in bf16: {plain / GIB:.2f} GiB, with --checkpointing "
          f"{less / GIB:.3f} GiB. The student's\ngraph holds three samples for each one of the "
          f"batch: a part of 4 samples takes {12 * plain / GIB:.0f} GiB or {12 * less / GIB:.1f} "
          f"GiB.\nUnder bf16, each call of the student also keeps its weights in bf16: two calls, "
          f"{4 * counts[0] / GIB:.1f} GiB.")


if __name__ == "__main__":
    run_script(main)
