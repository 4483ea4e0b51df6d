"""Check training on this machine: golden values, speed, and resuming after SIGKILL.

    python -m benchmarks.gpu_check                          # one GPU
    python -m benchmarks.gpu_check --device cpu --tiny      # the same checks on tiny networks

First the golden tests run on the device. Then train_repae.py runs with SiT-XL/2 on f8d4 and SiT-XL/1 on f16d32, each in
bfloat16 and float16. Losses must fall. After the warm-up nothing may be recompiled, no graph may break, and the host
may not wait for the device between two logs. Killed and started again, the run must resume from its checkpoint with the
same losses. `make gpu-check` runs the first line. Data and weights are random (benchmarks/workspace.py).
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.flops import stage_flops
from benchmarks.measure import matrix_peak
from benchmarks.workspace import GPU, TINY, Setting, make_workspace, training_flags
from errors import Parser, UserError, run_script
from storage.files import replace_text

ROOT = Path(__file__).parents[1]
FALLING = ("vae_loss", "denoising_loss", "proj_loss")  # not d_loss: the discriminator has an adversary
# steps; only CHECKPOINT is saved, so that the second start repeats the steps after it
WARM_UP, CHECKPOINT, LAST = 3, 20, 30
RUN_TIMEOUT = 600  # seconds
COMPARED = 5  # first and last steps whose mean losses are compared
TOLERANCE = {"cpu": 0.0, "cuda": 0.05}  # relative, of losses after a restart; on GPUs the order of sums varies
GOLDEN_TESTS = ("tests/test_golden.py", "tests/test_joint_step.py", "-k", "golden")


def cases(tiny: bool) -> dict[str, Setting]:
    """The settings to check, by name."""
    if tiny:
        return {"tiny": TINY}
    full = replace(GPU, photos=64)
    other = replace(full, vae="f16d32", model="SiT-XL/1")
    return {
        f"{setting.model} {setting.vae} {precision}": replace(setting, precision=precision)
        for setting in (full, other)
        for precision in ("bf16", "fp16")
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"), help="(default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and images")
    parser.add_argument("--json", type=Path, help="also write everything there")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU; --device cpu --tiny does the same checks without one")
    if args.device == "cpu" and not args.tiny:
        raise UserError("--device cpu would take days; add --tiny")
    return args


def golden_parity(device: str) -> tuple[bool, str]:
    """Whether the tests of golden values pass on the device, and pytest's last line."""
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *GOLDEN_TESTS, f"--device={device}"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    return done.returncode == 0, (done.stdout or done.stderr).strip().rpartition("\n")[2]


def train(folder: Path, name: str, setting: Setting, device: str) -> tuple[dict, list[dict]]:
    """Train until the process kills itself after step LAST; return its facts and the records of its log."""
    facts = folder / "facts.json"
    facts.unlink(missing_ok=True)
    flags = [*training_flags(folder, setting, name), f"--max-train-steps={LAST + 1}", "--num-workers=2"]
    flags += [f"--checkpointing-steps={CHECKPOINT}", f"--sampling-steps={LAST * 2}"]
    flags += [f"--{network}learning-rate={setting.learning_rate}" for network in ("", "vae-", "disc-")]
    line = [sys.executable, "-m", "benchmarks.watched_training", str(facts), str(WARM_UP), str(LAST), *flags]
    environment = {**os.environ, **({} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})}
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=RUN_TIMEOUT)
    if done.returncode != -signal.SIGKILL or not facts.is_file():
        raise UserError(f"{name}: training ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    log = (folder / "exps" / name / "metrics.jsonl").read_text().splitlines()
    return json.loads(facts.read_text()), [json.loads(line) for line in log]


def check(folder: Path, name: str, setting: Setting, device: str) -> dict:
    """The results of a case; "failed" lists the checks that failed."""
    name = name.replace("/", "-").replace(" ", "-")
    first, before = train(folder, name, setting, device)
    again, after = train(folder, name, setting, device)
    failed = [
        f"{term} does not fall" for term in FALLING if mean(before[-COMPARED:], term) >= mean(before[:COMPARED], term)
    ]
    for facts in (first, again):
        failed += [f"{facts['recompiled']} graphs recompiled"] * (facts["recompiled"] > 0)
        failed += [f"{facts['graph_breaks']} graph breaks"] * (facts["graph_breaks"] > 0)
        failed += [f"the host waits at {place}" for place in facts["waits"]]
    if again["first_step"] != CHECKPOINT + 1:
        failed.append(f"the second start began at step {again['first_step']}, expected {CHECKPOINT + 1}")
    difference = restart_difference(before, after)
    failed += [f"losses differ by {difference:.1e} after the restart"] * (difference > TOLERANCE[device])
    flops = stage_flops(setting.vae, setting.model, setting.encoder, setting.resolution, setting.encoder_depth)
    return {
        "losses": {term: [mean(before[:COMPARED], term), mean(before[-COMPARED:], term)] for term in FALLING},
        "restart_difference": difference,
        "images_per_second": before[-1]["images_per_second"],
        "flops_per_second": flops["joint step"] * before[-1]["images_per_second"],
        **first,
        "failed": failed,
    }


def mean(records: list[dict], term: str) -> float:
    return sum(record[term] for record in records) / len(records)


def restart_difference(before: list[dict], after: list[dict]) -> float:
    """The largest relative difference between the losses of all steps before and after the restart."""
    if [record["step"] for record in after] != list(range(1, LAST + 1)):
        return float("inf")
    pairs = [(a[term], b[term]) for a, b in zip(before, after, strict=True) for term in FALLING]
    return max(abs(a - b) / max(abs(a), 1e-6) for a, b in pairs)


def report_case(folder: Path, name: str, setting: Setting, device: str) -> dict:
    """Check a case in `folder`, print a line of results, and remove its checkpoints."""
    started = time.monotonic()
    make_workspace(folder, setting, workers=2)
    found = check(folder, name, setting, device)
    found["mfu"] = found["flops_per_second"] / matrix_peak(torch.device(device), setting.precision)
    found["seconds"] = time.monotonic() - started
    if device == "cuda":
        torch.cuda.empty_cache()  # the next run is another process
    shutil.rmtree(folder / "exps")
    speed = f"{found['images_per_second']:.1f} images/s, MFU {found['mfu']:.1%}, {found['memory'] / 1e9:.1f} GB"
    result = "; ".join(found["failed"]) or "all checks passed"
    print(f"{name}: {speed}; {result} ({found['seconds']:.0f} s)", flush=True)
    return found


def main() -> None:
    """Check all cases; exit code 1 if a check fails."""
    args = parse_args()
    parity, summary = golden_parity(args.device)
    print(f"golden values on {args.device}: {summary}", flush=True)
    report = {"golden": {"passed": parity, "summary": summary}, "cases": {}}
    with tempfile.TemporaryDirectory(prefix="repae-gpu-check-") as folder:
        for name, setting in cases(args.tiny).items():
            (place := Path(folder) / setting.vae).mkdir(exist_ok=True)
            report["cases"][name] = report_case(place, name, setting, args.device)
    if args.json:
        replace_text(args.json, json.dumps(report, indent=1) + "\n")
    if not parity or any(found["failed"] for found in report["cases"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main)
