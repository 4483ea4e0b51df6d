"""One training run: its folder, processes, trackers and loop.

`for step, batch in run.steps(data):` owns reading, resuming, logging intervals, saving, signals and progress; what a
step does stays in the script, where it is read.
"""

import argparse
import atexit
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from downloads import is_offline
from errors import UserError
from files import locked, replace_text
from training.checkpoint import (
    BEST_CHECKPOINT,
    TrainingState,
    checkpoint_path,
    latest_checkpoint,
    read_checkpoint,
    write_atomically,
)
from training.distributed import gradient_sync, mean_over_processes
from training.randomness import BatchOrder, Rows

if TYPE_CHECKING:
    from training.evaluation import Evaluation

LOG_INTERVAL = 10  # steps between two looks of the host at the device's metrics
BAR = {"mininterval": 0.5 if sys.stderr.isatty() else 30.0, "dynamic_ncols": True}
EXIT_INTERRUPTED = 75
# the flags that a continued run may change; every other one would make it another run
FREE_FLAGS = {
    *("output_dir", "exp_name", "logging_dir", "data_dir", "report_to", "wandb_history_path"),
    *("max_train_steps", "epochs", "checkpointing_steps", "sampling_steps", "resume_step", "continue_train_exp_dir"),
    *("num_workers", "compile", "offline"),
    *("eval_steps", "eval_samples", "eval_features", "eval_reference", "inception_weights"),
    # files whose content is in the checkpoint, or is compared as part of the identity
    *("vae_ckpt", "disc_pretrained_ckpt", "loss_cfg_path", "vae_latents_name", "enc_ckpt"),
}
# what runs did before these flags were there
EARLIER_FLAGS = {"resample_tokens": False, "projector": "mlp", "spatial_norm": None}

# what a run's identity may name, and what it stands for
IDENTITY = {
    "data": "images than --data-dir holds",
    "latents": "latents than --vae-latents-name holds",
    "vae": "weights than --vae-ckpt holds",
    "loss": "weights in --loss-cfg-path",
    "encoders": "weights of the encoders",
}


class Batch(NamedTuple):
    """What one process trains on at one micro-batch."""

    pixels: Tensor  # (B,3,R,R) uint8
    labels: Tensor  # (B,) int64
    step: int  # 0-based optimiser step
    rows: Rows  # which rows of the global batch these are
    moments: Tensor | None = None  # (B,2C,h,w) float32, where latents are cached: mean, then std


