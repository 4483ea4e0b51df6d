"""What training logs: metrics.jsonl, a tracker (wandb, tensorboard) beside it, and the watch for numbers that go wrong.

The values come from the dict that a script's training step returns, and from `TrainingState.metrics`; pictures and
distances from training/evaluation.py. metrics.jsonl holds one JSON record per step, written every `LOG_INTERVAL` steps
by training/loop.py; when a run continues, the records after its checkpoint are dropped.
"""

import argparse
import json
import math
import os
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from errors import one_line
from models.numerics import mean_over_batches
from storage.files import replace_text, written_whole
from weights.downloads import is_offline

LOG_INTERVAL = 10  # steps between two times at which the host fetches the metrics from the device
WANDB_INIT_TIMEOUT = 15.0  # seconds; wandb's own 90 would keep all GPUs waiting where there is no network
WANDB_FINISH_TIMEOUT = 60.0  # seconds; without one, the end of a run waits for the server indefinitely


class MetricsLog:
    """The scalars of every step and the pictures of some, each logged once however often the run is interrupted."""

    def __init__(self, accelerator, args: argparse.Namespace, directory: Path, log: Callable[[str], None]):
        self.accelerator, self.args, self.directory, self.log = accelerator, args, directory, log
        self.file = directory / "metrics.jsonl"
        self.micro_metrics: list[dict[str, Tensor | None]] = []
        self.pending: list[tuple[int, dict[str, Tensor]]] = []
        self.records: list[dict[str, float]] = []
        self.pictures: list[tuple[int, str, np.ndarray]] = []
        self.evaluations: dict[int, dict[str, float]] = {}  # by step; `write` logs them with the metrics
        self.clock = time.monotonic()  # start of the interval that images_per_second is measured over

    def open(self, step: int) -> None:
        """Drop the records after `step`, which will be logged again, and start the tracker; on rank 0 only."""
        if not self.accelerator.is_main_process:
            return
        if self.file.exists():
            if step == 0:
                self.log(f"warning: no checkpoint to continue from; the records of {self.file} are dropped")
            truncate_log(self.file, step)
        if self.args.report_to == "none":
            return
        try:
            if not self.accelerator.log_with:
                raise ModuleNotFoundError("the package is not installed")
            if self.args.report_to == "wandb":
                self._start_wandb()
            else:
                self._start_tracker({"purge_step": step + 1})
        except Exception as error:
            self._without_tracker(error)

    def _start_tracker(self, options: dict) -> None:
        config = vars(self.args)
        if self.args.report_to == "tensorboard":  # which takes neither lists nor None
            config = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in config.items()}
        self.accelerator.init_trackers("repa-e", config=config, init_kwargs={self.args.report_to: options})

    def _start_wandb(self) -> None:
        """Start wandb with the run id of wandb-id.txt; offline if there is no API key or no network."""
        import wandb

        identity = self.directory / "wandb-id.txt"
        if not identity.is_file():
            replace_text(identity, os.urandom(4).hex())
        options = {
            "name": self.args.exp_name,
            "id": identity.read_text(encoding="utf8"),
            "resume": "allow",
            "dir": str(self.directory),
            "settings": wandb.Settings(init_timeout=WANDB_INIT_TIMEOUT, finish_timeout=WANDB_FINISH_TIMEOUT),
        }
        mode = "offline" if is_offline(self.args) else wandb.setup().settings.mode
        try:
            if mode == "online" and not wandb.login(prompt=False, verify=False):
                raise PermissionError("no API key; `wandb login` stores one")
            self._start_tracker({**options, "mode": mode})
        except Exception as error:
            files = shlex.quote(str(self.directory / "wandb")) + "/offline-run-*"
            self.log(
                f"warning: wandb cannot be used online ({one_line(error)}); it keeps its files here, which "
                f"`wandb sync {files}` uploads"
            )
            self.accelerator.trackers = []
            wandb.teardown(exit_code=1)  # else the run id counts as in use
            self._start_tracker({**options, "mode": "offline"})

    def _without_tracker(self, error: Exception) -> None:
        self.accelerator.trackers = []
        reason, tracker = one_line(error), self.args.report_to
        self.log(f"warning: {tracker} is not available ({reason}); metrics.jsonl is written all the same")

    def close(self) -> None:
        """Finish the tracker; what it has not uploaded by then stays in its files."""
        try:
            for tracker in self.accelerator.trackers:
                tracker.finish()
        except Exception as error:
            self._without_tracker(error)
        self.accelerator.trackers = []

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.clock += time.monotonic() - started

    def add(self, step: int, metrics: dict[str, Tensor | None], step_complete: bool) -> None:
        """Keep a micro-batch's metrics (scalars on the device, or None) without waiting for the device."""
        self.micro_metrics.append(metrics)
        if step_complete:
            values = {name: [m[name] for m in self.micro_metrics if m[name] is not None] for name in metrics}
            self.pending.append((step, {name: torch.stack(v).mean() for name, v in values.items() if v}))
            self.micro_metrics = []

    def add_picture(self, step: int, name: str, picture: Tensor) -> None:
        """Write a picture (3,H,W) uint8 to the folder `name`; the tracker gets it with the next `write`."""
        from PIL import Image

        folder = self.directory / name
        folder.mkdir(parents=True, exist_ok=True)
        array = picture.permute(1, 2, 0).cpu().numpy()
        with written_whole(folder / f"{step:07d}.png") as file:
            Image.fromarray(array).save(file, "png")
        self.pictures.append((step, name, array))

    def fetch(self) -> list[dict[str, float]]:
        """The metrics of all steps added since the last call, averaged over ranks; the host waits for the device."""
        if not self.pending:
            return []
        names = list(self.pending[0][1])
        values = torch.stack([torch.stack([metrics[name].float() for name in names]) for _, metrics in self.pending])
        rows = mean_over_batches(values).tolist()
        elapsed, self.clock = time.monotonic() - self.clock, time.monotonic()
        speed = {"images_per_second": len(rows) * self.args.batch_size / elapsed}
        records = [
            {"step": step, **dict(zip(names, row, strict=True)), **speed}
            for (step, _), row in zip(self.pending, rows, strict=True)
        ]
        self.pending = []
        self.records += records
        return records

    def write(self, sync: bool) -> dict[str, float]:
        """Append the fetched records to the file, with fsync if `sync`, and to the tracker; returns the last one."""
        for record in self.records:
            record.update(self.evaluations.pop(record["step"], {}))
        if self.accelerator.is_main_process:
            with open(self.file, "a", encoding="utf8") as file:
                file.writelines(json_line(record) for record in self.records)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        try:
            self._track()
        except Exception as error:
            self._without_tracker(error)
        last, self.records, self.pictures = self.records[-1], [], []
        return last

    def _track(self) -> None:
        for record in self.records:
            step = record["step"]
            self.accelerator.log({k: v for k, v in record.items() if k != "step"}, step=step)
            pictures = {name: picture[None] for at, name, picture in self.pictures if at == step}
            for tracker in self.accelerator.trackers if pictures else ():
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(pictures, step=step, **options)


