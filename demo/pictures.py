"""The demo's pictures: loss curves from metrics.jsonl files, and reconstructions before and after joint tuning."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from dataset import ImageDataset  # noqa: E402
from models.autoencoder import build_vae, image_to_pixels, pixels_to_image  # noqa: E402
from training.previews import COLUMNS, evenly_spaced, grid  # noqa: E402

PANELS = {
    "L1 reconstruction": ("reconstruction_loss",),
    "LPIPS": ("perceptual_loss",),
    "PSNR of reconstructions, dB": ("psnr",),
    "discriminator loss": ("d_loss",),
    "diffusion loss": ("denoising_loss",),
    "alignment loss": ("vae_align_loss", "proj_loss"),
}
LABELS = {"vae_align_loss": "through the VAE", "proj_loss": "of the transformer"}
SMOOTHING = 0.9


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, one a step."""
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def smooth(values: list[float]) -> list[float]:
    """Exponential moving average, without the bias of its start."""
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average, weight = SMOOTHING * average + (1 - SMOOTHING) * value, SMOOTHING * weight + 1 - SMOOTHING
        out.append(average / weight)
    return out


def plot_curves(logs: dict[str, Path], target: Path) -> None:
    """Draw every panel whose metrics a run has; runs follow each other on the x axis, as they did in time."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.2), constrained_layout=True)
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for ax, (title, names) in zip(axes.flat, PANELS.items(), strict=True):
        start, series = 0, 0
        for run, path in logs.items():
            records = read_metrics(path)
            for name in (name for name in names if name in records[-1]):
                points = [(start + r["step"], r[name]) for r in records if r[name] is not None]
                steps, values = zip(*points, strict=True)
                colour = colours[series % len(colours)]
                ax.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
                # dashes, because the two alignment losses lie on each other
                style = "--" if name == "proj_loss" else "-"
                ax.plot(steps, smooth(values), style, color=colour, label=LABELS.get(name, run))
                series += 1
            start += records[-1]["step"]
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("step")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(target, dpi=120)
    plt.close(figure)


@torch.no_grad()
def draw_reconstructions(vaes: list[dict[str, Tensor]], data_dir: Path, target: Path) -> None:
    """Held-out photographs in rows of eight, below each row its reconstructions by every VAE state dict in turn."""
    pixels = evenly_spaced(ImageDataset(data_dir), 4 * COLUMNS)
    versions = [pixels]
    for state in vaes:
        vae = build_vae("f4d4-small")
        vae.load_state_dict(state)
        versions.append(image_to_pixels(vae.decode(vae.encode(pixels_to_image(pixels)).mean)))
    rows = [row for rows in zip(*(v.split(COLUMNS) for v in versions), strict=True) for row in rows]
    picture = Image.fromarray(grid(torch.cat(rows)).permute(1, 2, 0).numpy())
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(target)


def draw_overview(folder: Path) -> None:
    """Put the folder's pictures on one page, overview.png: reconstructions and samples above, curves below."""
    names = ("reconstructions", "samples", "curves")
    recon, samples, curves = (Image.open(folder / f"{name}.png").convert("RGB") for name in names)
    samples = samples.resize((recon.height, recon.height), Image.Resampling.NEAREST)
    gap = max(0, curves.width - recon.width - samples.width)
    page = Image.new("RGB", (recon.width + gap + samples.width, recon.height + 20 + curves.height), "white")
    page.paste(recon, (0, 0))
    page.paste(samples, (recon.width + gap, 0))
    page.paste(curves, (0, recon.height + 20))
    page.save(folder / "overview.png", optimize=True)