class Run:
    """A training run in OUTPUT_DIR/EXP_NAME, on one process or many.

    Attributes:
        accelerator: accelerate's launch, device and process group.
        device: where this process computes.
        world: number of processes.
        micro_batch: images of one process's micro-batch.
        directory: the run's folder.
        step: optimiser steps begun, this one included.

    Raises:
        UserError: the batch cannot be divided over processes and micro-batches.
    """

    def __init__(self, args: argparse.Namespace):
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

        self.args = args
        self.directory = Path(args.output_dir) / args.exp_name
        self.checkpoints = self.directory / "checkpoints"
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else several processes would not find each other on CPUs
            mixed_precision="no",  # precision is training/precision.py's
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(
                project_dir=str(self.directory), logging_dir=str(self.directory / args.logging_dir)
            ),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.device = self.accelerator.device
        self.world = self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        share = self.world * args.gradient_accumulation_steps
        if args.batch_size % share:
            raise UserError(
                f"--batch-size {args.batch_size} (over all processes) is no multiple of {self.world} processes x "
                f"{args.gradient_accumulation_steps} accumulation steps"
            )
        self.print(
            f"batch: {args.batch_size} images a step = {self.world} processes x {args.gradient_accumulation_steps} "
            f"accumulation steps x {args.batch_size // share}, on {self.device.type}, precision {args.mixed_precision}"
        )
        self.micro_batch = args.batch_size // share
        self.step = 0
        self.step_complete = False
        self.state: TrainingState | None = None
        self.wrapped: list[nn.Module] = []
        self.pending: list[tuple[int, dict[str, Tensor]]] = []
        self.micro_metrics: list[dict[str, Tensor]] = []
        self.pictures: list[tuple[int, str, np.ndarray]] = []
        self.evaluations: dict[int, dict[str, float]] = {}
        self.signal: int | None = None
        self.identity: dict = {}
        self.resources = ExitStack()

    def print(self, text: str) -> None:
        """Print on the first process, above any progress bar."""
        if self.is_main:
            from tqdm import tqdm

            tqdm.write(text)

    def prepare(self, module: nn.Module) -> nn.Module:
        """`module` on this process's device and, with several processes, wrapped to average gradients over them."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of broadcast_buffers, whose successors behave otherwise
            module = self.accelerator.prepare_model(module)
        self.wrapped.append(module)
        return module

    def begin(self, state: TrainingState, identity: dict, check: Callable[[], None] = lambda: None) -> None:
        """Take charge of `state`: restore it from the run's checkpoint if there is one, and open log and trackers.

        `identity` is what beside the flags makes this run the run it is: a fingerprint of its data, its loss weights.
        `check` may refuse what was restored, before anything is written.

        Raises:
            UserError: another process has the run, or the checkpoint is missing, damaged, of other networks or made
                with other flags or data; or what `check` raises.
        """
        self.state, self.identity = state, identity
        if self.is_main:
            self.resources.enter_context(locked(self.directory))
        path = self._checkpoint_to_continue()
        if path is not None:
            checkpoint = read_checkpoint(path)
            refuse_changed_flags(checkpoint, vars(self.args), identity, path)
            self.step = state.restore(checkpoint, str(path))
            check()
            self.print(f"continuing after step {self.step} from {path}")
            self._put_later_checkpoints_aside()
        if self.is_main:
            replace_text(self.directory / "args.json", json.dumps(vars(self.args), indent=4) + "\n")
            truncate_log(self.directory / "metrics.jsonl", self.step)
        self._open_trackers()

    def _checkpoint_to_continue(self) -> Path | None:
        """The latest checkpoint of this run; the first time that --resume-step is given, the one it names."""
        step, elsewhere = self.args.resume_step, self.args.continue_train_exp_dir
        own = latest_checkpoint(self.checkpoints)
        if own is not None and not step:
            return own
        if own is not None and self._superseded.exists():
            self.print(f"this run went back to step {step} before; to do so again, rename {self._superseded}")
            return own
        folder = self.checkpoints if elsewhere is None else Path(elsewhere) / "checkpoints"
        if step:
            chosen = checkpoint_path(self.checkpoints, step)
            return chosen if chosen.is_file() else checkpoint_path(folder, step)
        if elsewhere is not None and latest_checkpoint(folder) is None:
            raise UserError(f"--continue-train-exp-dir {elsewhere}: no checkpoints in {folder}")
        return latest_checkpoint(folder)

    @property
    def _superseded(self) -> Path:
        return self.checkpoints / f"superseded-by-resume-at-{self.args.resume_step:07d}"

    def _put_later_checkpoints_aside(self) -> None:
        """After --resume-step, so that the same command goes on from here instead of coming back to that step."""
        self.accelerator.wait_for_everyone()  # all have chosen and read their checkpoint
        if self.is_main and self.args.resume_step and not self._superseded.exists():
            unfinished = self._superseded.with_suffix(".tmp")
            unfinished.mkdir(parents=True, exist_ok=True)
            for path in self.checkpoints.glob("*.pt"):
                if path.stem.isdigit() and int(path.stem) > self.step:
                    path.rename(unfinished / path.name)
            if self.best_note.is_file() and json.loads(self.best_note.read_text(encoding="utf8"))["step"] > self.step:
                for path in (self.best_note, self.checkpoints / BEST_CHECKPOINT):
                    path.rename(unfinished / path.name)
            if (log := self.directory / "metrics.jsonl").exists():
                shutil.copyfile(log, unfinished / log.name)
            unfinished.rename(self._superseded)

    def _open_trackers(self) -> None:
        if self.args.report_to == "none":
            return
        options = {}
        if self.args.report_to == "wandb" and self.is_main:
            identity = self.directory / "wandb-id.txt"
            if not identity.exists():
                identity.write_text(os.urandom(4).hex())
            options = {
                "name": self.args.exp_name,
                "id": identity.read_text(),
                "resume": "allow",
                "dir": str(self.directory),
                **({"mode": "offline"} if is_offline(self.args) else {}),
            }
        try:
            plain = {k: v for k, v in vars(self.args).items() if isinstance(v, (int, float, str, bool))}
            self.accelerator.init_trackers("repa-e", config=plain, init_kwargs={self.args.report_to: options})
        except Exception as error:  # no network, no login, no package: a tracker never stops a run
            self.accelerator.trackers = []
            reason = " ".join(str(error).split())[:200]
            self.print(
                f"warning: {self.args.report_to} is not available ({reason}); metrics.jsonl is written all the same"
            )

    def steps(self, data) -> Iterator[tuple[int, Batch]]:
        """Yield (1-based step, batch) to the end of training, once per micro-batch.

        `data` is a map-style dataset of (pixels, label) or (pixels, label, moments). After each step this logs, saves
        and obeys signals: SIGTERM or SIGINT saves a checkpoint at the next step boundary and exits with code 75.

        Raises:
            UserError: a loss that is not finite.
        """
        from tqdm import tqdm

        args = self.args
        last = min(args.max_train_steps, args.epochs * (len(data) // args.batch_size))
        order = BatchOrder(
            len(data),
            args.batch_size,
            args.seed,
            self.step,
            last,
            self.accelerator.process_index,
            self.world,
            args.gradient_accumulation_steps,
        )
        batches = iter(self._loader(data, order))
        atexit.register(end_workers)
        bar = tqdm(total=last, initial=self.step, desc=args.exp_name, unit="step", disable=not self.is_main, **BAR)
        previous = {kind: signal.signal(kind, self._on_signal) for kind in (signal.SIGTERM, signal.SIGINT)}
        self.clock = time.monotonic()
        try:
            for step in range(self.step, last):
                self.step = step + 1
                for micro in range(args.gradient_accumulation_steps):
                    loaded = (tensor.to(self.device, non_blocking=True) for tensor in next(batches))
                    pixels, labels, moments = (*loaded, None)[:3]
                    self.step_complete = micro == args.gradient_accumulation_steps - 1
                    with gradient_sync(self.wrapped, sync=self.step_complete):
                        yield self.step, Batch(pixels, labels, step, order.micro_batch_rows(micro), moments)
                self._finish_step(bar, last)
        finally:
            bar.close()
            for kind, handler in previous.items():
                signal.signal(kind, handler)

    def end(self) -> None:
        """Close trackers, process group and the lock on the run's folder."""
        self.accelerator.end_training()
        self.resources.close()

    def _loader(self, data, order: BatchOrder):
        from torch.utils.data import DataLoader

        return DataLoader(
            data,
            batch_sampler=order,
            num_workers=self.args.num_workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=ignore_signals,
        )

    def due(self, interval: int) -> bool:
        """Whether something done every `interval` steps is due at the end of this step."""
        return self.step_complete and self.step % interval == 0

    def log(self, metrics: dict[str, Tensor | None]) -> None:
        """Keep a micro-batch's metrics (scalars on the device, or None) without waiting for them."""
        self.micro_metrics.append(metrics)
        if self.step_complete:
            values = {name: [m[name] for m in self.micro_metrics if m[name] is not None] for name in metrics}
            self.pending.append((self.step, {name: torch.stack(v).mean() for name, v in values.items() if v}))
            self.micro_metrics = []

    def evaluate(self, evaluation: "Evaluation", *nets: nn.Module) -> None:
        """Log what an evaluation of `nets` at this step finds, and keep the state as best.pt if it is the best yet.

        best.json says what was measured, the best one's step and its values; another measure starts afresh.
        """
        started = time.monotonic()
        values = evaluation(*nets)
        self.clock += time.monotonic() - started  # it is no training time
        if not self.is_main:
            return
        self.evaluations[self.step] = values
        self.print(f"step {self.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        best = json.loads(self.best_note.read_text(encoding="utf8")) if self.best_note.is_file() else {}
        if best.get("measure") != evaluation.measure or values[evaluation.judge] < best["values"][evaluation.judge]:
            write_atomically(self._state_dict(), self.checkpoints / BEST_CHECKPOINT)
            note = {"measure": evaluation.measure, "step": self.step, "values": values}
            replace_text(self.best_note, json.dumps(note, indent=1) + "\n")

    @property
    def best_note(self) -> Path:
        """What is known of the best checkpoint."""
        return self.checkpoints / "best.json"

    def _state_dict(self) -> dict:
        return self.state.to_dict(vars(self.args), self.step, self.identity)

    def _finish_step(self, bar, last: int) -> None:
        bar.update()
        stop = self._agree_to_stop(last)
        save = stop or self.step == last or self.due(self.args.checkpointing_steps)
        if save or self.due(LOG_INTERVAL):
            latest = self._write_log()
            bar.set_postfix({name: f"{latest[name]:.3g}" for name in list(latest)[:4]}, refresh=False)
        if save and self.is_main:
            write_atomically(self._state_dict(), checkpoint_path(self.checkpoints, self.step))
        if stop:
            self.accelerator.wait_for_everyone()  # a launcher that sees one process end ends the others
            self.print(f"stopped by signal {self.signal} after step {self.step}; the same command continues from there")
            self.end()
            raise SystemExit(EXIT_INTERRUPTED)

    def _on_signal(self, kind: int, frame: object) -> None:
        if self.signal is not None and kind == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = kind
        if self.is_main:  # a signal may come in the middle of a print, which must not be entered twice
            os.write(2, b"\nsaving as soon as this step is done; Ctrl-C again stops without\n")

    def _agree_to_stop(self, last: int) -> bool:
        if self.world == 1:
            return self.signal is not None and self.step < last
        if self.step == last or not self.due(LOG_INTERVAL):
            return False
        flag = torch.tensor([self.signal or 0], device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self.signal = int(flag) or None
        return self.signal is not None

    def _write_log(self) -> dict[str, float]:
        """One reduction over processes for all pending steps; returns the last step's metrics."""
        names = list(self.pending[0][1])
        values = torch.stack([torch.stack([metrics[name].float() for name in names]) for _, metrics in self.pending])
        rows = mean_over_processes(values).tolist()
        elapsed, self.clock = time.monotonic() - self.clock, time.monotonic()
        speed = len(rows) * self.args.batch_size / elapsed
        records = [
            {
                "step": step,
                **dict(zip(names, row, strict=True)),
                **self.evaluations.pop(step, {}),
                "images_per_second": speed,
            }
            for (step, _), row in zip(self.pending, rows, strict=True)
        ]
        self.pending = []
        if self.is_main:
            with open(self.directory / "metrics.jsonl", "a", encoding="utf8") as file:
                file.writelines(json.dumps(finite_or_null(record)) + "\n" for record in records)
        for record in records:
            self.accelerator.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])
            for name, picture in [(name, picture) for step, name, picture in self.pictures if step == record["step"]]:
                self._track_picture(name, picture, record["step"])
        self.pictures = []
        self._check(records)
        return {name: records[-1][name] for name in names}

    def _check(self, records: list[dict[str, float]]) -> None:
        """Stop at a value that is not finite, at vanished gradients, and at a loss scale that fell to nothing.

        With loss scaling, gradients may overflow now and then: such a step is skipped and the scale halved.
        """
        scaled = self.args.mixed_precision == "fp16"
        for record in records:
            for name, value in record.items():
                bad = not math.isfinite(value) and not (scaled and name.startswith("grad_norm"))
                if bad or (name.startswith("loss_scale") and value < 1):
                    self._stop(f"step {record['step']}: {name} is {value}")
        for name in ("grad_norm_vae", "grad_norm_sit"):
            if all(record.get(name) == 0 for record in records):
                self._stop(f"step {records[-1]['step']}: {name} has been 0 for {len(records)} steps")

    def _stop(self, reason: str) -> None:
        good = latest_checkpoint(self.checkpoints) or "none"
        advice = "Try bf16 or a lower learning rate"
        raise UserError(f"{reason}; training stopped. Last good checkpoint: {good}. {advice}")

    def save_image(self, name: str, grid: Tensor) -> None:
        """Write a picture (3,H,W) uint8 to the run's folder NAME, named by the step; trackers get it with the log."""
        from PIL import Image

        folder = self.directory / name
        folder.mkdir(parents=True, exist_ok=True)
        array = grid.permute(1, 2, 0).cpu().numpy()
        Image.fromarray(array).save(folder / f"{self.step:07d}.png")
        self.pictures.append((self.step, name, array))

    def _track_picture(self, name: str, picture: np.ndarray, step: int) -> None:
        for tracker in self.accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: picture[None]}, step=step, **options)