def truncate_log(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after the last whole record of a step up to `step`; earlier lines stay."""
    lines = path.read_bytes().splitlines(keepends=True)
    while lines and not is_record(lines[-1], step):
        lines.pop()
    os.truncate(path, sum(map(len, lines)))


def is_record(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, TypeError, KeyError):
        return False


def json_line(record: dict[str, float]) -> str:
    """A line of the log, with null for NaN and infinity, which JSON does not have."""
    return json.dumps({name: value if math.isfinite(value) else None for name, value in record.items()}) + "\n"


# consecutive steps after which a gradient that is exactly 0 counts as vanished; the discriminator may win for a while,
# with a hinge loss of 0
VANISHED = {"grad_norm_vae": 10, "grad_norm_sit": 10, "grad_norm_disc": 1000}
SKIPPED = 20  # consecutive steps that float16 skips; from the initial loss scale, 17 take it below the lowest
INITIAL_LOSS_SCALE, LOWEST_LOSS_SCALE = 65536.0, 1.0


class Watch:
    """Finds the first step after which training cannot recover."""

    def __init__(self, scaled: bool):
        self.scaled = scaled  # losses, for float16: single gradients then overflow, and their steps are skipped
        self.gan_start = math.inf  # 1-based step from which the discriminator learns
        self.zero, self.skipped = Counter(), Counter()

    def reason_to_stop(self, records: list[dict[str, float]]) -> str | None:
        """What is wrong with the metrics of the next consecutive steps, naming step and term; None if nothing is."""
        for record in records:
            for name, value in record.items():
                if (wrong := self._wrong(record, name, value)) is not None:
                    return f"step {record['step']}: {name} {wrong}"
        return None

    def _wrong(self, record: dict[str, float], name: str, value: float) -> str | None:
        if name.startswith("loss_scale") and value < LOWEST_LOSS_SCALE:
            return f"is {value:g}, so low that float16 cannot hold the gradients"
        is_gradient = name.startswith("grad_norm")
        if not math.isfinite(value) and not (self.scaled and is_gradient):
            return f"is {value}"
        if is_gradient:
            falling = record.get(name.replace("grad_norm", "loss_scale"), 0) > INITIAL_LOSS_SCALE  # and may recover
            self.skipped[name] = 0 if math.isfinite(value) or falling else self.skipped[name] + 1
            if self.skipped[name] >= SKIPPED:
                return f"has not been finite for {SKIPPED} steps, which were all skipped"
        is_disc = name == "grad_norm_disc"
        if name in VANISHED and (record["step"] >= self.gan_start or not is_disc):
            self.zero[name] = self.zero[name] + 1 if value == 0 else 0
            if self.zero[name] >= VANISHED[name]:
                return f"has been 0 for {VANISHED[name]} steps" + (": the GAN has collapsed" if is_disc else "")
        return None


@torch.no_grad()
def normaliser_drift(bn: nn.BatchNorm2d, start: Tensor) -> dict[str, Tensor]:
    """How far a normaliser's running statistics are from the means and variances (2,C) that it started with.

    bn_mean_drift is the mean over channels of |mean - start|/(standard deviation at the start); bn_std_drift that of
    |log(standard deviation/the one at the start)|.
    """
    mean, var = start
    return {
        "bn_mean_drift": ((bn.running_mean - mean).abs() * torch.rsqrt(var)).mean(),
        "bn_std_drift": (0.5 * torch.log(bn.running_var / var)).abs().mean(),
    }
