"""One training run: its folder, processes and loop.

`for step, batch in run.steps(data):` reads, resumes, logs at intervals, saves, obeys signals and shows progress; the
training step itself stays in the script.
"""

import argparse
import atexit
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from errors import UserError
from loss.vae_loss import VAELossConfig, first_gan_step
from models.numerics import to_device, use_tf32
from progress import progress_bar
from storage.files import locked, remove_leftovers, replace_text, require_writable
from training.checkpoints import CheckpointFolder, TrainingState, state_of
from training.distributed import (
    COLLECTIVE_TIMEOUT,
    all_reduce_max,
    differing_tensor,
    follow_launcher,
    gradient_sync,
    host_group,
    on_first_process,
    tensor_not_finite,
)
from training.log import LOG_INTERVAL, MetricsLog, Watch
from training.optimizer import learning_rate_factor
from training.randomness import BatchOrder, Rows, randomly_flipped
from training.resume_checks import FORKABLE, RESUMABLE, refuse_changed_flags, refuse_other_processes
from weights.checkpoint_io import latest_checkpoint, read_checkpoint, training_flags

EXIT_INTERRUPTED = 75


class Batch(NamedTuple):
    """What one rank trains on at one micro-batch."""

    pixels: Tensor  # (B,3,R,R) uint8
    labels: Tensor  # (B,) int64
    step: int  # 0-based optimiser step
    rows: Rows  # which rows of the global batch these are
    moments: Tensor | None = None  # (B,2C,h,w) float32, where latents are cached: mean, then std