def refuse_changed_flags(checkpoint: dict, flags: dict, identity: dict, path: Path) -> None:
    """Raise a UserError if the checkpoint's run had other flags than `flags`, but for those that may change.

    The same for `identity`, where the checkpoint has one.
    """
    before = checkpoint.get("args") or {}
    before = {**EARLIER_FLAGS, **(vars(before) if isinstance(before, argparse.Namespace) else before)}
    changed = [name for name in flags if name in before and name not in FREE_FLAGS and before[name] != flags[name]]
    if changed:
        what = ", ".join(f"--{name.replace('_', '-')} {before[name]} -> {flags[name]}" for name in changed)
        raise UserError(f"{path} was made with other flags ({what}); use the same ones, or another --exp-name")
    known = checkpoint.get("identity") or {}
    for name, what in IDENTITY.items():
        # a run of another kind, which this one may start from, has other names
        if name in known and name in identity and known[name] != identity[name]:
            raise UserError(f"{path} was made with other {what}; use the same, or another --exp-name")


def truncate_log(path: Path, step: int) -> None:
    """Drop the records of metrics.jsonl after `step`: they will be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:  # the line that a crash cut short
            break
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf8")
    os.replace(temporary, path)


def finite_or_null(record: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN and no infinity."""
    return {name: value if math.isfinite(value) else None for name, value in record.items()}


def ignore_signals(_: int) -> None:
    """A data worker leaves signals, which job managers send to every process, to the training process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_workers() -> None:
    """Kill data workers that are left at exit: they ignore the SIGTERM by which multiprocessing would end them."""
    import multiprocessing

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the data loader's handler raises an error for a worker killed
    for worker in multiprocessing.active_children():
        worker.kill()
