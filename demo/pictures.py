"""The report's pictures: loss curves, reconstructions, latents as colours, samples."""

import io
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.autoencoder import AutoencoderKL, image_to_pixels, pixels_to_image

plt.switch_backend("Agg")

SMOOTHING = 0.9
# panel title -> metric -> suffix of its label
PANELS = {
    "L1 reconstruction": {"reconstruction_loss": ""},
    "LPIPS": {"perceptual_loss": ""},
    "PSNR of reconstructions, dB": {"psnr": ""},
    "Discriminator loss": {"d_loss": ""},
    "Diffusion loss": {"denoising_loss": ""},
    "Alignment loss": {"vae_align_loss": " (through the VAE)", "proj_loss": ""},
}
RUNS = {"vae": "VAE alone", "joint": "joint", "frozen": "on the frozen tuned VAE"}
COLORS = {"vae": "#2a78d6", "joint": "#d9622b", "frozen": "#1f9e77"}
GREY = "#808890"  # readable on light and dark pages


def read_metrics(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def smooth(values: list[float]) -> list[float]:
    """Exponential moving average with bias correction."""
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average, weight = SMOOTHING * average + (1 - SMOOTHING) * value, SMOOTHING * weight + 1 - SMOOTHING
        out.append(average / weight)
    return out


def draw_panel(ax, metrics: dict[str, str], logs: dict[str, list[dict]], fontsize: int) -> None:
    """Draw the curves of `metrics` in every run that has them.

    The joint run continues the VAE, so its VAE curves follow those of the VAE alone; both transformers start at 0.
    """
    for metric, suffix in metrics.items():
        for run, records in logs.items():
            if metric not in records[-1]:
                continue
            start = logs["vae"][-1]["step"] if run == "joint" and metric in logs["vae"][-1] else 0
            points = [(start + r["step"], r[metric]) for r in records if r[metric] is not None]
            steps, values = zip(*points, strict=True)
            style = "--" if suffix else "-"  # dashes, because the two alignment losses nearly coincide
            ax.plot(steps, values, color=COLORS[run], alpha=0.22, linewidth=0.8)
            ax.plot(steps, smooth(values), style, color=COLORS[run], linewidth=1.8, label=RUNS[run] + suffix)
    ax.set_xlabel("step", fontsize=fontsize)
    ax.tick_params(labelsize=fontsize, length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.grid(axis="y", linewidth=0.6, alpha=0.4)


def svg_panel(metrics: dict[str, str], logs: dict[str, list[dict]]) -> str:
    """One panel as inline SVG with text as text, on a transparent background."""
    style = {f"{name}.color": GREY for name in ("text", "xtick", "ytick", "grid")}
    style |= {"axes.labelcolor": GREY, "axes.edgecolor": GREY, "svg.fonttype": "none"}
    with plt.rc_context(style):
        figure, ax = plt.subplots(figsize=(4.6, 2.7), constrained_layout=True)
        draw_panel(ax, metrics, logs, fontsize=11)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
        plt.close(figure)
    svg = file.getvalue()
    return svg[svg.index("<svg") :]


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior means (N,C,h,w) and reconstructions (N,3,R,R) uint8 of uint8 pixels."""
    means, recons = [], []
    for part in pixels.split(50):
        mean = vae.encode(pixels_to_image(part)).mean
        means.append(mean)
        recons.append(image_to_pixels(vae.decode(mean)))
    return torch.cat(means), torch.cat(recons)


def latent_colors(latents: Tensor) -> Tensor:
    """Latents (N,C,h,w) -> (N,3,h,w) uint8: three principal components of all positions as red, green, blue."""
    flat = latents.permute(0, 2, 3, 1).flatten(0, 2).double()
    flat = flat - flat.mean(0)
    _, _, directions = torch.linalg.svd(flat, full_matrices=False)
    # the sign of a component is arbitrary: make its largest weight positive
    directions = directions * directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    projected = flat @ directions[:3].T
    low, high = torch.quantile(projected, torch.tensor([0.01, 0.99], dtype=torch.float64), dim=0)
    colors = ((projected - low) / (high - low)).clamp(0, 1).mul(255).round().to(torch.uint8)
    return colors.unflatten(0, (latents.shape[0], *latents.shape[2:])).permute(0, 3, 1, 2)


def strip(pixels: Tensor, side: int) -> Image.Image:
    """uint8 (N,3,R,R) side by side, each enlarged to `side` without smoothing, with narrow transparent gaps."""
    gap = max(2, side // 32)
    picture = Image.new("RGBA", (len(pixels) * (side + gap) - gap, side))
    for i, image in enumerate(pixels):
        tile = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
        picture.paste(tile.resize((side, side), Image.Resampling.NEAREST), (i * (side + gap), 0))
    return picture


def draw_overview(
    rows: dict[str, Tensor], samples: dict[str, Tensor], classes: list[str], logs: dict[str, list[dict]], target: Path
) -> None:
    """One picture for the README: labelled strips of images, samples by class (K,n,3,R,R), and the curves below."""
    figure = plt.figure(figsize=(15, 11.5), constrained_layout=True)
    above, below = figure.subfigures(2, 1, height_ratios=(1.5, 1))
    left, *right = above.subfigures(1, 1 + len(samples), width_ratios=(1.25, *(0.85 for _ in samples)))
    for ax, (title, pixels) in zip(left.subplots(len(rows), 1), rows.items(), strict=True):
        ax.imshow(strip(pixels, 64))
        ax.set_title(title, fontsize=9, loc="left")
        ax.axis("off")
    for part, (title, images) in zip(right, samples.items(), strict=True):
        part.suptitle(title, fontsize=10)
        for ax, name, pixels in zip(part.subplots(len(classes), 1), classes, images, strict=True):
            ax.imshow(strip(pixels, 64))
            ax.set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    for ax, (title, metrics) in zip(below.subplots(2, 3).flat, PANELS.items(), strict=True):
        draw_panel(ax, metrics, logs, fontsize=8)
        ax.set_title(title, fontsize=10, loc="left")
        ax.legend(frameon=False, fontsize=7)
    figure.savefig(target, dpi=100, facecolor="white")
    plt.close(figure)
