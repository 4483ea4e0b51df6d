"""exps/demo/report.html: the demo's commands and results on one page that needs no other file."""

import base64
import html
import io
import json
import math
from datetime import date
from pathlib import Path
from string import Template

import numpy as np
import torch
from torch import Tensor

from dataset import open_images
from demo import pictures
from demo.run import SAMPLES_A_CLASS
from metrics.images import psnr
from models.autoencoder import pixels_to_image
from storage.files import replace_text
from weights.features import load_lpips
from weights.vae import load_vae, open_vae

VAE = "f4d4-small"
SHOWN, A_ROW = 20, 10
TILE = 64
DISTANCE = "fd_efficientnet_lite0"
DISTANCE_TITLES = {
    "held-out": "Photographs that no network has seen",
    "joint": "Samples of the joint run, without guidance",
    "frozen": "Samples on the frozen tuned VAE, without guidance",
    "noise": "Noise",
}


def write_report(root: Path, folder: Path, record: dict) -> None:
    """Write report.html and overview.png into the demo's `folder`; `record` is the content of stages.json."""
    test = open_images(root / "data-demo/test")
    logs = {run: pictures.read_metrics(folder / run / "metrics.jsonl") for run in pictures.RUNS}
    vaes = {"before": folder / "vae/vae.pt", "after": folder / "e2e-vae/e2e-vae.pt"}
    pixels = torch.stack([test[i][0] for i in range(len(test))])
    networks = {name: load_vae(open_vae(VAE, str(path), offline=True)).eval() for name, path in vaes.items()}
    coded = {name: pictures.reconstruct(vae, pixels) for name, vae in networks.items()}
    lpips = load_lpips(str(root / "pretrained/demo/vgg16-features.pt"))
    quality = {name: measure(pixels, recon, lpips) for name, (_, recon) in coded.items()}
    shown = torch.arange(SHOWN) * len(test) // SHOWN
    recons = {"photograph": pixels, **{name: recon for name, (_, recon) in coded.items()}}
    colors = {"photograph": pixels, **{name: pictures.latent_colors(latents) for name, (latents, _) in coded.items()}}
    paths = [path for run in pictures.RUNS for path in sorted((folder / "samples").glob(f"{run}_*_cfg*.npz"))]
    samples = {path: read_samples(path, len(test.classes)) for path in paths}
    latent = tuple(coded["before"][0].shape[1:])
    page = Template((Path(__file__).parent / "report.html").read_text(encoding="utf8")).substitute(
        facts=facts(record),
        tiles=tiles(quality, logs, record),
        key="".join(
            f'<span><i style="background: {pictures.COLORS[run]}"></i>{name}</span>'
            for run, name in pictures.RUNS.items()
        ),
        charts="".join(
            f'<div class="card"><h3>{title}</h3>{pictures.svg_panel(metrics, logs)}</div>'
            for title, metrics in pictures.PANELS.items()
        ),
        reconstructions=groups({name: value[shown] for name, value in recons.items()}),
        latents=groups({name: value[shown] for name, value in colors.items()}),
        latent=" x ".join(map(str, latent)),
        samples="".join(sample_card(sample_title(path), images, test.classes) for path, images in samples.items()),
        distances=distance_rows(folder / "sets"),
        stages=stage_rows(record),
    )
    replace_text(folder / "report.html", page)
    few = shown[::2]  # one a class
    overview = {
        "held-out photographs": pixels[few],
        "reconstructed before joint tuning": coded["before"][1][few],
        "reconstructed after": coded["after"][1][few],
        "latents before (PCA)": colors["before"][few],
        "latents after": colors["after"][few],
    }
    guided = {sample_title(path): images for path, images in samples.items() if "cfg1.0" not in path.name}
    pictures.draw_overview(overview, guided, test.classes, logs, folder / "overview.png")


@torch.no_grad()
def measure(pixels: Tensor, recon: Tensor, lpips) -> dict[str, float]:
    """PSNR in dB (mean over images) and LPIPS of reconstructions, both uint8 (N,3,R,R)."""
    pairs = zip(pixels.split(50), recon.split(50), strict=True)
    distances = [lpips(pixels_to_image(a), pixels_to_image(b)).flatten() for a, b in pairs]
    return {"psnr": float(psnr(pixels, recon).mean()), "lpips": float(torch.cat(distances).mean())}


def read_samples(path: Path, classes: int) -> Tensor:
    """Class-balanced samples of an npz, (classes, n, 3, R, R) uint8: sample i is of class i mod classes."""
    pixels = torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2)
    return pixels.unflatten(0, (-1, classes)).transpose(0, 1)[:, :SAMPLES_A_CLASS]


