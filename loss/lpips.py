"""LPIPS perceptual distance (Zhang et al., arXiv 1801.03924): VGG16 features, v0.1 linear heads.

State-dict keys are those of taming-transformers, which the published heads in `vgg.pth` use as well.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from models.numerics import channels_last, checkpointed_call, float32_or_wider

# torchvision VGG16 `features` indices of each slice; a slice ends in relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
SLICES = (range(4), range(4, 9), range(9, 16), range(16, 23), range(23, 30))
CHANNELS = (64, 128, 256, 512, 512)
EPS = 1e-10


class ScalingLayer(nn.Module):
    """ImageNet normalisation of images in [-1, 1]."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class VGG16Features(nn.Module):
    """Features of VGG16 at five depths; its layers have torchvision's indices as names.

    With `recompute`, each slice is computed again in the backward pass.
    """

    recompute = False

    def __init__(self):
        super().__init__()
        from torchvision.models.vgg import cfgs, make_layers

        layers = make_layers(cfgs["D"])  # without VGG16's classifier, which takes a second to initialise
        for number, indices in enumerate(SLICES, start=1):
            setattr(self, f"slice{number}", nn.Sequential(OrderedDict((str(i), layers[i]) for i in indices)))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for block in self.children():
            x = checkpointed_call(block, x, recompute=self.recompute)
            features.append(x)
        return features


class LPIPS(nn.Module):
    """Frozen perceptual distance, in float32 even under autocast: squares and norms exceed half precision's range."""

    def __init__(self):
        super().__init__()
        self.scaling_layer = ScalingLayer()
        self.net = VGG16Features()
        for i, channels in enumerate(CHANNELS):
            head = nn.Sequential(OrderedDict({"1": nn.Conv2d(channels, 1, 1, bias=False)}))
            setattr(self, f"lin{i}", nn.Sequential(OrderedDict(model=head)))
        self.requires_grad_(False)
        channels_last(self)

    def forward(self, image: Tensor, recon: Tensor) -> Tensor:
        """Distance (B,1,1,1) of each pair of images (B,3,R,R) in [-1, 1], R at least 16; gradient to `recon` only."""
        with torch.autocast(image.device.type, enabled=False):
            with torch.no_grad():
                targets = [unit(f) for f in self.net(self.scaling_layer(float32_or_wider(image)))]
            features = [unit(f) for f in self.net(self.scaling_layer(float32_or_wider(recon)))]
            heads = [getattr(self, f"lin{i}") for i in range(len(CHANNELS))]
            distances = [
                head((target - feature).square()).mean((2, 3), keepdim=True)
                for head, target, feature in zip(heads, targets, features, strict=True)
            ]
        return torch.stack(distances).sum(0)


def unit(features: Tensor) -> Tensor:
    """Features (B,C,h,w) scaled to unit length over channels.

    The clamp changes no value, but makes the square root's gradient 0 instead of NaN where all channels are zero.
    """
    norm = features.square().sum(1, keepdim=True).clamp_min(1e-30).sqrt()
    return features / (norm + EPS)
