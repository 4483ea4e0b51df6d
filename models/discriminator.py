"""The PatchGAN discriminator (Isola et al., arXiv 1611.07004) of latent diffusion's autoencoders."""

from torch import Tensor, nn

from models.numerics import GlobalBatchNorm2d, channels_last

SMALLEST_IMAGE = 24  # side in pixels for which there is one logit


class PatchDiscriminator(nn.Module):
    """Logits of overlapping patches: image (B,3,R,R) in [-1, 1] -> (B,1,r,r).

    Three stride-2 layers from width 64, LeakyReLU 0.2, batch normalisation with statistics of the global batch.
    """

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            before, after = width * 2 ** (i - 1), width * 2**i
            stride = 2 if i < layers else 1
            blocks += [nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False)]
            blocks += [GlobalBatchNorm2d(after), nn.LeakyReLU(0.2)]
        blocks += [nn.Conv2d(width * 2**layers, 1, 4, padding=1)]
        self.main = nn.Sequential(*blocks)
        self.apply(initialise)
        channels_last(self)

    def forward(self, *batches: Tensor) -> tuple[Tensor, ...]:
        """Logits of each batch, each normalised by its own statistics.

        Real and fake images are arguments of one call, because DistributedDataParallel needs one forward per backward.
        """
        return tuple(self.main(images) for images in batches)


def initialise(module: nn.Module) -> None:
    """The GAN initialisation: convolutions N(0, 0.02), batch norm weights N(1, 0.02) and biases 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