class Run:
    """A training run in OUTPUT_DIR/EXP_NAME, on one process or many."""

    def __init__(self, args: argparse.Namespace):
        from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
        from accelerate.utils import ProjectConfiguration

        follow_launcher()
        use_tf32(args.allow_tf32)
        timeout = InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)
        self.args = args
        self.directory = Path(args.output_dir, args.exp_name)
        self.checkpoints = CheckpointFolder(self.directory / "checkpoints", self.print)
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),  # else several processes would not find each other on CPUs
            mixed_precision="no",  # training/optimizer.py does it
            dynamo_backend="no",  # --compile does it
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(str(self.directory), str(self.directory / args.logging_dir)),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False), timeout],
        )
        self.device = self.accelerator.device
        self.world = self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        if (backend := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper()) != "NO":
            self.print(f"accelerate's dynamo backend {backend} is not used; --compile compiles the networks")
        parts = f"{self.world} processes x {args.gradient_accumulation_steps} accumulation steps"
        # images of one process's micro-batch
        self.micro_batch, rest = divmod(args.batch_size, self.world * args.gradient_accumulation_steps)
        if rest:
            raise UserError(f"--batch-size {args.batch_size} (over all processes) is no multiple of {parts}")
        what = f"{self.micro_batch}, on {self.device.type}, precision {args.mixed_precision}"
        self.print(f"batch: {args.batch_size} images a step = {parts} x {what}")
        self.step = 0  # optimiser steps begun, this one included
        self.step_complete = False
        self.learning_rate_factor = 1.0
        self.state: TrainingState | None = None
        self.identity: dict = {}
        self.classes: dict | None = None  # names (a list, or None) and numbers of training images, by label
        self.wrapped: list[nn.Module] = []
        self.metrics = MetricsLog(self.accelerator, args, self.directory, self.print)
        self.watch = Watch(scaled=args.mixed_precision == "fp16")
        self.hosts = host_group()
        self.signal = self.agreed_signal = 0  # that asked this process, and then all processes, to stop
        self.saved_at = time.monotonic()
        self.resources = ExitStack()

    def print(self, text: str) -> None:
        if self.is_main:
            tqdm.write(text)

    def prepare(self, module: nn.Module) -> nn.Module:
        """`module` on this process's device, wrapped in DistributedDataParallel if there are several processes."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of broadcast_buffers, whose successors behave otherwise
            module = self.accelerator.prepare_model(module)
        self.wrapped.append(module)
        return module

    def begin(
        self, nets, identity: dict, loss: VAELossConfig | None = None, check: Callable[[], None] = lambda: None
    ) -> None:
        """Restore a step's networks and optimisers from the run's checkpoint, if there is one, and open the log.

        `identity` has the fingerprints of data and weights, which must stay the same when the run continues; `loss` is
        the VAE's, if one is trained. `check` may refuse what was restored before anything is written.

        Raises:
            UserError: another process has the run; the checkpoint is missing, damaged, of other networks or made with
                other flags or data; or processes were started differently.
        """
        self.state, self.identity = state_of(nets), identity
        if loss is not None:
            self.identity = {**identity, "loss": asdict(loss)}
            self.watch.gan_start = first_gan_step(loss)
        refuse_other_processes(vars(self.args), self.identity, self.hosts)
        try:
            if (path := on_first_process(self._choose_checkpoint, self.hosts)) is not None:
                self._restore(Path(path))
                check()
                self.print(f"continuing after step {self.step} from {path}")
            self._check_processes()
        except UserError:
            self.resources.close()  # the folder's lock
            raise
        if self.args.dry_run:
            return
        if self.is_main:
            replace_text(self.directory / "args.json", json.dumps(vars(self.args), indent=4) + "\n")
        self.metrics.open(self.step)

    def _choose_checkpoint(self) -> str | None:
        if self.args.dry_run:
            require_writable(self.directory)
        else:
            self.resources.enter_context(locked(self.directory))
            for folder in self.directory.iterdir():
                remove_leftovers(folder)
        path = self.checkpoints.to_continue(self.args.resume_step, self.args.continue_train_exp_dir)
        return None if path is None else str(path)

    def _restore(self, path: Path) -> None:
        checkpoint = read_checkpoint(path, verify=False)
        free = RESUMABLE if path.parent == self.checkpoints.directory else RESUMABLE | FORKABLE
        refuse_changed_flags(checkpoint, vars(self.args), self.identity, path, free)
        now = self.args.gradient_accumulation_steps
        before = training_flags(checkpoint, path).get("gradient_accumulation_steps", now)
        if before != now and "vae" in self.state.networks:
            sizes = f"{self.args.batch_size // now} images, before over {self.args.batch_size // before}"
            self.print(f"warning: --gradient-accumulation-steps {before} -> {now}: batch statistics are over {sizes}")
        self.step = self.state.restore(checkpoint, str(path))

    def last_step(self, data) -> int:
        return min(self.args.max_train_steps, self.args.epochs * (len(data) // self.args.batch_size))

    def steps(self, data) -> Iterator[tuple[int, Batch]]:
        """Yield (1-based step, batch) to the end of training, once per micro-batch.

        `data` is a map-style dataset of (pixels, label) or (pixels, label, moments). After each step this logs, saves
        and obeys signals: SIGTERM or SIGINT saves a checkpoint at the next step boundary and exits with code 75.
        A UserError says that training cannot recover, see `Watch`.
        """
        args, last, first = self.args, self.last_step(data), self.step
        rank, accumulation = self.accelerator.process_index, self.args.gradient_accumulation_steps
        order = BatchOrder(len(data), args.batch_size, args.seed, first, last, rank, self.world, accumulation)
        loader = DataLoader(
            data,
            batch_sampler=order,
            num_workers=args.num_workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=ignore_signals,
        )
        batches = iter(loader)
        atexit.register(end_workers)
        bar = progress_bar(total=last, initial=first, desc=args.exp_name, unit="step", disable=not self.is_main)
        previous = {kind: signal.signal(kind, self._on_signal) for kind in (signal.SIGTERM, signal.SIGINT)}
        self.metrics.clock = self.saved_at = time.monotonic()
        try:
            for step in range(first, last):
                self.step = step + 1
                self.learning_rate_factor = learning_rate_factor(step, last, args.lr_warmup_steps, args.lr_schedule)
                for optimizer in self.state.optimizers.values():
                    optimizer.scale_learning_rate(self.learning_rate_factor)
                for micro in range(accumulation):
                    pixels, labels, *moments = to_device(next(batches), self.device)
                    rows = order.micro_batch_rows(micro)
                    if getattr(args, "random_flip", False):
                        pixels = randomly_flipped(pixels, args.seed, step, rows)
                    self.step_complete = micro == accumulation - 1
                    with gradient_sync(self.wrapped, sync=self.step_complete):
                        yield self.step, Batch(pixels, labels, step, rows, *moments)
                if step == first:
                    self.print(f"peak memory of the first step: {peak_memory(self.device) / 2**30:.2f} GiB per process")
                self._finish_step(bar, last)
        except SystemExit:
            # a launcher that sees one process end signals the others, which are about to end with the same code
            previous = dict.fromkeys(previous, signal.SIG_IGN)
            raise
        finally:
            bar.close()
            for kind, handler in previous.items():
                signal.signal(kind, handler)

    def end(self) -> None:
        self.metrics.close()
        self.accelerator.end_training()
        self.resources.close()

    def due(self, interval: int) -> bool:
        """Whether something done every `interval` steps is due at the end of this step."""
        return self.step_complete and self.step % interval == 0

    def log(self, metrics: dict[str, Tensor | None]) -> None:
        """Log a micro-batch's metrics (scalars on the device, or None) without waiting for the device."""
        rate = {}
        if self.args.lr_warmup_steps or self.args.lr_schedule != "constant":
            rate = {"learning_rate_factor": torch.full((), self.learning_rate_factor, device=self.device)}
        self.metrics.add(self.step, {**metrics, **self.state.metrics(), **rate}, self.step_complete)

    def evaluate(self, evaluation, *nets: nn.Module) -> None:
        """Log the distances that an `Evaluation` of `nets` finds, and keep the state as best.pt if it is the best."""
        self._fetch_and_check()
        self._check_state()
        with self.metrics.clock_stopped():
            values = evaluation(*nets)
        self.metrics.evaluations[self.step] = values
        if self.is_main:
            self.print(f"step {self.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
            self.checkpoints.save_if_best(self._state_dict(), evaluation.measure, evaluation.judge, values)

    def _state_dict(self) -> dict:
        return self.state.to_dict(vars(self.args), self.step, self.identity, self.classes)

    def _finish_step(self, bar, last: int) -> None:
        bar.update()
        stop, rolling = self._sync_stop_and_save(last)
        permanent = self.step == last or self.due(self.args.checkpointing_steps)
        save = stop or rolling or permanent
        fetch = save or self.due(LOG_INTERVAL)
        if fetch:
            self._fetch_and_check()
        if save or (self.args.check_ranks and self.due(self.args.check_ranks)):
            self._check_state()
        if fetch:
            latest = self.metrics.write(sync=save)
            bar.set_postfix({name: f"{latest[name]:.3g}" for name in list(latest)[1:5]}, refresh=False)
        if save:
            with self.metrics.clock_stopped():
                if self.is_main:
                    self.checkpoints.save(self._state_dict(), permanent, self.args.keep_last)
            self.saved_at = time.monotonic()
        if stop:
            all_reduce_max([0], self.hosts)  # a barrier: a launcher that sees one process end ends the others
            how = f"The same command with --resume-step {self.step}" if self.args.resume_step else "The same command"
            self.print(f"stopped by signal {self.agreed_signal} after step {self.step}. {how} continues from there")
            self.end()
            raise SystemExit(EXIT_INTERRUPTED)

    def _sync_stop_and_save(self, last: int) -> tuple[bool, bool]:
        overdue = 0 < self.args.checkpointing_minutes * 60 <= time.monotonic() - self.saved_at
        # a signal that arrives from here on counts at the next step, so that all processes agree
        self.agreed_signal, overdue = all_reduce_max([self.signal, int(overdue)], self.hosts)
        return self.agreed_signal > 0 and self.step < last, bool(overdue)

    def _check_processes(self) -> None:
        """Raise a UserError unless the state is the same on every rank, to the bit."""
        if self.world > 1 and (name := differing_tensor(self.state.named_tensors(), self.device)) is not None:
            what = f"step {self.step}: processes differ in {name}"
            self._stop(what, "Look for faulty memory, or for machines with other software")

    def _check_state(self) -> None:
        """Raise a UserError unless the state is finite, and the same on every rank."""
        self._check_processes()
        if (name := tensor_not_finite(self.state.named_tensors(), self.device)) is not None:
            self._stop(f"step {self.step}: {name} is not finite")

    def _fetch_and_check(self) -> None:
        """Fetch the metrics of all steps since the last call; raise a UserError if training cannot recover."""
        if (reason := self.watch.reason_to_stop(self.metrics.fetch())) is not None:
            self._stop(reason)

    def _stop(self, reason: str, advice: str = "") -> None:
        if self.metrics.records:
            self.metrics.write(sync=False)
        good = latest_checkpoint(self.checkpoints.directory)
        if not advice:
            source = f" with --continue-train-exp-dir {self.directory}" if good else ""
            advice = f"Start another --exp-name{source}, in bf16 or at a lower learning rate"
        raise UserError(f"{reason}; training stopped. Last good checkpoint: {good or 'none'}. {advice}")

    def _on_signal(self, kind: int, frame: object) -> None:
        if self.signal and kind == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = kind
        if self.is_main:  # os.write: a signal may interrupt a print, which cannot be entered twice
            os.write(2, b"\nsaving as soon as this step is done; Ctrl-C again stops without\n")


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: what PyTorch allocated on a GPU, or the process's resident memory on CPUs."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def ignore_signals(_: int) -> None:
    """Let a data worker ignore signals, which job managers send to every process; the training process handles them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_workers() -> None:
    """Kill data workers that are left at exit, which ignore the SIGTERM of multiprocessing."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the data loader's handler raises an error for a killed worker
    for worker in multiprocessing.active_children():
        worker.kill()
