"""What the field reports: FID and its like of samples, or how well a VAE reconstructs images it has not seen.

    python evaluate.py --samples samples/joint_0400000_cfg1.0-0.0-1.0.npz --reference VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc_per_node=8 evaluate.py --samples ... --reference ...
    python evaluate.py --vae exps/e2e-vae/e2e-vae.pt --vae-arch f8d4 --data-dir data-val

Definitions are those of the ADM evaluation suite (Dhariwal & Nichol, arXiv 2105.05233), without TensorFlow. Results
are written as JSON, with everything that they depend on.
"""

import argparse
import json
import math
import platform
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from tqdm import tqdm

from dataset import open_images
from downloads import is_offline
from errors import Parser, UserError, run_script
from files import replace_text, written_whole
from image_sets import open_image_set
from metrics.features import see
from metrics.images import WINDOW, psnr, ssim
from metrics.statistics import METRICS, OF_FEATURES, ONLY_INCEPTION, SetStatistics, compare, metric_name
from models.autoencoder import AutoencoderKL, image_to_pixels, pixels_to_image
from training import cli
from training.autoencoding import latent_statistics
from training.checkpoint import fingerprint, read_latent_statistics, vae_files
from training.distributed import process_state
from training.feature_networks import FeatureNetwork, load_feature_networks
from training.image_statistics import Reference, batches, open_reference, statistics_of
from training.networks import load_lpips, load_vae, use_tf32

