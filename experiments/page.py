"""Results of the study: collected from its folders, merged with those published before, and written as a page."""

import json
from pathlib import Path
from string import Template

import matplotlib.pyplot as plt
import numpy as np
import torch

from dataset import open_images
from demo.pictures import latent_colors, read_metrics, reconstruct, strip
from demo.runner import Record
from diffusion.previews import evenly_spaced
from errors import UserError
from experiments.plan import ABLATIONS, ARMS, MAIN_ARMS, REPAE, VAE_ARCH, Settings, samples_file, tuned_vae
from storage.files import replace_text
from weights.vae import load_vae, open_vae

VAE = "vae"  # the name under which the VAE that arms start from has its results
CURVES = {
    "denoising_loss": "diffusion loss",
    "proj_loss": "alignment loss",
    "bn_std_drift": "drift of latents' std",
}
POINTS = 25  # of a curve; each is a mean over steps
SHOWN = 20  # images a row of the pictures
# title -> (metric, digits)
DISTANCES = {
    "FD, EfficientNet": ("fd_efficientnet_lite0", 1),
    "FD, VGG16": ("fd_vgg16", 2),
    "KD, EfficientNet": ("kd_efficientnet_lite0", 1),
    "KD, VGG16": ("kd_vgg16", 4),
}
SAMPLE_COLUMNS = DISTANCES | {
    "diffusion loss": ("denoising_loss", 3),
    "alignment loss": ("proj_loss", 3),
}
VAE_COLUMNS = {
    "PSNR, dB": ("psnr", 2),
    "LPIPS": ("lpips", 3),
    "rFD, EfficientNet": ("rfd_efficientnet_lite0", 1),
    "rFD, VGG16": ("rfd_vgg16", 2),
    "drift of std": ("bn_std_drift", 2),
}
MINUTES = {"minutes": ("minutes", 1)}


def open_page(page_dir: Path, settings: Settings) -> dict:
    """What replication.json in `page_dir` holds, at first nothing: {"settings", "results": {arm: {seed: {...}}}}.

    Raises:
        UserError: it is of other settings, whose results would be lost.
    """
    path, content = page_dir / "replication.json", {"settings": settings._asdict(), "results": {}}
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf8"))
        if before["settings"] != content["settings"]:
            raise UserError(f"{path} is of {before['settings']}; take these, or another --page-dir")
        content = before
    return content


def add_results(content: dict, record: Record, settings: Settings, seed: int, folder: Path, arms: list[str]) -> None:
    """Add the results of a seed's VAE and `arms`, all of which are done."""
    for name in (VAE, *arms):
        found = results_of(name, folder, settings.batch)
        content["results"].setdefault(name, {})[str(seed)] = {**found, "machine": record.content["machine"]}
    stages = record.content["stages"]
    seconds = sum(entry["seconds"] for stage, entry in stages.items() if stage.startswith(f"{folder.name}/"))
    content["results"][VAE][str(seed)]["hours"] = seconds / 3600


def results_of(name: str, folder: Path, batch: int) -> dict:
    """What the files of an arm, or of the VAE, say."""
    kinds = ["vae"] if name == VAE else ["samples", "vae"] if ARMS[name].joint else ["samples"]
    found = {}
    for kind in kinds:
        found |= json.loads((folder / f"{name}-{kind}.json").read_text(encoding="utf8"))["metrics"]
    log = read_metrics(folder / name / "metrics.jsonl")
    minutes = np.cumsum([batch / record["images_per_second"] / 60 for record in log])
    parts = np.array_split(np.arange(len(log)), min(POINTS, len(log)))
    curves = {"step": [log[part[-1]]["step"] for part in parts], "minutes": [minutes[part[-1]] for part in parts]}
    for metric in CURVES:
        if metric in log[-1]:
            curves[metric] = [float(np.mean([log[i][metric] for i in part])) for part in parts]
            found[metric] = curves[metric][-1]
    return {**found, "minutes": minutes[-1], "curves": curves}


def write_page(content: dict, page_dir: Path) -> None:
    """Write replication.json, replication.md, and replication.png, the curves."""
    replace_text(page_dir / "replication.json", json.dumps(content, indent=1) + "\n")
    replace_text(page_dir / "replication.md", page_text(content, page_dir / "replication-findings.md"))
    draw_curves(content["results"], page_dir / "replication.png")


def page_text(content: dict, findings: Path) -> str:
    """The page from its template; `findings` is what somebody wrote about these results, or no file."""
    results = content["results"]
    seeds = sorted(results[VAE].items(), key=lambda item: int(item[0]))
    frozen = [name for name in ABLATIONS if not ARMS[name].joint]
    joint = [name for name in ABLATIONS if ARMS[name].joint]
    return Template((Path(__file__).parent / "replication.md").read_text(encoding="utf8")).substitute(
        content["settings"],
        cost="; ".join(f"seed {seed}, {found['hours']:.1f} hours on {found['machine']}" for seed, found in seeds),
        main=table(results, MAIN_ARMS, SAMPLE_COLUMNS | MINUTES),
        differences=table(differences(results, "repa"), [*MAIN_ARMS, *frozen], DISTANCES),
        findings=findings.read_text(encoding="utf8") if findings.is_file() else "",
        vaes=table(results, [VAE, REPAE, "naive"], VAE_COLUMNS | MINUTES),
        ablations=table(differences(results, REPAE), joint, SAMPLE_COLUMNS | VAE_COLUMNS),
    )


