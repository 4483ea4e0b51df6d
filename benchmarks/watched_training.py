"""Run train_repae.py under observation and kill it: the process that `benchmarks.gpu_check` starts.

    python -m benchmarks.watched_training FACTS.json WARM_UP LAST [flags of train_repae.py]

The first WARM_UP steps may compile. After them it counts recompiled graphs and graph breaks, and records where the host
waits for the device, except at steps that write the log. After step LAST it writes FACTS.json and kills itself by
SIGKILL, so that no signal handler and no exit hook runs.
"""

import json
import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import train_repae
import training.build
from errors import run_script
from training.log import LOG_INTERVAL

OWN = Path(__file__).parents[1]
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


class Watched:
    """A training script's step function that records what happens in it and between two calls.

    Attributes:
        strict: whether the host must not wait for the device now.
        waits: the lines of code where it did.
    """

    def __init__(self, step: Callable, facts: Path, warm_up: int, last: int):
        self.step, self.facts, self.warm_up, self.last = step, facts, warm_up, last
        self.strict, self.waits = False, []
        self.steps = self.compiled = self.first_step = 0

    def __call__(self, nets, batch, draws, cfg) -> dict[str, Tensor | None]:
        number = batch.step + 1
        if number > self.last:
            self.end(batch.pixels.device)
        if self.steps == self.warm_up:
            self.begin(batch.pixels.device)
        warm = self.steps >= self.warm_up
        self.steps += 1
        self.first_step = self.first_step or number
        self.strict = warm
        metrics = self.step(nets, batch, draws, cfg)
        self.strict = warm and number % LOG_INTERVAL > 0
        return metrics

    def begin(self, device: torch.device) -> None:
        """Count from now on."""
        self.compiled = counters["stats"]["unique_graphs"]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *_: "synchronizing" in str(message) and self.wait()
            torch.cuda.set_sync_debug_mode("warn")
            return
        for name in READS:  # a CPU has no device to wait for: watch for reads of values instead
            setattr(torch.Tensor, name, self.reading(getattr(torch.Tensor, name)))

    def reading(self, method: Callable) -> Callable:
        def read(tensor, *args, **kwargs):
            if tensor.is_floating_point():  # integers are the order of the data, which is on the host everywhere
                self.wait()
            return method(tensor, *args, **kwargs)

        return read

    def wait(self) -> None:
        """Record the project's line that waits, if it must not."""
        if self.strict:
            frames = [frame for frame in traceback.extract_stack() if is_ours(frame.filename)]
            self.waits.append(f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "outside of the project")

    def end(self, device: torch.device) -> None:
        """Write the facts and kill this process."""
        on_gpu = device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(device) if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        facts = {
            "first_step": self.first_step,
            "graphs": counters["stats"]["unique_graphs"],
            "recompiled": counters["stats"]["unique_graphs"] - self.compiled,
            "graph_breaks": sum(counters["graph_break"].values()),
            "waits": sorted(set(self.waits)),
            "memory": peak if on_gpu else peak * 1024,  # ru_maxrss is in KiB
        }
        self.facts.write_text(json.dumps(facts))
        os.kill(os.getpid(), signal.SIGKILL)


def is_ours(file: str) -> bool:
    return Path(file).is_relative_to(OWN) and "site-packages" not in file and file != __file__


def compile_eagerly(modules, wanted: bool, device: torch.device) -> None:
    """Replaces `compile_in_place`, which compiles for GPUs only; it generates no code, which would take minutes."""
    for module in modules:
        module.compile(backend="aot_eager")


def main() -> None:
    facts, warm_up, last, *flags = sys.argv[1:]
    sys.argv = ["train_repae.py", *flags]
    if not torch.cuda.is_available():
        training.build.compile_in_place = compile_eagerly
    train_repae.repae_step = Watched(train_repae.repae_step, Path(facts), int(warm_up), int(last))
    train_repae.main()


if __name__ == "__main__":
    run_script(main)