STATISTICS_FORMAT = "repae-statistics/1"
FEW = 2048  # images below which Inception's covariance is singular


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("samples")
    group.add_argument("--samples", type=Path, help="an npz with arr_0, uint8 (N,H,W,3), or a folder of pictures")
    group.add_argument(
        "--reference", type=Path, help="as --samples, or an npz of statistics (ADM's, or that of --save-stats)"
    )
    group.add_argument(
        "--metrics", type=metric_list, help=f"which, joined by commas, of {', '.join(METRICS)} (default: all there are)"
    )
    group.add_argument("--save-stats", type=Path, help="keep the reference's statistics in this npz")
    cli.add_reconstruction_flags(parser)
    cli.add_feature_flags(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--batch-size", type=cli.POSITIVE, default=64, help="of each process (default: %(default)s)")
    group.add_argument("--num-workers", type=cli.COUNT, default=4, help="reading processes of each (default: 4)")
    group.add_argument("--output", type=Path, help="the JSON file (default: beside samples or VAE, .metrics.json)")
    group.add_argument("--markdown", action="store_true", help="print the results as rows of a table")
    args = parser.parse_args(argv)
    if (args.vae is None) == (args.samples is None and args.reference is None):
        parser.error("give --samples and --reference, or --vae and --data-dir")
    if args.samples is None and args.vae is None and args.save_stats is None:
        parser.error("--reference alone is for --save-stats; give --samples too")
    if args.samples is not None and args.reference is None:
        parser.error("--samples needs a --reference to be compared to")
    if args.vae is not None and args.data_dir is None:
        parser.error("--vae needs --data-dir, with images that it was not trained on")
    return args


def metric_list(text: str) -> list[str]:
    """An argparse type: names of metrics, joined by commas."""
    check = cli.one_of("metric", METRICS)
    return [check(name) for name in text.split(",")]


def check_wanted(args: argparse.Namespace, reference: Reference, networks: list[str]) -> list[str]:
    """The metrics to compute: those that were asked for, or all that the reference allows.

    Raises:
        UserError: the reference lacks what one of them needs.
    """
    wanted = args.metrics or [m for m in METRICS if reference.images is not None or m not in OF_FEATURES]
    if reference.images is None and (needy := [metric for metric in wanted if metric in OF_FEATURES]):
        raise UserError(f"--reference {reference.path}: statistics without images, which {needy[0]} needs")
    if not (reachable := [m for m in wanted if m not in ONLY_INCEPTION or "inception" in networks]):
        raise UserError(f"--metrics {','.join(wanted)}: of Inception alone, but --features is {args.features}")
    return reachable


def check_images(samples: Dataset, reference: Reference, wanted: list[str], say) -> None:
    """Raise a UserError if samples and reference cannot be compared; warn where there are few."""
    if reference.images is not None and reference.images.size != samples.size:
        sizes = ("x".join(map(str, images.size)) for images in (samples, reference.images))
        raise UserError("--samples are of {} px, but --reference of {}; resize one of them first".format(*sizes))
    for what, images in (("--samples", samples), ("--reference", reference.images)):
        if images is not None and len(images) < FEW:
            say(f"warning: {what} holds {len(images)} images, fewer than {FEW}: FID is biased, its covariance singular")
        if images is not None and len(images) < 4 and {"precision", "recall"} & set(wanted):
            raise UserError(f"{what} holds {len(images)} images, but precision and recall need 4")


def evaluate_samples(args: argparse.Namespace, state) -> dict:
    """All metrics of --samples against --reference, and what they depend on."""
    say = partial(tqdm.write, file=sys.stderr) if state.is_main_process else lambda text: None
    reference = open_reference(args.reference)
    samples = None if args.samples is None else open_image_set(args.samples, "--samples")
    wanted = check_wanted(args, reference, args.features.split(","))
    if samples is not None:
        check_images(samples, reference, wanted, say)
    if dropped := sorted(OF_FEATURES - set(wanted)) if args.metrics is None else []:
        say(f"{reference.path} has statistics only: no {', '.join(dropped)}")
    networks = load_feature_networks(args.features.split(","), args, state.device)
    reference.check_networks(networks)
    keep = bool(OF_FEATURES & set(wanted)) and samples is not None
    values, kept = {}, {}
    for network in networks:
        moments, features = reference.moments.get(network.name), None
        if reference.images is not None and (moments is None or keep):
            seen = statistics_of(reference.images, "reference", network, keep, args.batch_size, args.num_workers, state)
            moments, features = moments or seen.moments(), seen.features
        kept[network.name] = moments
        if samples is not None:
            statistics = statistics_of(samples, "samples", network, keep, args.batch_size, args.num_workers, state)
            values |= compare(statistics, moments, features, wanted, network.name)
    count = reference.count if reference.images is None else len(reference.images)
    if args.save_stats is not None and state.is_main_process:
        save_statistics(args.save_stats, kept, networks, {"count": count, "source": str(args.reference)})
    return {
        "metrics": values,
        "samples": None if samples is None else {"path": str(args.samples), "count": len(samples)},
        "manifest": None if samples is None else manifest_of(args.samples),
        "reference": {"path": str(args.reference), "count": count, "stored_statistics": sorted(reference.moments)},
        "features": describe_networks(networks),
    }


def save_statistics(path: Path, moments: dict, networks: list[FeatureNetwork], about: dict) -> None:
    """Write moments by network as an npz that --reference takes; Inception's under ADM's names."""
    arrays = {
        key if network == "inception" else f"{network}/{key}": values.numpy()
        for network, of_network in moments.items()
        for key, values in of_network.items()
    }
    about = {"format": STATISTICS_FORMAT, **about, "weights": {network.name: network.sha256 for network in networks}}
    with written_whole(path) as file:
        np.savez(file, about=np.array(json.dumps(about)), **arrays)
    print(f"statistics of the reference: {path}")


def manifest_of(samples: Path) -> dict | None:
    """What generate.py wrote beside the samples about how they were made."""
    path = samples.with_name(samples.name.removesuffix(".npz") + ".json")
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return None


def describe_networks(networks: list[FeatureNetwork]) -> dict:
    """Weights by network."""
    return {network.name: {"weights": str(network.weights), "sha256": network.sha256} for network in networks}


@torch.no_grad()
def evaluate_reconstruction(args: argparse.Namespace, state) -> dict:
    """How well a VAE reconstructs the images of --data-dir, from the posterior's mean, and its latents' statistics."""
    data = open_images(args.data_dir)
    if data.resolution < WINDOW:
        raise UserError(f"{data.source} holds images of {data.resolution} px, but SSIM needs {WINDOW}")
    vae = load_vae(args.vae_arch, args.vae).eval().requires_grad_(False).to(state.device)
    if data.resolution % vae.config.downsampling:
        raise UserError(f"--vae-arch {args.vae_arch} needs images of a multiple of {vae.config.downsampling} px")
    networks = load_feature_networks(args.features.split(","), args, state.device)
    lpips = load_lpips(args.lpips_vgg_ckpt, is_offline(args)).to(state.device)
    originals, recons = (
        [SetStatistics(len(data), state.device, keep_features=False) for _ in networks] for _ in range(2)
    )
    sums = torch.zeros(3, dtype=torch.float64, device=state.device)
    for indices, pixels in batches(data, "reconstructing", args.batch_size, args.num_workers, state):
        recon = image_to_pixels(vae.decode(vae.encode(pixels_to_image(pixels)).mean))
        distance = lpips(pixels_to_image(pixels), pixels_to_image(recon)).double()
        sums += torch.stack([psnr(pixels, recon).sum(), ssim(pixels, recon).sum(), distance.sum()])
        for network, original, reconstructed in zip(networks, originals, recons, strict=True):
            original.update(indices, see(network.module, pixels))
            reconstructed.update(indices, see(network.module, recon))
    if state.num_processes > 1:
        dist.all_reduce(sums)
    values = dict(zip(("psnr", "ssim", "lpips"), (sums / len(data)).tolist(), strict=True))
    for network, original, reconstructed in zip(networks, originals, recons, strict=True):
        moments = original.over_processes().moments()
        (distance,) = compare(reconstructed.over_processes(), moments, None, ["fid"], network.name).values()
        values["r" + metric_name("fid", network.name)] = distance
    return {
        "metrics": values,
        "latents": latents_of(vae, data, args, state),
        "vae": {"path": str(args.vae), "arch": args.vae_arch, "fingerprint": fingerprint(vae.state_dict())},
        "images": {"path": str(args.data_dir), "count": len(data), "fingerprint": data.fingerprint},
        "features": describe_networks(networks),
    }


def latents_of(vae: AutoencoderKL, data, args: argparse.Namespace, state) -> dict:
    """Mean and standard deviation of each latent channel on these images, and as stored beside the VAE's weights."""
    rank, world = state.process_index, state.num_processes
    found = latent_statistics(vae, data, args.batch_size, args.num_workers, rank, world, state.device)
    measured = {"mean": found["latents_bias"], "std": 1 / found["latents_scale"]}
    if vae_files(args.vae).statistics.is_file():
        scale, bias = read_latent_statistics(args.vae, vae.config.z_channels)
        measured.update(stored_mean=bias, stored_std=1 / scale)
    return {name: values.flatten().tolist() for name, values in measured.items()}


def environment(args: argparse.Namespace, state) -> dict:
    """Versions and machine that the numbers come from."""
    packages = ("torchvision", "numpy", "timm", "torch-fidelity", "lpips")
    on_gpu = state.device.type == "cuda"
    return {
        "command": sys.argv,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version(name) for name in packages},
        },
        "device": torch.cuda.get_device_name() if on_gpu else state.device.type,
        "processes": state.num_processes,
        "batch_size": args.batch_size,
    }


