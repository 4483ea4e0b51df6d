"""The cost of every stage on this machine: time, memory, FLOPs, and their share of the fastest matrix product.

    python -m benchmarks                                    # on two CPU cores: five minutes
    python -m benchmarks --device cuda --json gpu.json      # one GPU

Data and weights are random (benchmarks/workspace.py). `make bench` runs the first line.
"""

import argparse
import json
import platform
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.measure import Measurement, matrix_peak, measure, profile
from benchmarks.stages import (
    Stage,
    build_networks,
    data_stages,
    inference_stages,
    step_stages,
    transformer_stages,
    vae_stages,
)
from benchmarks.workspace import CPU, GPU, TINY, Setting, make_workspace
from errors import Parser, UserError, run_script
from flags.types import COUNT, WEIGHT
from models.numerics import AUTOCAST_DTYPES, use_tf32
from storage.files import replace_text

COLUMNS = (
    *("stage", "median s", "fastest", "slowest", "runs", "images/s", "peak GB"),
    *("GFLOP/image", "TFLOP/s", "of peak"),
)
PROFILED = "joint step"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and images, to test the benchmarks")
    parser.add_argument("--only", help="prefixes of stage names, like VAE,sampling (default: all)")
    parser.add_argument(
        "--mixed-precision", choices=tuple(AUTOCAST_DTYPES), help="(default: no on the CPU, bf16 on a GPU)"
    )
    parser.add_argument(
        "--cudnn-benchmark", action="store_true", help="let cuDNN try its convolutions, which training does not"
    )
    parser.add_argument("--seconds", type=WEIGHT, default=6.0, help="a stage, at least three runs (default: 6)")
    parser.add_argument("--num-workers", type=COUNT, default=2, help="for reading and preprocessing (default: 2)")
    parser.add_argument("--json", type=Path, help="also write everything there")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU; use --device cpu")
    return args


def machine(device: torch.device, setting: Setting, peak: float) -> dict:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "matrix_peak_flops": peak,
        **asdict(setting),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def row(name: str, found: Measurement, peak: float) -> tuple[str, ...]:
    """A stage's row of the table; the last three cells are empty if it has no matrix products."""
    rate = found.flops / found.median
    counted = (f"{found.flops / found.images / 1e9:.1f}", f"{rate / 1e12:.3f}", f"{rate / peak:.0%}")
    times = (f"{value:.4f}" for value in (found.median, found.fastest, found.slowest))
    speed = (str(found.runs), f"{found.images / found.median:.2f}", f"{found.memory / 1e9:.2f}")
    return (name, *times, *speed, *(counted if found.flops else ("", "", "")))


def markdown(rows: list[tuple[str, ...]]) -> str:
    """The table with its header, columns padded to equal width."""
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    lines = [COLUMNS, ["-" * width for width in widths], *rows]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def all_stages(folder: Path, setting: Setting, workers: int) -> dict[str, Stage]:
    """All stages in the order of the method."""
    networks = build_networks(folder, setting)
    return {
        **data_stages(folder, setting, workers),
        **vae_stages(networks, setting.batch),
        **transformer_stages(networks, setting.batch),
        **step_stages(networks, setting.batch),
        **inference_stages(networks, setting, folder),
    }


def main() -> None:
    """Make a workspace, measure the stages and print the table."""
    args = parse_args()
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    setting = TINY if args.tiny else GPU if args.device == "cuda" else CPU
    if args.mixed_precision is not None:
        setting = replace(setting, precision=args.mixed_precision)
    use_tf32(True)
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    peak = matrix_peak(device, setting.precision)
    report = {"machine": machine(device, setting, peak), "stages": {}}
    print(json.dumps(report["machine"], indent=1))
    with tempfile.TemporaryDirectory(prefix="repae-benchmarks-") as folder:
        make_workspace(Path(folder), setting, args.num_workers)
        stages = all_stages(Path(folder), setting, args.num_workers)
        wanted = [name for name in stages if args.only is None or name.startswith(tuple(args.only.split(",")))]
        if not wanted:
            raise UserError(f"--only {args.only}: no such stage; there are {', '.join(stages)}")
        for name in wanted:
            found = measure(*stages[name], device, args.seconds)
            report["stages"][name] = asdict(found)
            print(f"{name}: {found.median:.4f} s, {found.images / found.median:.2f} images/s", flush=True)
        if PROFILED in wanted:
            report["profile"] = profile(stages[PROFILED].work, device)
    print(markdown([row(name, Measurement(**found), peak) for name, found in report["stages"].items()]))
    for entry in report.get("profile", []):
        print(f"{entry['share']:6.1%}  {entry['calls']:5d} x  {entry['operation']}")
    if args.json:
        replace_text(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
