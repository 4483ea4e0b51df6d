"""Pictures (--sampling-steps) and Fréchet distances (--eval-steps) that are computed during training."""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Subset

from diffusion.previews import evenly_spaced, reconstruction_grid, sample_grid
from diffusion.sampling import Sampling, sample_pixels
from metrics.features import extract_features
from metrics.statistics import ReadOptions, SetStatistics, compare, metric_name, open_reference, statistics_of
from models.autoencoder import Autoencoder
from models.numerics import autocast_factory
from models.sit import SiT
from progress import progress_bar
from training.distributed import all_reduce_max
from training.loop import Run
from weights.features import check_feature_names, load_feature_networks

REFERENCE_IMAGES = 50000  # of the training images, at most
RECONSTRUCTIONS = 32


class Monitor:
    """Shows samples of `ema`, reconstructions of 32 of the `originals`, and distances of samples to the reference.

    `ema` is given if a transformer is trained, `originals` if a VAE is. Both are training images; `reference` may also
    be None where --eval-reference names others.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        run: Run,
        vae: Autoencoder,
        ema: SiT | None = None,
        originals=None,
        reference=None,
    ):
        self.args, self.run, self.vae, self.ema = args, run, vae, ema
        self.autocast = autocast_factory(run.device, args.mixed_precision)
        self.shown = None if originals is None else evenly_spaced(originals, RECONSTRUCTIONS)
        self.evaluation = Evaluation(args, run, reference) if ema is not None and args.eval_steps else None

    def run_due(self) -> None:
        """Write the pictures and run the evaluation that are due at the end of this step."""
        run = self.run
        show_pictures = run.due(self.args.sampling_steps) and run.is_main
        if show_pictures and self.ema is not None:
            picture = sample_grid(self.ema, self.vae, self.args.seed, self.autocast, run.classes["counts"])
            run.metrics.add_picture(run.step, "samples", picture)
        if show_pictures and self.shown is not None:
            picture = reconstruction_grid(self.vae, self.shown, self.autocast)
            run.metrics.add_picture(run.step, "reconstructions", picture)
        if self.evaluation is not None and run.due(self.args.eval_steps):
            run.evaluate(self.evaluation, self.ema, self.vae)


class Evaluation:
    """Fréchet distances of `--eval-samples` EMA samples to a reference, in each of `--eval-features`.

    Sample i is a function of (seed, i), drawn as generate.py does, with 50 Euler steps without guidance and, as for
    published distances, equal probabilities of the labels, whatever the sizes of their classes. Ranks share the work,
    and the distance does not depend on their number. The reference is `images`, the training images, unless
    --eval-reference names another.

    Attributes:
        judge: the name of the distance that chooses the best checkpoint: that of the first network.
        measure: what the distances depend on beside the networks that sample.
    """

    def __init__(self, args: argparse.Namespace, run: Run, images):
        self.count, self.batch_size = args.eval_samples, run.micro_batch
        # in joint training the decoder is compiled, for one shape
        self.rows = self.batch_size if args.compile and run.device.type == "cuda" else 0
        self.hosts = run.hosts
        self.rank, self.world, self.device = run.accelerator.process_index, run.world, run.device
        autocast = autocast_factory(run.device, args.mixed_precision)
        self.sampling = Sampling(seed=args.seed, autocast=autocast, class_counts=run.classes["counts"])
        self.networks = load_feature_networks(check_feature_names(args.eval_features), args, run.device)
        self.judge = "eval_" + metric_name("fid", self.networks[0].name)
        self.measure = {
            "samples": self.count,
            "reference": args.eval_reference or "training images",
            "weights": {network.name: network.sha256 for network in self.networks},
        }
        self.moments = self.reference_moments(args, run, images)

    def reference_moments(self, args: argparse.Namespace, run: Run, images) -> dict[str, dict[str, Tensor]]:
        """The reference's moments by network: stored ones, or those of its images, which a dry run does not read."""
        stored = {}
        if args.eval_reference is not None:
            reference = open_reference(Path(args.eval_reference), run.print, "--eval-reference")
            reference.check_networks(self.networks)
            images, stored = reference.images, reference.moments
        elif len(images) > REFERENCE_IMAGES:
            images = Subset(images, [i * len(images) // REFERENCE_IMAGES for i in range(REFERENCE_IMAGES)])
        if args.dry_run:
            return stored
        reading = ReadOptions(self.batch_size, args.num_workers, run.accelerator.state)
        return {
            network.name: stored.get(network.name)
            or statistics_of(images, "reference", network, False, reading).moments(network.name)
            for network in self.networks
        }

    @torch.no_grad()
    def __call__(self, ema: SiT, vae: Autoencoder) -> dict[str, float]:
        """Distances by name (eval_fid, or eval_fd_NAME), on rank 0; NaN if a sample is not finite."""
        bad = torch.zeros((), dtype=torch.bool, device=self.device)
        seen = [SetStatistics(self.count, self.device, keep_features=False) for _ in self.networks]
        indices = list(range(self.rank, self.count, self.world))
        parts = [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        for part in progress_bar(parts, desc="evaluation", unit="batch", leave=False, disable=self.rank > 0):
            pixels, finite = sample_pixels(ema, vae, part, self.sampling, self.rows)
            bad |= ~finite.all()
            for network, statistics in zip(self.networks, seen, strict=True):
                statistics.update(torch.tensor(part), extract_features(network.module, pixels))
        (bad,) = all_reduce_max([int(bad)], self.hosts)
        distances = {}
        for network, statistics in zip(self.networks, seen, strict=True):
            statistics.over_processes()
            if self.rank == 0:
                distances |= compare(statistics, self.moments[network.name], None, ["fid"], network.name)
        return {f"eval_{name}": math.nan if bad else distance for name, distance in distances.items()}
