"""Sample a trained run: PNGs, and the `.npz` that the ADM evaluation suite reads.

    torchrun --nproc_per_node=8 generate.py --exp-path exps/joint --train-steps 400000 --mode sde --num-steps 250 \\
        --cfg-scale 1.0
    python generate.py --sit-ckpt pretrained/SiT-XL-2-256x256.pt --vae f8d4 --vae-ckpt pretrained/sdvae/sdvae-f8d4.pt
    python generate.py --exp-path exps/joint --classes 207,360 --num-fid-samples 16 --no-npz --grid

Sample i is a function of (--global-seed, i): its label, its noise and the noise of every step do not depend on the
number of processes or the batch size. The same command resumes an interrupted run.
"""

import argparse
import math
import re
import sys
import unicodedata
from argparse import BooleanOptionalAction
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from diffusion.previews import COLUMNS, PADDING, grid
from diffusion.sampling import Sampling, check_finite, labels_with_images, sample_pixels
from diffusion.transport import PATH_TYPES, TIME_CONVENTION
from errors import Parser, UserError, nearest, run_script
from flags.config import parse_flags
from flags.groups import add_offline_flag, add_vae_name
from flags.types import COUNT, POSITIVE, VAE_WEIGHTS, number
from models.numerics import AUTOCAST_DTYPES, autocast_factory, cast_weights, compile_in_place, to_host, use_tf32
from progress import progress_bar
from storage.files import Action, locked, require_space, writing_behind, written_whole
from storage.sample_files import SampleFiles
from training.distributed import process_state
from weights.checkpoint_io import fingerprint
from weights.downloads import is_offline
from weights.trained_run import Experiment, load_experiment, load_transformer_file

GRID_SAMPLES = 64
COMPILE_FROM = 1000


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--exp-path", type=Path, help="a run's folder, with checkpoints/ and args.json")
    what.add_argument("--sit-ckpt", type=Path, help="a transformer's file, such as SiT's or REPA's; needs --vae")
    add_vae_name(parser, "--vae", None, "vae_ckpt")
    parser.add_argument("--train-steps", type=step_or_best, help="a checkpoint's step, or best (default: the latest)")
    parser.add_argument("--vae-ckpt", help=f"a frozen-VAE run's VAE, if it is not where its flags say; {VAE_WEIGHTS}")
    add_offline_flag(parser)
    parser.add_argument("--sample-dir", type=Path, default=Path("samples"), help="where samples go (default: samples)")
    parser.add_argument("--num-fid-samples", type=POSITIVE, default=50000, help="how many (default: %(default)s)")
    parser.add_argument("--pproc-batch-size", type=POSITIVE, default=256, help="per process (default: %(default)s)")
    parser.add_argument("--global-seed", type=int, default=0, help="seed of all draws (default: %(default)s)")
    group = parser.add_argument_group("sampler")
    group.add_argument("--mode", default="ode", choices=("ode", "sde"), help="(default: %(default)s)")
    group.add_argument("--num-steps", type=POSITIVE, default=50, help="(default: %(default)s)")
    group.add_argument(
        "--heun", action=BooleanOptionalAction, default=False, help="second-order steps, --mode ode only"
    )
    group.add_argument(
        "--path-type", choices=PATH_TYPES, help="the run's interpolant (default: that of its flags, or linear)"
    )
    group.add_argument("--cfg-scale", type=number(float, at_least=1), default=1.5, help="1: no guidance (default: 1.5)")
    group.add_argument("--guidance-low", type=number(float, at_least=0), default=0.0, help="guide from t (default: 0)")
    group.add_argument("--guidance-high", type=number(float, at_least=0), default=1.0, help="up to t (default: 1)")
    group.add_argument(
        "--mixed-precision", default="no", choices=tuple(AUTOCAST_DTYPES), help="of the networks (default: no)"
    )
    group.add_argument("--tf32", action=BooleanOptionalAction, default=True, help="TF32 matrix products on GPUs")
    group.add_argument(
        "--compile",
        action=BooleanOptionalAction,
        default=True,
        help=f"compile the networks on GPUs, from {COMPILE_FROM} samples per process: for fewer it does not pay",
    )
    group = parser.add_argument_group("labels and files")
    labels = "random, or in turn, or as often as there are training images; only those that have any (default: random)"
    group.add_argument("--labels", default="random", choices=("random", "balanced", "data"), help=labels)
    group.add_argument("--classes", type=class_list, help="these in turn, by label or name, whatever --labels says")
    group.add_argument("--png", action=BooleanOptionalAction, default=True, help="write one PNG file per sample")
    group.add_argument("--npz", action=BooleanOptionalAction, default=True, help="write all samples into one npz")
    group.add_argument("--grid", action="store_true", help="one picture of the first 64, a row per class of --classes")
    args = parse_flags(parser, argv, "generate")
    if (args.sit_ckpt is None) != (args.vae is None):
        parser.error("--sit-ckpt and --vae belong together; with --exp-path the run says which VAE it has")
    if args.sit_ckpt is not None and args.train_steps is not None:
        parser.error("--train-steps chooses a checkpoint of --exp-path; --sit-ckpt names a file")
    if args.guidance_low >= args.guidance_high:
        interval = f"--guidance-low {args.guidance_low:g} is not below --guidance-high {args.guidance_high:g}"
        parser.error(f"{interval}; guidance acts at times between them")
    if args.heun and args.mode == "sde":
        parser.error("--heun goes with --mode ode; the SDE is integrated by Euler-Maruyama")
    if not (args.png or args.npz or args.grid):
        parser.error("--no-png and --no-npz leave nothing to write; keep one, or ask for --grid")
    return args