def sample_title(path: Path) -> str:
    """The title of the samples in RUN_STEP_cfgSCALE-LOW-HIGH.npz."""
    run, step, guidance = path.stem.split("_")
    scale = float(guidance.removeprefix("cfg").split("-")[0])
    origin = {"joint": "Joint run", "frozen": "Frozen tuned VAE"}[run]
    return f"{origin}, step {int(step)}, " + (f"guidance {scale:g}" if scale > 1 else "no guidance")


def image_row(name: str, images: Tensor) -> str:
    """A labelled row of images, uint8 (N,3,R,R), embedded in the page."""
    file = io.BytesIO()
    pictures.strip(images, TILE).save(file, "png", optimize=True)
    data, name = base64.b64encode(file.getvalue()).decode(), html.escape(name)
    return f'<div class="row"><span>{name}</span><img alt="{name}" src="data:image/png;base64,{data}"></div>'


def groups(rows: dict[str, Tensor]) -> str:
    """Blocks of ten columns, each with one labelled row for every entry of `rows`, uint8 (N,3,R,R)."""
    blocks = []
    for first in range(0, SHOWN, A_ROW):
        lines = [image_row(name, images[first : first + A_ROW]) for name, images in rows.items()]
        blocks.append(f'<div class="group">{"".join(lines)}</div>')
    return "".join(blocks)


def sample_card(title: str, images: Tensor, classes: list[str]) -> str:
    """A card of samples with one row a class."""
    rows = "".join(map(image_row, classes, images))
    return f'<div class="card"><h3>{title}</h3>{rows}</div>'


def tiles(quality: dict[str, dict[str, float]], logs: dict[str, list[dict]], record: dict) -> str:
    """The numbers at the top; losses are means over the last 20 steps."""

    def last_mean(run: str, metric: str) -> float:
        return float(np.mean([step[metric] for step in logs[run][-20:]]))

    before, after = quality["before"], quality["after"]
    seconds = sum(entry["seconds"] for entry in record["stages"].values())
    numbers = {
        f"{before['psnr']:.1f} &rarr; {after['psnr']:.1f} dB": "PSNR of held-out reconstructions, before and after",
        f"{before['lpips']:.3f} &rarr; {after['lpips']:.3f}": "their LPIPS (lower is better)",
        f"{last_mean('joint', 'proj_loss'):.2f}": "alignment loss at the end of joint training (-1 is perfect)",
        f"{last_mean('frozen', 'denoising_loss'):.2f}": "diffusion loss at the end, on the frozen tuned VAE",
        duration(seconds): "in all",
    }
    return "".join(f'<div class="card"><b>{value}</b><span>{what}</span></div>' for value, what in numbers.items())


def facts(record: dict) -> str:
    """Lengths of the runs, machine and date."""
    plan = record["settings"]
    precision = {"bf16": "bfloat16", "no": "float32"}[plan["precision"]]
    return html.escape(
        f"{plan['vae_steps']} steps of the VAE alone, {plan['joint_steps']} joint ones, {plan['frozen_steps']} on the "
        f"frozen VAE, 32 images each, in {precision}, on {record['machine']}. CIFAR-10 photographs; alignment to "
        f"EfficientNet-Lite0; PyTorch {torch.__version__}; {date.today():%d %B %Y}."
    )


def duration(seconds: float) -> str:
    """A time like 42 s or 3 min 05 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def distance_rows(folder: Path) -> str:
    """Rows of the table of Fréchet distances, smallest first, with bars on a logarithmic scale."""
    found = {name: json.loads((folder / f"{name}.json").read_text(encoding="utf8")) for name in DISTANCE_TITLES}
    values = {name: result["metrics"][DISTANCE] for name, result in found.items()}
    lowest, highest = (math.log(pick(values.values())) for pick in (min, max))
    rows = []
    for name in sorted(values, key=values.get):
        width = 10 + 90 * (math.log(values[name]) - lowest) / max(highest - lowest, 1e-9)
        rows.append(
            f'<tr><td>{DISTANCE_TITLES[name]}<div class="bar" style="width: {width:.1f}%"></div></td>'
            f'<td class="number">{values[name]:.1f}</td><td class="number">{found[name]["samples"]["count"]}</td></tr>'
        )
    return "".join(rows)


def stage_rows(record: dict) -> str:
    """Rows of the table of stages, each with its command and time."""
    longest = max(entry["seconds"] for entry in record["stages"].values())
    return "".join(
        f"<tr><td><details><summary>{html.escape(entry['title'])}</summary><pre>{html.escape(entry['command'])}</pre>"
        f'</details><div class="bar" style="width: {100 * entry["seconds"] / longest:.1f}%"></div></td>'
        f'<td class="number">{duration(entry["seconds"])}</td></tr>'
        for entry in record["stages"].values()
    )
