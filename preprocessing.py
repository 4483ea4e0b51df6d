"""Photographs -> shards of centre-cropped square images, ready for training.

    python preprocessing.py --imagenet-path /data/imagenet/train --output-path data --resolution 256

The source is a tree with one folder a class (label = index of the sorted top-level folders that give an image), any
tree with a `dataset.json` of labels at its top: {"labels": [["path/in/tree.png", 7], ...]}, or the reference's
images.h5. Hidden files and files that are not readable images are counted and listed. Shards are written atomically by
parallel workers; running the same command again continues where it stopped.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import safe_open

from dataset import IMAGE_FORMAT, fingerprint_of, images_directory
from errors import Parser, UserError, run_script
from flags.config import parse_flags
from flags.types import number
from progress import progress_bar
from storage.files import locked, replace_text, require_space
from storage.photographs import Skipped, Source, count_reasons, list_sources, printable, read_image, reason_for
from storage.reference_hdf5 import is_hdf5, list_hdf5, opened_hdf5
from storage.shards import is_made_by, list_shards, read_header, refuse_other_shards, shard_name, write_shard

EXIT_TERMINATED = 143
SECONDS_BETWEEN_LOOKS = 1
SHARD_IMAGES = 512  # 101 MB at 256 px; a worker holds up to three copies in memory


def plan_of(root: Path, sources: Iterable[Source], resolution: int) -> str:
    """Hash of everything that decides what the shards hold: paths, labels, sizes, times of change, resolution."""
    digest = hashlib.sha256(f"{IMAGE_FORMAT} {resolution}".encode())
    for source in sources:
        try:
            status = (root if is_hdf5(root) else root / source.path).stat()
            state = f"{status.st_size}\t{status.st_mtime_ns}"
        except OSError:  # a dangling link; reading it will list it as skipped
            state = "none"
        digest.update(f"\n{source.path}\t{source.label}\t{state}".encode("utf8", "surrogateescape"))
    return digest.hexdigest()


def make_shard(job: tuple[int, list[Source]], root: Path, directory: Path, resolution: int, plan: str) -> int:
    """Decode a shard's images and write it atomically; returns its number. A whole shard of this plan is left as is."""
    i, sources = job
    path = directory / shard_name(i)
    if is_made_by(path, plan):
        return i
    pixels = np.empty((len(sources), 3, resolution, resolution), np.uint8)
    labels, skipped = [], []
    with opened_hdf5(root) if is_hdf5(root) else nullcontext(root.joinpath) as opened:
        for source in sources:
            try:
                pixels[len(labels)] = read_image(opened(source.path), resolution)
                labels.append(source.label)
            except Exception as error:  # Pillow raises a dozen kinds on broken files; each is listed as skipped
                skipped.append(Skipped(source.path, reason_for(error)))
                if not is_hdf5(root) and not os.path.lexists(root / source.path):
                    raise UserError(f"{root / source.path}: was listed, and now is gone; run the same again") from None
    tensors = {"pixels": pixels[: len(labels)], "labels": np.array(labels, np.int64)}
    write_shard(path, tensors, {"plan": plan, "skipped": skipped})
    return i


def write_index(directory: Path, index: dict, count: int, skipped: list[Skipped]) -> tuple[dict, list[Skipped]]:
    """Write index.json and skipped.txt for `count` shards; returns the index and all that was skipped."""
    class_counts = np.zeros(index["num_classes"], np.int64)
    for i in range(count):
        entries = read_header(directory / shard_name(i)).metadata["skipped"]
        skipped = skipped + [Skipped(*entry) for entry in entries]
        with safe_open(directory / shard_name(i), "numpy") as shard:
            class_counts += np.bincount(shard.get_tensor("labels"), minlength=len(class_counts))
    shards = list_shards(directory, count)
    index = {**index, "class_counts": class_counts.tolist(), "images": int(class_counts.sum()), "skipped": len(skipped)}
    index = {**index, "fingerprint": fingerprint_of({**index, "shards": shards}), "shards": shards}
    lines = [f"{printable(entry.path)}\t{printable(entry.reason)}\n" for entry in sorted(skipped)]
    replace_text(directory / "skipped.txt", "".join(lines))
    replace_text(directory / "index.json", json.dumps(index, indent=1))
    return index, skipped


def describe_classes(classes: list[str], counts: list[int]) -> str:
    """Labels, classes and their numbers of images, and whether numbered folders are in another order, on one line."""
    lines = [f"{label} = {printable(name)} ({counts[label]})" for label, name in enumerate(classes)]
    lines = lines if len(lines) <= 12 else [*lines[:6], "...", *lines[-5:]]
    by_number = sorted(classes, key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(12), name))
    note = "" if by_number == classes else "numbered folders are sorted as text, as ImageFolder does; "
    return f"{note}labels and their images, {min(counts)} to {max(counts)}: {', '.join(lines)}"


