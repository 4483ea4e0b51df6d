"""Good files for every script, and flags with which it does its work on them."""

from pathlib import Path

import numpy as np

import published
from images import make_data
from scripts import TINY, TINY_SIT

LITE0 = ("--features", "efficientnet-lite0", "--num-workers", 0)


def write_good_files(root: Path) -> dict[str, Path]:
    """A tree of images and their data in five shards, a VAE, runs in the published layout, a set of images; by name."""
    data, vae = make_data(root, per_class=6, shard_images=4), published.write_vae(root / "vae")
    np.savez(root / "images.npz", arr_0=np.random.RandomState(0).randint(0, 256, (5, 32, 32, 3)).astype(np.uint8))
    return {
        "root": root,
        "tree": root / "tree",
        "data": data,
        "vae": vae,
        "images": root / "images.npz",
        "joint": root / "joint",
        "joint_ckpt": published.write_run(root / "joint", joint=True),
        "frozen": root / "frozen",
        "frozen_ckpt": published.write_run(root / "frozen", joint=False, vae_ckpt=vae),
    }


def cache_flags(data: Path, vae: Path, out: Path | None = None, name: str = "latents") -> tuple:
    """Flags with which cache_latents.py caches by a VAE of the published layout, beside the images if not elsewhere."""
    where = ("--data-dir", data, "--output-dir", out or data, "--vae-latents-name", name, "--num-workers", 0)
    return (*where, "--vae-arch", published.VAE, "--vae-ckpt-path", vae)


def good_flags(script: str, good: dict[str, Path], out: Path) -> list:
    """Flags with which a script does its work on good files and writes to `out`; "vgg" among them for LPIPS."""
    folders = ("--data-dir", good["data"], "--output-dir", out / "exps", "--exp-name", "run")
    train = (*TINY, *TINY_SIT, *folders, "--vae-ckpt", good["vae"])
    lpips = ("--lpips-vgg-ckpt", good.get("vgg"))
    sets = ("--samples", good["images"], "--reference", good["images"])
    reconstruction = ("--vae", good["vae"], "--vae-arch", published.VAE, "--data-dir", good["data"], *lpips)
    sampling = ("--num-fid-samples", 2, "--num-steps", 1)
    return {
        "preprocessing.py": ["--imagenet-path", good["tree"], "--output-path", out, "--num-workers", 2],
        "dataset.py": ["--verify", good["data"]],
        "train_vae.py": [*TINY, *folders, *lpips],
        "train_repae.py": [*train, *lpips],
        "train_ldm_only.py": [*train, "--vae-latents-name", "latents"],
        "cache_latents.py": [*cache_flags(good["data"], good["vae"], out)],
        "generate.py": ["--exp-path", good["joint"], "--sample-dir", out, *sampling],
        "save_vae_weights.py": ["--repae-ckpt", good["joint_ckpt"], "--save-dir", out, "--vae-name", "e2e"],
        "evaluate.py": [*sets, *LITE0, "--output", out / "result.json"],
        "reconstruction": [*reconstruction, *LITE0, "--output", out / "result.json"],
    }[script]
