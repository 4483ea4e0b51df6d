"""Memory of a joint step by component, estimated on tensors without memory on a simulated GPU.

    python -m benchmarks.memory --vae f8d4 --model SiT-XL/2 --mixed-precision bf16

What the backward pass needs is counted in the forward pass, per image of the batch. Weights, gradients, moments, EMA
and the casts of weights do not depend on the batch. Workspaces of libraries and fragmentation are not counted.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.flops import add_network_flags, build_batch, build_nets
from errors import Parser, run_script
from flags.types import COUNT
from models.autoencoder import AutoencoderKL, pixels_to_image
from models.numerics import AUTOCAST_DTYPES, autocast_factory
from train_repae import JointNets
from training.distributed import frozen_call
from training.loop import Batch
from training.randomness import Draws

CUDA = torch.device("cuda", 0)
# torch.autocast does nothing where there is no GPU
HAS_GPU = {"torch.cuda.amp.common.amp_definitely_not_available": False, "torch.cuda.is_bf16_supported": True}


@contextmanager
def simulated_gpu(*sizes: object) -> Iterator[JointNets]:
    """Networks as `build_nets(*sizes)` makes them on a GPU that need not exist.

    Within, tensors have a device, a dtype and a shape but no values: to read one fails, and so does a backward pass.
    """
    with torch.device("meta"):
        nets = build_nets(*sizes)
    with FakeTensorMode(), ExitStack() as stack:
        for name, answer in HAS_GPU.items():
            stack.enter_context(patch(name, lambda *_, answer=answer: answer))
        for network in (nets.vae, nets.discriminator, nets.lpips, nets.sit, nets.ema, *nets.encoders):
            for module in network.modules():
                for tensors in (module._parameters, module._buffers):
                    tensors.update({name: on_gpu(x) for name, x in tensors.items() if x is not None})
        nets.lecam = torch.zeros(2, device=CUDA)
        yield nets


def on_gpu(x: Tensor) -> Tensor:
    """A tensor like `x`, a parameter if it is one."""
    copy = torch.empty(x.shape, dtype=x.dtype, device=CUDA)
    return nn.Parameter(copy, x.requires_grad) if isinstance(x, nn.Parameter) else copy


class KeptBytes:
    """Bytes that forward passes keep for their backward passes, by the part that `within` names."""

    def __init__(self, nets: JointNets):
        networks = (nets.vae, nets.discriminator, nets.lpips, nets.sit, *nets.encoders)
        self.seen = {p.untyped_storage()._cdata for network in networks for p in network.state_dict().values()}
        self.parts: Counter[str] = Counter()
        self.alive: list[Tensor] = []  # so that no storage is taken for an earlier one
        self.part = ""

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        before, self.part = self.part, part
        with torch.autograd.graph.saved_tensors_hooks(self.keep, lambda x: x):
            yield
        self.part = before

    def keep(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.alive.append(x)
            self.parts[self.part] += storage.nbytes()
        return x

    def by_level(self, vae: AutoencoderKL) -> None:
        """Count the levels of encoder and decoder apart; 0 is full resolution."""
        for name, levels in (("encoder", vae.encoder.down), ("decoder", vae.decoder.up)):
            for number, level in enumerate(levels):
                for stage in level.stages():
                    self.name_calls(stage, f"VAE's {name}, level {number}")

    def name_calls(self, module: nn.Module, part: str) -> None:
        before = []
        module.register_forward_pre_hook(lambda *_: before.append(self.part) or setattr(self, "part", part))
        module.register_forward_hook(lambda *_: setattr(self, "part", before.pop()))


def kept_bytes(nets: JointNets, batch: Batch, draws: Draws, precision: str) -> Counter[str]:
    """Bytes that each part of the joint step keeps until its backward pass."""
    kept, autocast = KeptBytes(nets), autocast_factory(CUDA, precision)
    kept.by_level(nets.vae)
    image = pixels_to_image(batch.pixels)
    with autocast(), kept.within("VAE, other layers"):
        _, z, recon = nets.vae(image, draws.posterior)
    with kept.within("LPIPS"):
        nets.lpips(image, recon)
    with kept.within("generator's term"), autocast():
        frozen_call(nets.discriminator, recon)
    with kept.within("alignment through the transformer"), autocast():
        frozen_call(nets.sit, z, draws.t, batch.labels, depth=nets.sit.encoder_depth)
    with kept.within("transformer's update"), autocast():
        nets.sit(z.detach(), draws.t, batch.labels)
    return kept.parts


def fixed_bytes(nets: JointNets) -> dict[str, int]:
    """Bytes that do not depend on the batch, in float32."""
    trained = sum(
        p.numel() for n in (nets.vae, nets.discriminator, nets.sit) for p in n.parameters() if p.requires_grad
    )
    frozen = sum(p.numel() for n in (nets.lpips, *nets.encoders) for p in n.parameters())
    ema = sum(p.numel() for p in nets.ema.parameters())
    return {
        "weights": 4 * trained,
        "gradients": 4 * trained,
        "moments": 8 * trained,
        "EMA": 4 * ema,
        "frozen": 4 * frozen,
    }


def main() -> None:
    parser = Parser(__doc__)
    add_network_flags(parser)
    parser.add_argument("--mixed-precision", choices=tuple(AUTOCAST_DTYPES), default="bf16", help="(default: bf16)")
    parser.add_argument("--recompute-levels", type=COUNT, default=0, help="as of train_repae.py (default: 0)")
    args = parser.parse_args()
    with simulated_gpu(args.vae, args.model, args.enc_type, args.resolution, args.encoder_depth) as nets:
        nets.vae.recompute(args.recompute_levels)
        with CUDA:
            batches = [build_batch(args.vae, args.resolution, images) for images in (1, 2)]
        one, two = (kept_bytes(nets, *batch, args.mixed_precision) for batch in batches)
        an_image = Counter({name: two[name] - one[name] for name in two})
        casts = one.total() - an_image.total()
        for name, size in {**fixed_bytes(nets), "casts of weights": casts}.items():
            print(f"{name}: {size / 1e9:,.2f} GB")
        for name, size in an_image.most_common():
            print(f"{name}: {size / 1e6:,.0f} MB an image")
        for_vae = an_image.total() - an_image["transformer's update"]  # which comes after the VAE's backward pass
        print(f"all but the transformer's update: {for_vae / 1e6:,.0f} MB an image")


if __name__ == "__main__":
    run_script(main)