def markdown(title: str, count: int, values: dict[str, float]) -> str:
    """A table of one row."""
    head = ["", "images", *values]
    row = [title, str(count), *(f"{value:.4g}" for value in values.values())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), row))


def output_path(args: argparse.Namespace) -> Path | None:
    """Where the JSON goes."""
    what = args.samples or (args.vae and Path(args.vae))
    if args.output is not None or what is None:
        return args.output
    return what.with_name(what.name.removesuffix(".npz").removesuffix(".pt") + ".metrics.json")


def main() -> None:
    """Measure, write, print."""
    args = parse_args()
    use_tf32(False)
    state = process_state()
    document = evaluate_samples(args, state) if args.vae is None else evaluate_reconstruction(args, state)
    values = document["metrics"]
    if bad := [name for name, value in values.items() if math.isnan(value)]:
        raise UserError(f"{bad[0]} is not a number; the features or the reference's statistics hold NaN")
    if not state.is_main_process:
        return
    path, (what, count) = output_path(args), subject(document)
    if path is not None:
        replace_text(path, json.dumps({**document, **environment(args, state)}, indent=1) + "\n")
    if args.markdown and values:
        print(markdown(what, count, values))
    for name, value in values.items():
        print(f"{name}: {value:.6g}")
    if path is not None:
        print(f"results: {path}")


def subject(document: dict) -> tuple[str, int]:
    """What was measured, and on how many images."""
    if "vae" in document:
        return Path(document["vae"]["path"]).stem, document["images"]["count"]
    of = document["samples"] or document["reference"]
    return Path(of["path"]).name.removesuffix(".npz"), of["count"]


if __name__ == "__main__":
    run_script(main)
