"""Files in the layout of the reference's published ones, at tiny sizes: VAEs, joint and frozen-VAE runs, HDF5 data.

Published checkpoints hold their flags as an argparse.Namespace, keys carry the prefixes of wrappers, and flags that
came later are absent.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models.autoencoder import VAE_CONFIGS, AutoencoderKL
from models.discriminator import PatchDiscriminator
from models.sit import SiT, SiT_models

VAE, MODEL, CLASSES, STEP = "f4d4-tiny", "SiT-XXS/2", 3, 400000
# what the reference's args.json says of a run, but for what older ones lack: path_type, cfg_prob, qk_norm, ema_decay...
FLAGS = {
    "model": MODEL,
    "vae": VAE,
    "num_classes": CLASSES,
    "encoder_depth": 2,
    "resolution": 32,
    "enc_type": "efficientnet-lite0",
}
STATISTICS = {"latents_scale": torch.tensor([0.5, 1, 2, 4.0]), "latents_bias": torch.tensor([0.1, -0.2, 0.3, 0.0])}


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def fresh_vae(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    return VAE_CONFIGS[VAE].build().eval()


def fresh_sit(seed: int = 1) -> SiT:
    """A transformer of random weights, final layer included, with the statistics above in its normaliser."""
    torch.manual_seed(seed)
    sit = SiT_models[MODEL](input_size=8, num_classes=CLASSES, z_dims=(112,), encoder_depth=2)
    for parameter in sit.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    sit.set_latent_statistics(*(value.reshape(1, -1, 1, 1) for value in STATISTICS.values()))
    return sit.eval()


def write_vae(folder: Path, seed: int = 0) -> Path:
    """A VAE's three files; returns the one of its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sdvae.pt"
    torch.save(prefixed(fresh_vae(seed).state_dict(), "module."), path)
    torch.save(
        {key: value.reshape(1, -1, 1, 1) for key, value in STATISTICS.items()}, folder / "sdvae-latents-stats.pt"
    )
    torch.save(PatchDiscriminator().state_dict(), folder / "sdvae-discriminator-ckpt.pt")
    return path


def optimizer_state(network: nn.Module) -> dict:
    """What AdamW saves before its first step, over all parameters as the reference lists them."""
    return torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0).state_dict()


def write_run(
    folder: Path, joint: bool, vae_ckpt: Path | None = None, args_json: bool = True, args_inside: bool = True
) -> Path:
    """A run's folder with the checkpoint of step 400000; returns the checkpoint's path."""
    (folder / "checkpoints").mkdir(parents=True)
    sit, vae, discriminator = fresh_sit(), fresh_vae(), PatchDiscriminator()
    flags = {**FLAGS, "vae_ckpt": str(vae_ckpt)}
    content = {
        "model": prefixed(sit.state_dict(), "module."),
        "ema": prefixed(sit.state_dict(), "_orig_mod."),
        "opt": optimizer_state(sit),
        "steps": STEP,
    }
    if args_inside:
        content["args"] = argparse.Namespace(**flags)
    if joint:
        content |= {
            "vae": prefixed(vae.state_dict(), "module._orig_mod."),
            "discriminator": prefixed(discriminator.state_dict(), "module."),
            "opt_vae": optimizer_state(vae),
            "opt_disc": optimizer_state(discriminator),
        }
    if args_json:
        (folder / "args.json").write_text(json.dumps(flags))
    path = folder / "checkpoints" / f"{STEP:07d}.pt"
    torch.save(content, path)
    return path


# forms in which others publish the weights of a transformer, for `transformer_in`
FORMS = ("REPA", "bare", "ema", "model", "state_dict")


def transformer_in(form: str, sit: SiT) -> dict:
    """A checkpoint of others: no normaliser, and flags only in REPA's, which name no VAE."""
    state = {key: value for key, value in sit.state_dict().items() if not key.startswith("bn.")}
    flags = argparse.Namespace(**{key: value for key, value in FLAGS.items() if key != "vae"})
    if form == "REPA":
        return {"model": fresh_sit(5).state_dict(), "ema": state, "opt": {}, "args": flags, "steps": STEP}
    return state if form == "bare" else {form: prefixed(state, "module.")}


def write_foreign_run(folder: Path, form: str, flags: dict) -> Path:
    """A run's folder whose one checkpoint is of that form, and its args.json."""
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(transformer_in(form, fresh_sit()), folder / f"checkpoints/{STEP:07d}.pt")
    (folder / "args.json").write_text(json.dumps(flags))
    return folder


def write_hdf5_images(path: Path, images: list[Tensor], labels: list[int]) -> None:
    """images.h5: a data set of PNG bytes an image, and their labels."""
    import h5py
    from PIL import Image

    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(images))]
    with h5py.File(path, "w") as file:
        for name, image in zip(names, images, strict=True):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(png := io.BytesIO(), "png")
            file.create_dataset(name, data=np.frombuffer(png.getvalue(), np.uint8))
        labelled = json.dumps({"labels": list(zip(names, labels, strict=True))}).encode()
        file.create_dataset("dataset.json", data=np.frombuffer(labelled, np.uint8))
