"""Encode and decode a picture with a tuned VAE, using diffusers and nothing of this project.

    python save_vae_weights.py --repae-ckpt exps/sit-repae/checkpoints/0400000.pt --vae-name e2e-vae --format diffusers
    python -m examples.round_trip exps/e2e-vae photo.jpg round-trip.png

writes the picture beside its reconstruction. Diffusion models take latents normalised per channel,
z_norm = (z - latents_mean)·scaling_factor / latents_std, with the values in the VAE's config.json, as in SDXL's
pipelines; the scaling_factor of a tuned VAE is 1.
"""

import argparse

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def latent_statistics(config) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, (1,C,1,1) each, in a VAE's config.

    A VAE that was not tuned, like SD's or FLUX's, has a single scaling and shift factor for all channels.
    """
    if config.latents_mean is None:
        return torch.tensor(config.shift_factor or 0.0), 1 / torch.tensor(config.scaling_factor)
    mean, std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
    return mean, std / config.scaling_factor


def open_picture(path: str, multiple: int) -> Tensor:
    """A picture as an image (1,3,H,W) in [-1, 1], cropped to sides that are multiples of `multiple`."""
    picture = Image.open(path).convert("RGB")
    if min(picture.size) < multiple:
        raise SystemExit(f"error: {path} is {picture.width}x{picture.height} pixels, expected at least {multiple}")
    picture = picture.crop((0, 0, picture.width // multiple * multiple, picture.height // multiple * multiple))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vae", help="a folder with config.json and safetensors, or a repository of the hub")
    parser.add_argument("picture", help="any picture")
    parser.add_argument("output", help="where original and reconstruction go, side by side")
    args = parser.parse_args()

    from diffusers import AutoencoderKL  # here, because importing it takes seconds

    vae = AutoencoderKL.from_pretrained(args.vae).eval()
    mean, std = latent_statistics(vae.config)
    image = open_picture(args.picture, multiple=2 ** (len(vae.config.block_out_channels) - 1))

    z = vae.encode(image).latent_dist.mean
    z_norm = (z - mean) / std
    recon = vae.decode(z_norm * std + mean).sample.clamp(-1, 1)

    both = ((torch.cat([image, recon], dim=3)[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8)
    Image.fromarray(both.numpy()).save(args.output)
    psnr = 10 * torch.log10(4 / (recon - image).square().mean())
    print(f"latents {tuple(z.shape[1:])}, normalised: mean {z_norm.mean():.3f}, std {z_norm.std():.3f}")
    print(f"PSNR {psnr:.2f} dB; original and reconstruction: {args.output}")


if __name__ == "__main__":
    main()
