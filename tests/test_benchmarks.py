"""The benchmarks and the check for GPUs, at tiny sizes: that they run, and that they notice what they are for."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu_check import CHECKPOINT, FALLING, LAST, cases, check, restart_difference
from benchmarks.measure import counted_flops, measure, profile
from benchmarks.watched_training import READS, Watched
from benchmarks.workspace import make_workspace
from scripts import run_process

CPU = torch.device("cpu")


def test_measuring_counts_calls_time_and_products():
    a = torch.randn(64, 32)
    calls = []

    def work() -> None:
        calls.append(a @ a.T)

    found = measure(work, images=4, device=CPU, seconds=0)
    assert (found.flops, found.images, found.runs) == (2 * 64 * 32 * 64, 4, 3)
    assert len(calls) == 6  # to warm up, to count, for memory, and three
    assert 0 < found.fastest <= found.median <= found.slowest
    assert found.memory > 10**7
    assert profile(work, CPU)[0]["operation"] == "aten::mm"


def test_compiled_networks_are_counted_too():
    layer = torch.nn.Linear(8, 16, bias=False)
    layer.compile(backend="eager")
    x = torch.randn(2, 8)
    layer(x)
    assert counted_flops(lambda: layer(x)) == 2 * 2 * 8 * 16


def watched_steps(step, tmp_path, monkeypatch, warm_up: int = 1, last: int = 5) -> dict:
    """The facts about so many steps of a made-up training."""
    killed = []
    monkeypatch.setattr(os, "kill", lambda pid, kind: killed.append(kind))
    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, getattr(torch.Tensor, name))  # put back afterwards
        watched = Watched(step, tmp_path / "facts.json", warm_up, last)
        for number in range(last + 1):
            watched(None, SimpleNamespace(step=number, pixels=torch.zeros(1)), None, None)
    assert len(killed) == 1
    return json.loads((tmp_path / "facts.json").read_text())


def test_the_watch_notices_a_host_that_waits_but_not_at_the_log_or_before_it_is_warm(tmp_path, monkeypatch):
    def good(*_) -> dict:
        return {"loss": torch.ones(2).sum()}

    def waits(*_) -> dict:
        return {"loss": torch.ones(2).sum().item()}

    assert watched_steps(good, tmp_path, monkeypatch)["waits"] == []
    (place,) = watched_steps(waits, tmp_path, monkeypatch)["waits"]
    assert place.startswith(__file__)
    assert watched_steps(waits, tmp_path, monkeypatch, warm_up=6)["waits"] == []


def test_the_watch_notices_what_is_compiled_anew_and_graphs_that_break(tmp_path, monkeypatch):
    torch._dynamo.reset()
    layer = torch.nn.Linear(4, 4)
    layer.compile(backend="eager")
    sizes = iter([2, 2, 3, 5, 5, 5])
    facts = watched_steps(lambda *_: {"loss": layer(torch.ones(next(sizes), 4)).sum()}, tmp_path, monkeypatch)
    assert facts["recompiled"] > 0
    assert facts["graph_breaks"] == 0


def test_restart_difference_is_relative_and_sees_missing_steps():
    log = [{"step": i + 1, "vae_loss": 2.0, "denoising_loss": 1.0, "proj_loss": -0.5} for i in range(LAST)]
    other = [dict(record) for record in log]
    other[CHECKPOINT + 2]["proj_loss"] = -0.55
    assert restart_difference(log, log) == 0
    assert restart_difference(log, other) == pytest.approx(0.1)
    assert restart_difference(log, log[:-1]) == float("inf")


def test_every_failure_is_named(tmp_path, monkeypatch):
    """Of made-up runs: one that is as it should be, and what is said of each that is not."""

    def found(first=None, again=None, losses=None, restarted=None) -> list[str]:
        good = {"first_step": 1, "recompiled": 0, "graph_breaks": 0, "waits": [], "memory": 1, "graphs": 8}
        log = [{"step": i + 1, "images_per_second": 1.0, **dict.fromkeys(FALLING, -float(i))} for i in range(LAST)]
        before, after = [{**record, **(losses or {})} for record in log], [dict(record) for record in log]
        after = before if losses else after
        after[-1].update(restarted or {})
        second = {**good, "first_step": CHECKPOINT + 1, **(again or {})}
        runs = iter([({**good, **(first or {})}, before), (second, after)])
        monkeypatch.setattr("benchmarks.gpu_check.train", lambda *_: next(runs))
        return check(tmp_path, cases(tiny=True)[0], "cpu")["failed"]

    assert found() == []
    assert found(first={"recompiled": 2}) == found(again={"recompiled": 2}) == ["2 graphs compiled anew"]
    assert found(first={"graph_breaks": 1}) == found(again={"graph_breaks": 1}) == ["1 graphs that break"]
    assert found(again={"waits": ["run.py:1"]}) == ["the host waits at run.py:1"]
    assert found(again={"first_step": LAST + 1}) == ["the second start began with step 31, expected 21"]
    assert found(losses={"vae_loss": 1.0}) == ["vae_loss does not fall"]
    assert found(restarted={"proj_loss": 0.0}) == ["losses differ by 1.0e+00 after the restart"]


@pytest.mark.slow
def test_training_is_as_it_should_be(tmp_path):
    """Falling losses, the same ones after SIGKILL, nothing compiled anew, no host that waits."""
    (case,) = cases(tiny=True)
    make_workspace(tmp_path, case.setting, workers=1)
    found = check(tmp_path, case, "cpu")
    assert found["failed"] == []
    assert found["graphs"] == 8  # all were compiled
    assert found["restart_difference"] == 0
    assert found["flops_per_second"] > 0
    # the second start had steps to do again, from the only checkpoint
    assert found["first_step"] == 1
    log = tmp_path / "exps" / case.name / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, LAST + 1))
    assert [path.name for path in (tmp_path / "exps" / case.name / "checkpoints").glob("*.pt")] == ["0000020.pt"]


@pytest.mark.slow
def test_the_benchmarks_write_a_table_and_json(tmp_path):
    report = tmp_path / "report.json"
    done = run_process("-m", "benchmarks", "--tiny", "--seconds", 0, "--json", report)
    found = json.loads(report.read_text())
    stages = found["stages"]
    for name in ("preprocessing", "reading", "encoder", "VAE", "LPIPS", "GAN", "alignment", "transformer", "three opt"):
        assert any(stage.startswith(name) for stage in stages), name
    for name in ("EMA", "joint step", "frozen step", "caching", "sampling", "decoding", "writing"):
        assert any(stage.startswith(name) for stage in stages), name
    assert stages["joint step"]["flops"] > stages["VAE"]["flops"] > 0
    assert found["machine"]["matrix_peak_flops"] > 0
    assert sum(entry["share"] for entry in found["profile"]) > 0.5
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == len(stages) + 2


def test_a_missing_gpu_is_one_line():
    for module in ("benchmarks", "benchmarks.gpu_check"):
        done = run_process("-m", module, "--device", "cuda", code=2)
        assert "PyTorch sees no GPU" in done.stderr
        assert "Traceback" not in done.stderr