def step_or_best(text: str) -> int | str:
    """An argparse type: a step, or "best" for checkpoints/best.pt."""
    return text if text == "best" else COUNT(text)


def class_list(text: str) -> list[str]:
    """An argparse type: words joined by commas, which `find_label` understands."""
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 207,360 or cat,dog")
    return words


def find_label(word: str, run: Experiment, log: Callable[[str], None]) -> int:
    """The label that a word of --classes means: its own number or that of the class with this name."""
    word = unicodedata.normalize("NFC", word)  # as preprocessing.py writes names
    names, count = list(run.class_names), run.sit.num_classes
    named = names.index(word) if word in names else None
    number = int(word) if re.fullmatch("[+-]?[0-9]+", word) else None
    is_label = number in range(count)
    if named is None and not is_label:
        hint = "; its checkpoint does not know their names"
        if names:
            hint = f"; did you mean {(near := nearest(word, names))!r}, which is label {names.index(near)}?"
        raise UserError(f"--classes {word}: the run has classes 0 to {count - 1}{hint if number is None else ''}")
    if is_label and named not in (None, number) and word == str(number):
        what = f"--classes {word}: both a label and the name of the class with label {named}"
        raise UserError(f"{what}; write +{number} for that label, or +{named} for that class")
    label = number if named is None else named
    if label not in labels_with_images(run.class_counts, count):
        log(f"warning: --classes {word}: label {label} had no training images")
    return label


def check_run(args: argparse.Namespace, run: Experiment, log: Callable[[str], None]) -> list[str]:
    """Turn --classes into labels; return their titles: names, or labels where a class has none, or [] if none has one.

    Raises a UserError for classes, guidance or an interpolant that the run was not trained with.
    """
    path_type = run.flags["path_type"]
    if args.classes:
        args.classes = [find_label(word, run, log) for word in args.classes]
    elif args.labels == "data" and not run.class_counts:
        what = f"--labels data: the checkpoint of {run.name} does not say how many training images each class had"
        raise UserError(f"{what}; use random or balanced")
    names = dict(enumerate(run.class_names))
    if titles := [names.get(label, str(label)) for label in args.classes or () if names]:
        log("classes: " + ", ".join(f"{label} ({title})" for label, title in zip(args.classes, titles, strict=True)))
    if args.cfg_scale > 1 and run.sit.null_label is None:
        raise UserError(f"--cfg-scale {args.cfg_scale:g}: the run was trained without dropping labels; use 1")
    if args.path_type not in (None, path_type):
        raise UserError(f"--path-type {args.path_type}: the run was trained with {path_type}; leave the flag out")
    return titles