def preprocess(
    root: Path, output: Path, resolution: int, workers: int, max_images: int | None
) -> tuple[dict, list[Skipped]]:
    """Turn the tree or HDF5 file at `root` into shards in OUTPUT/images; returns the index and what was skipped."""
    if not (root.is_file() if is_hdf5(root) else root.is_dir()):
        archive = "a file, but no images.h5; unpack archives, and name the folder"
        raise UserError(f"--imagenet-path {root}: {archive if root.is_file() else 'no such file or folder'}")
    # where the tree is in the output folder itself, only the shards are no part of it
    own = output if output.resolve() != root.resolve() else images_directory(output)
    sources, skipped, classes = (list_hdf5(root), [], None) if is_hdf5(root) else list_sources(root, own)
    sources = sources[:max_images]
    if not sources:
        found = f"found: {count_reasons(skipped) or 'no files'}; unpack archives"
        expected = "expected one folder a class, or images and a dataset.json"
        raise UserError(f"--imagenet-path {root}: no images; {expected}; {found}")
    plan = plan_of(root, sources, resolution)
    jobs = [(i, sources[first : first + SHARD_IMAGES]) for i, first in enumerate(range(0, len(sources), SHARD_IMAGES))]
    num_classes = max(len(classes or []), 1 + max(source.label for source in sources))
    names = classes and [unicodedata.normalize("NFC", name) for name in classes]  # macOS decomposes accents
    index = {"format": IMAGE_FORMAT, "resolution": resolution, "num_classes": num_classes, "classes": names}
    directory = images_directory(output)
    with locked(directory):
        others = "other images or another resolution; delete it, or choose another --output-path"
        refuse_other_shards(directory, plan, len(jobs), others)
        missing = sum(len(part) for i, part in jobs if not (directory / shard_name(i)).exists())
        require_space(directory, missing * 3 * resolution**2, f"{missing} images of {resolution} px")
        (directory / "index.json").unlink(missing_ok=True)
        job = partial(make_shard, root=root, directory=directory, resolution=resolution, plan=plan)
        write_shards(jobs, workers, job)
        return write_index(directory, index, len(jobs), skipped)


def write_shards(jobs: list[tuple[int, list[Source]]], workers: int, job: Callable[..., int]) -> None:
    """Run `job`, which returns its shard's number, for every shard in parallel processes."""
    context = multiprocessing.get_context("fork")
    bar = progress_bar(total=sum(len(sources) for _, sources in jobs), unit="image", desc="preprocessing")
    try:
        with bar, ProcessPoolExecutor(min(workers, len(jobs)), context, follow_main, (os.getpid(),)) as pool:
            try:
                for done in as_completed([pool.submit(job, item) for item in jobs]):
                    bar.update(len(jobs[done.result()][1]))
            except BaseException:  # leaving the pool would first finish all that was submitted
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in multiprocessing.active_children():
                    worker.kill()
                raise
    except BrokenProcessPool as error:
        raise UserError(
            "a worker was killed, most likely for want of memory; the same command with fewer --num-workers continues"
        ) from error


def follow_main(main: int) -> None:
    """Let a worker ignore Ctrl-C, on which the main process ends it, and end when the main process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == main:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(EXIT_TERMINATED)

    threading.Thread(target=watch, daemon=True).start()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    at_least_1 = number(int, at_least=1)
    images = "tree of images (a folder a class, or dataset.json), or images.h5"
    parser.add_argument("--imagenet-path", type=Path, required=True, help=images)
    parser.add_argument(
        "--output-path", type=Path, default=Path("data"), help="shards go to its folder images/ (default: data)"
    )
    parser.add_argument("--resolution", type=at_least_1, default=256, help="side of the square images (default: 256)")
    parser.add_argument("--num-workers", type=at_least_1, default=16, help="parallel processes (default: 16)")
    parser.add_argument("--max-images", type=at_least_1, help="use only the first N files in sorted order")
    return parse_flags(parser, argv, "preprocessing")


def main() -> None:
    """Preprocess, and print a summary."""
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    index, skipped = preprocess(
        args.imagenet_path, args.output_path, args.resolution, args.num_workers, args.max_images
    )
    directory = images_directory(args.output_path)
    print(f"{index['images']} images of {index['num_classes']} classes at {index['resolution']} px in {directory}")
    classes = index["classes"] or [str(label) for label in range(index["num_classes"])]
    print(describe_classes(classes, index["class_counts"]))
    if skipped:
        print(f"{len(skipped)} files skipped, listed in {directory / 'skipped.txt'}: {count_reasons(skipped)}")
    if index["images"] == 0:
        raise UserError(f"none of the files below {args.imagenet_path} is a readable image")


if __name__ == "__main__":
    run_script(main)
