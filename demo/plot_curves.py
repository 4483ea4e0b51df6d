"""Loss curves of one or more runs from their metrics.jsonl files, as one PNG."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

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
                ax.plot(steps, smooth(values), color=colour, label=LABELS.get(name, run))
                series += 1
            start += records[-1]["step"]
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("step")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(target, dpi=120)
    plt.close(figure)