def differences(results: dict, base: str) -> dict:
    """Metrics of the other arms less those of the arm `base` of the same seed: a seed's arms share VAE and noise."""
    of_base = results.get(base, {})
    return {
        name: {
            seed: {
                key: value - of_base[seed][key]
                for key, value in found.items()
                if isinstance(of_base[seed].get(key), float)
            }
            for seed, found in of_seeds.items()
            if seed in of_base
        }
        for name, of_seeds in results.items()
        if name != base
    }


def table(results: dict, names, columns: dict[str, tuple[str, int]]) -> str:
    """Rows of arms that have results: mean ± standard deviation over seeds of each column's metric."""
    titles = {VAE: "VAE that all start from"} | {name: arm.title for name, arm in ARMS.items()}
    lines = [["arm", "seeds", *columns], ["---"] * (2 + len(columns))]
    for name in names:
        if results.get(name):
            cells = [spread(results[name], *column) for column in columns.values()]
            lines.append([titles[name], str(len(results[name])), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(of_seeds: dict[str, dict], metric: str, digits: int) -> str:
    """Mean ± standard deviation over seeds; the value alone for one seed, nothing where the arm has none."""
    values = [found[metric] for found in of_seeds.values() if metric in found]
    if not values:
        return ""
    mean = f"{np.mean(values).round(digits) + 0.0:.{digits}f}"  # no -0.000
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def draw_curves(results: dict, target: Path) -> None:
    """Denoising and alignment loss and the latents' drift against steps, and against time, of every seed."""
    others = [one["curves"] for name in MAIN_ARMS if name != "naive" for one in results.get(name, {}).values()]
    shown = [loss for curves in others for loss in curves["denoising_loss"]]
    figure, axes = plt.subplots(2, len(CURVES), figsize=(15, 7.5), constrained_layout=True)
    for row, along in zip(axes, ("step", "minutes"), strict=True):
        for ax, metric in zip(row, CURVES, strict=True):
            for i, name in enumerate(MAIN_ARMS):
                found = [one["curves"] for one in results.get(name, {}).values() if metric in one["curves"]]
                for j, curve in enumerate(found):
                    label = ARMS[name].title if j == 0 else None
                    ax.plot(curve[along], curve[metric], color=f"C{i}", label=label, linewidth=1.4, alpha=0.85)
            ax.set(xlabel=along, title=CURVES[metric])
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(axis="y", linewidth=0.6, alpha=0.4)
        row[0].set_ylim(*np.quantile(shown or [1.0], [0, 0.95]))  # the naive arm's falls far below
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(target, dpi=90, facecolor="white")
    plt.close(figure)


def draw_pictures(settings: Settings, output_dir: Path, seed: int, page_dir: Path) -> None:
    """Draw samples of the main arms from the same noise; reconstructions and latents before and after joint training.

    All main arms of the seed must be done. Written to replication-samples.png and replication-vaes.png.
    """
    folder = output_dir / f"seed-{seed}"
    rows = {}
    for name in MAIN_ARMS:
        samples = np.load(samples_file(name, settings, folder), mmap_mode="r")["arr_0"][:SHOWN]
        rows[f"{ARMS[name].title}, seed {seed}"] = torch.from_numpy(samples.copy()).permute(0, 3, 1, 2)
    draw_rows(rows, page_dir / "replication-samples.png")
    pixels = evenly_spaced(open_images(output_dir / "data/held-out"), SHOWN)
    rows = {"held-out photographs": pixels}
    files = {f"before, seed {seed}": folder / "vae/vae.pt"}
    files |= {f"{ARMS[name].title}, seed {seed}": tuned_vae(name, folder) for name in (REPAE, "naive")}
    for title, path in files.items():
        latents, recon = reconstruct(load_vae(open_vae(VAE_ARCH, str(path), offline=True)).eval(), pixels)
        rows |= {f"reconstructions, {title}": recon, f"latents (PCA), {title}": latent_colors(latents)}
    draw_rows(rows, page_dir / "replication-vaes.png")


def draw_rows(rows: dict[str, torch.Tensor], target: Path) -> None:
    """Labelled rows of images, uint8 (N,3,R,R)."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(12, 0.9 * len(rows)), constrained_layout=True, squeeze=False)
    for ax, (title, pixels) in zip(axes.flat, rows.items(), strict=True):
        ax.imshow(strip(pixels, 64))
        ax.set_title(title, fontsize=11, loc="left")
        ax.axis("off")
    figure.savefig(target, dpi=110, facecolor="white")
    plt.close(figure)
