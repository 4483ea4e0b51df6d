"""Measure samples by FID and related metrics, or a VAE by its reconstructions of held-out images.

    python evaluate.py --samples samples/joint_0400000_cfg1.0-0.0-1.0.npz --reference VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc_per_node=8 evaluate.py --samples ... --reference ...
    python evaluate.py --vae exps/e2e-vae/e2e-vae.pt --vae-arch f8d4 --data-dir data-val

Definitions are those of the ADM evaluation suite (Dhariwal & Nichol, arXiv 2105.05233), without TensorFlow. Results
are written as JSON, with everything that they depend on.
"""

import argparse
import json
import os
import platform
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from dataset import open_images
from errors import Parser, UserError, run_script
from flags import groups, types
from flags.config import parse_flags
from metrics.features import FeatureNetwork, extract_features
from metrics.images import psnr, ssim
from metrics.statistics import (
    METRICS,
    OF_FEATURES,
    ONLY_INCEPTION,
    ReadOptions,
    Reference,
    SetStatistics,
    batches,
    compare,
    open_reference,
    save_statistics,
    statistics_of,
)
from models.autoencoder import image_to_pixels, pixels_to_image
from models.encoder_table import encoder_spec
from models.numerics import AUTOCAST_DTYPES, autocast_factory, sum_over_processes, use_tf32
from storage.files import replace_text
from storage.image_sets import open_image_set, size_text
from storage.sample_files import MANIFEST_FORMAT
from training.distributed import process_state
from training.vae_step import LatentMoments
from weights.checkpoint_io import fingerprint, refuse_not_finite
from weights.downloads import is_offline
from weights.features import load_feature_networks, load_lpips
from weights.vae import VAESource, find_statistics, load_vae, open_vae


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
    what = "write the reference's statistics to this npz; with --metrics kid, also the features of its images"
    group.add_argument("--save-stats", type=Path, help=what)
    groups.add_reconstruction_flags(parser)
    groups.add_feature_flags(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--batch-size", type=types.POSITIVE, default=64, help="per process (default: %(default)s)")
    group.add_argument("--num-workers", type=types.COUNT, default=4, help="reading processes per process (default: 4)")
    precision = "of encoders in --features; Inception is float32 (default: no)"
    group.add_argument("--mixed-precision", default="no", choices=tuple(AUTOCAST_DTYPES), help=precision)
    group.add_argument("--output", type=Path, help="the JSON file (default: beside samples or VAE, .metrics.json)")
    group.add_argument("--markdown", action="store_true", help="print the results as rows of a table")
    args = parse_flags(parser, argv, "evaluate")
    of_samples = [flag for flag in ("samples", "reference", "metrics", "save_stats") if getattr(args, flag) is not None]
    if args.vae is not None and of_samples:
        parser.error(f"--vae measures reconstructions; --{of_samples[0].replace('_', '-')} is for samples")
    if args.vae is not None and args.data_dir is None:
        parser.error("--vae needs --data-dir, with images that it was not trained on")
    if args.vae is None and args.samples is None and (args.reference is None or args.save_stats is None):
        parser.error("give --samples and --reference, or --vae and --data-dir, or --reference and --save-stats")
    if args.vae is None and args.reference is None:
        parser.error("--samples needs a --reference to be compared to")
    return args


def metric_list(text: str) -> list[str]:
    """An argparse type: names of metrics, joined by commas."""
    check = types.one_of("metric", METRICS)
    return [check(name) for name in text.split(",")]


def check_wanted(args: argparse.Namespace, reference: Reference, networks: list[str], log) -> list[str]:
    """The metrics to compute: those that were asked for, or all that features and reference allow."""
    possible = [metric for metric in METRICS if "inception" in networks or metric not in ONLY_INCEPTION]
    if args.metrics and not set(args.metrics) & set(possible):
        raise UserError(f"--metrics {','.join(args.metrics)}: of Inception alone, but --features is {args.features}")
    lacking = set()
    if reference.images is None:
        lacking = set() if set(networks) <= reference.features.keys() else set(OF_FEATURES)
        lacking |= set() if "mu_s" in reference.moments.get("inception", {}) else {"sfid"}
        lacking &= set(possible)
    if needy := [metric for metric in args.metrics or () if metric in lacking]:
        raise UserError(f"--reference {reference.path}: no images, nor the statistics that {needy[0]} needs")
    if lacking and args.samples is not None and not args.metrics:
        log(f"{reference.path} has no images: no {', '.join(sorted(lacking))}")
    return [metric for metric in args.metrics or METRICS if metric in possible and metric not in lacking]


def check_images(samples: Dataset | None, reference: Reference, wanted: list[str], names: list[str], log) -> None:
    """Raise a UserError if samples and reference cannot be compared; warn about few images."""
    images = reference.images
    if samples is not None and images is not None and images.size != samples.size:
        sizes = f"--samples are of {size_text(samples.size)}, but --reference of {size_text(images.size)}"
        raise UserError(f"{sizes}; resize one of them first")
    least = 4 if {"precision", "recall"} & set(wanted) else 2
    counts = {"--samples": samples and len(samples), "--reference": reference.count if images is None else len(images)}
    for what, count in counts.items():
        if count is not None:
            if {"fid", "sfid"} & set(wanted):
                warn_of_few(what, count, names, log)
            if count < least:
                raise UserError(f"{what} holds {count} images, but {', '.join(wanted)} need {least}")


def warn_of_few(what: str, count: int, names: list[str], log) -> None:
    """Warn that Fréchet distances of few images are biased, by the networks whose covariance is then singular."""
    sizes = {name: 2048 if name == "inception" else encoder_spec(name).embed_dim for name in names}
    if few := ", ".join(f"{size} of {name}" for name, size in sizes.items() if count <= size):
        log(f"warning: {what} holds {count} images, no more than features ({few}): Fréchet distances are biased")


def evaluate_samples(args: argparse.Namespace, state, log) -> dict:
    """All metrics of --samples against --reference, and what they depend on."""
    names = args.features.split(",")
    reference = open_reference(args.reference, log)
    samples = None if args.samples is None else open_image_set(args.samples, "--samples", log)
    wanted = check_wanted(args, reference, names, log)
    check_images(samples, reference, wanted, names, log)
    networks = load_feature_networks(names, args, state.device, autocast_factory(state.device, args.mixed_precision))
    reference.check_networks(networks)
    keep = bool(OF_FEATURES & set(wanted)) and (samples is not None or args.metrics is not None)
    reading = ReadOptions(args.batch_size, args.num_workers, state)
    values, known, weights = {}, {}, dict(reference.weights)
    for network in networks:
        moments, features = reference.moments.get(network.name, {}), reference.features.get(network.name)
        if network.name not in reference.moments:
            weights[network.name] = network.sha256
        needed = {"mu", "mu_s"} if network.name == "inception" and "sfid" in wanted else {"mu"}
        if reference.images is not None and (needed - moments.keys() or keep and features is None):
            seen = statistics_of(reference.images, "reference", network, keep, reading)
            moments, features = {**seen.moments(network.name), **moments}, seen.features
        stored = {} if features is None or args.metrics is None else {"features": features}
        known[network.name] = {**moments, **stored}
        if samples is not None:
            seen = statistics_of(samples, "samples", network, keep, reading)
            if state.is_main_process:
                values |= compare(seen, moments, features, wanted, network.name)
    count = reference.count if reference.images is None else len(reference.images)
    if args.save_stats is not None and state.is_main_process:
        save_statistics(args.save_stats, known, weights, str(args.reference), count)
        print(f"statistics of the reference: {args.save_stats}")
    return {
        "metrics": values,
        "samples": samples and {"path": str(args.samples), "count": len(samples)},
        "manifest": samples and manifest_of(args.samples),
        "reference": {"path": str(args.reference), "count": count, "stored_statistics": sorted(reference.moments)},
        "features": describe_networks(networks),
    }


def manifest_of(samples: Path) -> dict | None:
    """The manifest that generate.py wrote beside the samples, if it did."""
    path = samples.with_name(samples.name.removesuffix(".npz") + ".json")
    try:
        content = json.loads(path.read_text(encoding="utf8"))
        return content if content["format"] == MANIFEST_FORMAT else None
    except (OSError, ValueError, TypeError, KeyError):  # not there, or a file of somebody else
        return None


def describe_networks(networks: list[FeatureNetwork]) -> dict:
    return {network.name: {"weights": str(network.weights), "sha256": network.sha256} for network in networks}


@torch.no_grad()
def evaluate_reconstruction(args: argparse.Namespace, state, log) -> dict:
    """Metrics of a VAE's reconstructions of --data-dir from the posterior mean, and the statistics of its latents."""
    data = open_images(args.data_dir)
    source = open_vae(args.vae_arch, args.vae, is_offline(args))
    vae = load_vae(source).eval().requires_grad_(False).to(state.device)
    refuse_not_finite(vae, f"VAE {args.vae}")
    if data.resolution % vae.config.downsampling:
        raise UserError(f"--vae-arch {args.vae_arch} needs images of a multiple of {vae.config.downsampling} px")
    names = args.features.split(",")
    warn_of_few(str(data.source), len(data), names, log)
    networks = load_feature_networks(names, args, state.device, autocast_factory(state.device, args.mixed_precision))
    lpips = load_lpips(args.lpips_vgg_ckpt, is_offline(args)).to(state.device)
    originals = [SetStatistics(len(data), state.device, keep_features=False) for _ in networks]
    recons = [SetStatistics(len(data), state.device, keep_features=False) for _ in networks]
    sums = torch.zeros(3, dtype=torch.float64, device=state.device)
    latents = LatentMoments(vae.config.z_channels, state.device)
    for indices, pixels in batches(data, "reconstructing", ReadOptions(args.batch_size, args.num_workers, state)):
        posterior = vae.encode(pixels_to_image(pixels))
        recon = image_to_pixels(vae.decode(posterior.mean))
        latents.update(posterior)
        distance = lpips(pixels_to_image(pixels), pixels_to_image(recon))
        sums += torch.stack([psnr(pixels, recon).sum(), ssim(pixels, recon).sum(), distance.double().sum()])
        for network, original, reconstructed in zip(networks, originals, recons, strict=True):
            original.update(indices, extract_features(network.module, pixels))
            reconstructed.update(indices, extract_features(network.module, recon))
    sum_over_processes(sums)
    values = dict(zip(("psnr", "ssim", "lpips"), (sums / len(data)).tolist(), strict=True))
    for network, original, reconstructed in zip(networks, originals, recons, strict=True):
        moments = original.over_processes().moments(network.name)
        found = compare(reconstructed.over_processes(), moments, None, ["fid"], network.name)
        values |= {f"r{name}": distance for name, distance in found.items()}
    return {
        "metrics": values,
        "latents": compared_latents(latents.statistics(), source, log),
        "vae": {"path": str(args.vae), "arch": args.vae_arch, "fingerprint": fingerprint(vae.state_dict())},
        "images": {"path": str(args.data_dir), "count": len(data), "fingerprint": data.fingerprint},
        "features": describe_networks(networks),
    }


def compared_latents(found: dict[str, Tensor], source: VAESource, log) -> dict[str, list[float]]:
    """Mean and standard deviation of each latent channel on these images, and as stored with the VAE."""
    measured = {"mean": found["latents_bias"], "std": 1 / found["latents_scale"]}
    if (known := find_statistics(source, log)) is not None:
        scale, bias = known
        measured |= {"stored_mean": bias, "stored_std": 1 / scale}
    return {name: values.flatten().tolist() for name, values in measured.items()}


def environment(args: argparse.Namespace, state) -> dict:
    """Versions and machine behind the numbers."""
    packages = ("torch", "torchvision", "numpy", "timm", "torch-fidelity")
    return {
        "command": sys.argv,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "device": torch.cuda.get_device_name() if state.device.type == "cuda" else state.device.type,
        "processes": state.num_processes,
        "batch_size": args.batch_size,
        "mixed_precision": args.mixed_precision,
    }


def subject(args: argparse.Namespace) -> Path | None:
    """The path of what is measured, without its suffix; None if only the statistics of a reference are asked for."""
    path = args.samples or (args.vae and Path(args.vae))
    return path and path.with_name(path.name.removesuffix(".npz").removesuffix(".pt"))


def output_path(args: argparse.Namespace) -> Path | None:
    """The JSON file, if one is written."""
    measured = subject(args)
    if args.output is not None or measured is None:
        return args.output
    path = measured.with_name(measured.name + ".metrics.json")
    return path if path.parent.is_dir() else Path(path.name)  # of a VAE on the hub


def markdown(title: str, values: dict[str, float]) -> str:
    """A table of one row."""
    rows = (["", *values], ["---"] * (1 + len(values)), [title, *(f"{value:.4g}" for value in values.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Measure, print, write."""
    args = parse_args()
    output = output_path(args)
    for path in filter(None, (output, args.save_stats)):
        if not os.access(path.absolute().parent, os.W_OK, effective_ids=True):
            raise UserError(f"{path}: its folder is not there, or not to be written to")
    use_tf32(False)
    state = process_state()
    log = partial(tqdm.write, file=sys.stderr) if state.is_main_process else lambda text: None
    measure = evaluate_samples if args.vae is None else evaluate_reconstruction
    document = measure(args, state, log)
    if not state.is_main_process:
        return
    values = document["metrics"]
    if args.markdown and values:
        print(markdown(subject(args).name, values))
    for name, value in values.items():
        print(f"{name}: {value:.6g}")
    if output is not None:
        replace_text(output, json.dumps({**document, **environment(args, state)}, indent=1) + "\n")
        print(f"results: {output}")


if __name__ == "__main__":
    run_script(main)
