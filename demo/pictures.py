"""The report's pictures: loss curves, reconstructions, latents as colours, samples."""

import io
import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from models.autoencoder import AutoencoderKL, image_to_pixels, pixels_to_image  # noqa: E402

SMOOTHING = 0.9
# panel title -> metric -> what it is called, where a panel has several
PANELS = {
    "L1 reconstruction": {"reconstruction_loss": ""},
    "LPIPS": {"perceptual_loss": ""},
    "PSNR of reconstructions, dB": {"psnr": ""},
    "Discriminator loss": {"d_loss": ""},
    "Diffusion loss": {"denoising_loss": ""},
    "Alignment loss": {"vae_align_loss": " (through the VAE)", "proj_loss": ""},
}
# colours that the report's style sheet replaces by those of its theme
INK, GRID = "#010101", "#020202"
SERIES = {"vae": "#030301", "joint": "#030302", "frozen": "#030303"}
RUNS = {"vae": "VAE alone", "joint": "joint", "frozen": "on the frozen tuned VAE"}
CSS = {INK: "var(--muted)", GRID: "var(--grid)", **{color: f"var(--{run})" for run, color in SERIES.items()}}


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


def draw_panel(
    ax, metrics: dict[str, str], logs: dict[str, list[dict]], colors: dict[str, str], fontsize: int = 8
) -> None:
    """Curves of `metrics` in every run that has them. What the joint run continues, the VAE's, follows on the x axis;
    transformers start at 0 both times."""
    for metric, suffix in metrics.items():
        for run, records in logs.items():
            if metric not in records[-1]:
                continue
            start = logs["vae"][-1]["step"] if run == "joint" and metric in logs["vae"][-1] else 0
            points = [(start + r["step"], r[metric]) for r in records if r[metric] is not None]
            steps, values = zip(*points, strict=True)
            style = "--" if suffix else "-"  # dashes, because the two alignment losses nearly coincide
            ax.plot(steps, values, color=colors[run], alpha=0.22, linewidth=0.8)
            ax.plot(steps, smooth(values), style, color=colors[run], linewidth=1.8, label=RUNS[run] + suffix)
    ax.set_xlabel("step", fontsize=fontsize)
    ax.tick_params(labelsize=fontsize, length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.grid(axis="y", linewidth=0.8)
    ax.set_axisbelow(True)


def themed_svg(metrics: dict[str, str], logs: dict[str, list[dict]]) -> str:
    """One panel as inline SVG whose colours are the page's variables and whose text is text."""
    style = {
        **{f"{name}.color": INK for name in ("text", "xtick", "ytick")},
        "axes.labelcolor": INK,
        "axes.edgecolor": GRID,
        "grid.color": GRID,
        "svg.fonttype": "none",
    }
    with plt.rc_context(style):
        figure, ax = plt.subplots(figsize=(4.6, 2.7), constrained_layout=True)
        draw_panel(ax, metrics, logs, SERIES, fontsize=11)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
        plt.close(figure)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 system-ui, sans-serif", file.getvalue())
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for color, variable in CSS.items():
        svg = svg.replace(color, variable)
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
    # the sign of a component is arbitrary: take the one that makes its largest weight positive
    directions = directions * directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    projected = flat @ directions[:3].T
    low, high = torch.quantile(projected, torch.tensor([0.01, 0.99], dtype=torch.float64), dim=0)
    colors = ((projected - low) / (high - low)).clamp(0, 1).mul(255).round().to(torch.uint8)
    return colors.unflatten(0, (latents.shape[0], *latents.shape[2:])).permute(0, 3, 1, 2)


def strip(pixels: Tensor, side: int) -> Image.Image:
    """uint8 (N,3,R,R) side by side, each enlarged to `side` without smoothing, with narrow gaps that are clear."""
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
    colors = {"vae": "#2a78d6", "joint": "#d9622b", "frozen": "#1f9e77"}
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
        draw_panel(ax, metrics, logs, colors)
        ax.set_title(title, fontsize=10, loc="left")
        ax.legend(frameon=False, fontsize=7)
        ax.grid(axis="y", linewidth=0.6, alpha=0.4)
    figure.savefig(target, dpi=100, facecolor="white")
    plt.close(figure)
