"""What rounding cached encoder tokens does to frozen-VAE training: the table of docs/cached-tokens.md.

    python -m benchmarks.cached_tokens

trains a small VAE on the demo's photographs, and on it a transformer with live tokens of EfficientNet-Lite0, with
cached ones in float16 and with cached ones in int8, by two seeds, through the real scripts. Each continues where it
stopped, so an interrupted comparison goes on when it is started again.
"""

import json
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import TokenDataset, open_images
from training.cached_tokens import unpack_tokens
from training.encoder_weights import load_encoders

ROOT = Path(__file__).parent.parent
DATA, FOLDER = Path("data-demo/train"), Path("exps/cached-tokens")
VAE, ENCODER, GRID = "f4d4-tiny", "efficientnet-lite0", 8
STEPS, LAST, SEEDS, COMPARED = 200, 50, (0, 1), 512
DTYPES = ("float16", "int8")
COMMON = "--resolution 32 --batch-size 32 --num-workers 1 --report-to none --mixed-precision no"
LOSSES = ("denoising_loss", "proj_loss")


def lines() -> list[str]:
    """The command lines, in order."""
    weights = FOLDER / "vae/vae.pt"
    cached = f"--data-dir {DATA} --output-dir {DATA} --num-workers 1"
    run = f"--output-dir {FOLDER} --data-dir {DATA} {COMMON}"
    training = f"""train_ldm_only.py {run} --max-train-steps {STEPS} --vae {VAE} --vae-ckpt {weights}
        --vae-latents-name ct-latents --model SiT-XXS/1 --num-classes 10 --enc-type {ENCODER} --encoder-depth 2
        --learning-rate 5e-4"""
    return [
        "demo/cifar10.py unpack data-demo/cifar10",
        "demo/convert_lpips.py pretrained/demo/vgg16-features.pt",
        f"""preprocessing.py --imagenet-path data-demo/cifar10/train --output-path {DATA} --resolution 32
            --num-workers 2""",
        f"""train_vae.py --exp-name vae {run} --vae {VAE} --max-train-steps 60 --vae-learning-rate 1e-3
            --loss-cfg-path demo/loss.yaml --lpips-vgg-ckpt pretrained/demo/vgg16-features.pt""",
        f"cache_latents.py --vae-arch {VAE} --vae-ckpt-path {weights} --vae-latents-name ct-latents {cached}",
        *(
            f"""cache_tokens.py --enc-type {ENCODER} --token-grid {GRID} --tokens-name ct-{dtype}
                --dtype {dtype} {cached}"""
            for dtype in DTYPES
        ),
        *(
            f"{training} --exp-name {name}-{seed} --seed {seed}{flag}"
            for seed in SEEDS
            for name, flag in [("live", ""), *((dtype, f" --cached-tokens ct-{dtype}") for dtype in DTYPES)]
        ),
    ]


def losses(name: str) -> Tensor:
    """Denoising and alignment loss of every step of a run, (STEPS, 2)."""
    log = (ROOT / FOLDER / name / "metrics.jsonl").read_text(encoding="utf8").splitlines()
    return torch.tensor([[json.loads(line)[loss] for loss in LOSSES] for line in log], dtype=torch.float64)


def cosines() -> dict[str, Tensor]:
    """Cosine between live and cached tokens of the first images, every token's, by dtype."""
    args = Namespace(enc_type=ENCODER, enc_ckpt=[], resolution=32, resample_tokens=False, offline=True)
    (encoder,) = load_encoders(args, GRID, torch.device("cpu"))
    images = open_images(ROOT / DATA)
    pixels = torch.stack([images[i][0] for i in range(COMPARED)])
    live = torch.cat([encoder(part) for part in pixels.split(64)]).double()
    found = {}
    for dtype in DTYPES:
        tokens = TokenDataset(ROOT / DATA, f"ct-{dtype}")
        cached = torch.stack([unpack_tokens(*tokens[i]) for i in range(COMPARED)]).double()
        found[dtype] = F.cosine_similarity(live, cached, dim=-1)
    return found


def table() -> None:
    """Print what came out as Markdown."""
    print("\n| seed | tokens | denoising loss | alignment loss | largest difference, denoising | alignment |")
    print("|---|---|---|---|---|---|")
    for seed in SEEDS:
        live = losses(f"live-{seed}")
        for name in ("live", *DTYPES):
            run = losses(f"{name}-{seed}")
            denoising, alignment = run[-LAST:].mean(0).tolist()
            apart = "|" if name == "live" else "{:.1e} | {:.1e}".format(*(run - live).abs().amax(0).tolist())
            print(f"| {seed} | {name} | {denoising:.5f} | {alignment:.5f} | {apart} |")
    for dtype, cosine in cosines().items():
        print(f"cosine of live and {dtype} tokens: mean 1 - {1 - cosine.mean():.1e}, lowest 1 - {1 - cosine.min():.1e}")


def main() -> None:
    """Every command, then the table."""
    for line in lines():
        arguments = shlex.split(line)
        print(f"$ python {shlex.join(arguments)}", flush=True)
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)
    table()


if __name__ == "__main__":
    main()