def describe(args: argparse.Namespace, run: Experiment, titles: list[str]) -> dict:
    """Everything that determines the samples; `titles` are those of --classes."""
    guided = args.cfg_scale > 1
    classes = {"class_names": titles} if args.classes else {"class_counts": list(run.class_counts)}
    return {
        "experiment": run.name,
        "train_steps": run.step,
        "model": run.flags["model"],
        "model_fingerprint": fingerprint(run.sit.state_dict()),
        "vae": run.flags["vae"],
        "vae_fingerprint": fingerprint(run.vae.state_dict()),
        "count": args.num_fid_samples,
        "resolution": run.flags["resolution"],
        "num_classes": run.sit.num_classes,
        "labels": args.classes or args.labels,
        **{name: known for name, known in classes.items() if known},
        "seed": args.global_seed,
        **{name: getattr(args, name) for name in ("mode", "num_steps", "heun", "cfg_scale", "mixed_precision", "tf32")},
        "path_type": run.flags["path_type"],
        "time_convention": TIME_CONVENTION,
        "guidance_low": args.guidance_low if guided else None,
        "guidance_high": args.guidance_high if guided else None,
        "pixels": "rounded",
        **({"assumed": run.assumed} if run.assumed else {}),
    }


def environment(args: argparse.Namespace, state) -> dict:
    """What made the samples without determining more than their rounding."""
    return {
        "command": sys.argv,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if state.device.type == "cuda" else state.device.type,
        "processes": state.num_processes,
        "pproc_batch_size": args.pproc_batch_size,
        "compile": args.compile,
    }


def set_name(args: argparse.Namespace, run: Experiment) -> str:
    """Name of the set of samples, as in the reference; a file without a run's folder is named by itself."""
    step = "" if run.assumed else f"_{run.step:07d}"
    return f"{run.name}{step}_cfg{args.cfg_scale}-{args.guidance_low}-{args.guidance_high}"


def sampling_settings(args: argparse.Namespace, run: Experiment, device: torch.device) -> Sampling:
    """The settings of the sampler that the flags give."""
    same = ("mode", "num_steps", "heun", "cfg_scale", "guidance_low", "guidance_high", "labels")
    return Sampling(
        **{name: getattr(args, name) for name in same},
        seed=args.global_seed,
        path_type=run.flags["path_type"],
        class_counts=run.class_counts,
        classes=tuple(args.classes or ()),
        autocast=autocast_factory(device, args.mixed_precision),
    )


def make_missing(files: SampleFiles, run: Experiment, args: argparse.Namespace, state) -> None:
    """Make this process's share of the missing samples: every world-th batch in which one is missing.

    Batches are always made whole, so that rounding does not depend on what is missing. While a batch is sampled, the
    previous ones are copied to the host and written.
    """
    missing = files.missing()
    sampling = sampling_settings(args, run, state.device)
    state.wait_for_everyone()  # all processes see the same samples missing before the first one is written
    size, world = args.pproc_batch_size, state.num_processes
    batches = [range(first, min(first + size, files.count)) for first in range(0, files.count, size)]
    batches = [batch for batch in batches if not missing.isdisjoint(batch)]
    done = files.count - sum(map(len, batches))
    with (
        progress_bar(
            total=files.count, initial=done, unit="sample", desc="sampling", disable=not state.is_main_process
        ) as bar,
        writing_behind(bar.update) as write,
    ):
        for first in range(0, len(batches), world):
            together = batches[first : first + world]
            if state.process_index < len(together):
                indices = list(together[state.process_index])
                pixels, finite = sample_pixels(run.sit, run.vae, indices, sampling, size if args.compile else 0)
                finite, _ = to_host(finite)  # complete when the pixels are, which are copied later
                pixels, wait = to_host(pixels.permute(0, 2, 3, 1))
                begin = partial(wait_for_finite, wait, finite, indices, sampling, run.sit.num_classes)
                write(files.writes(indices, pixels), begin, sum(map(len, together)))


def wait_for_finite(wait: Action, *samples) -> None:
    """Wait for a batch's copy to the host; raises the UserError of `check_finite`, so that nothing is written."""
    wait()
    check_finite(*samples)


def write_grid(files: SampleFiles, args: argparse.Namespace, titles: list[str]) -> None:
    """One picture of the first samples: a row per class of --classes, with its title if any, or else eight a row."""
    samples = torch.tensor(np.stack(list(islice(files.in_order(), GRID_SAMPLES)))).permute(0, 3, 1, 2)
    columns = COLUMNS
    if args.classes:
        rows = len(args.classes)
        columns = min(COLUMNS, -(-len(samples) // rows))
        blank = samples.new_full((rows, *samples.shape[1:]), 255)  # for the last column
        cells = torch.cat([samples, blank])[: columns * rows]
        samples = cells.unflatten(0, (columns, rows)).transpose(0, 1).flatten(0, 1)
        titles = [f"{label} {title}" for label, title in zip(args.classes, titles, strict=bool(titles))]
    picture = Image.fromarray(grid(samples, columns).permute(1, 2, 0).numpy())
    with written_whole(files.picture) as file:
        (with_titles(picture, titles) if titles else picture).save(file, "png")


def with_titles(picture: Image.Image, titles: list[str]) -> Image.Image:
    """`picture` with a title left of each of its rows."""
    tile = (picture.height - PADDING) / len(titles)
    font = ImageFont.load_default(max(10, tile // 10))
    margin = math.ceil(max(map(font.getlength, titles))) + 4 * PADDING
    titled = Image.new("RGB", (margin + picture.width, picture.height), "white")
    for row, title in enumerate(titles):
        ImageDraw.Draw(titled).text((2 * PADDING, (row + 0.5) * tile), title, "black", font, anchor="lm")
    titled.paste(picture, (margin, 0))
    return titled


def main() -> None:
    """Load the run, make the missing samples and write what is wanted of them."""
    args = parse_args()
    use_tf32(args.tf32)
    state = process_state()
    log = print if state.is_main_process else lambda text: None
    if args.sit_ckpt is None:
        run = load_experiment(args.exp_path, args.train_steps, args.vae_ckpt, is_offline(args), log)
    else:
        run = load_transformer_file(args.sit_ckpt, args.vae, args.vae_ckpt, args.path_type, is_offline(args), log)
    titles = check_run(args, run, log)
    files = SampleFiles(args.sample_dir, set_name(args, run), describe(args, run, titles), args.png, args.npz)
    files.check()
    what = f"{files.count} samples of {files.resolution} px"
    require_space(args.sample_dir, files.bytes_needed, what)
    for network in (run.sit, run.vae):
        network.to(state.device)
        cast_weights(network, args.mixed_precision)
    pays = args.num_fid_samples >= COMPILE_FROM * state.num_processes
    args.compile = compile_in_place([*run.sit.blocks, run.vae.parts[1]], args.compile and pays, state.device)
    with locked(files.parts) if state.is_main_process else nullcontext():
        if state.is_main_process:
            files.begin(environment(args, state))
        state.wait_for_everyone()
        make_missing(files, run, args, state)
        state.wait_for_everyone()
        if state.is_main_process:
            files.finish()
            if args.grid:
                write_grid(files, args, titles)
            files.clean()
            written = (files.png_folder, files.npz_file, files.picture, files.manifest)
            print(f"{what}: " + ", ".join(str(path) for path in written if path.exists()))


if __name__ == "__main__":
    run_script(main)
