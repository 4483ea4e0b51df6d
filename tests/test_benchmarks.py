"""The benchmarks and the check for GPUs, at tiny sizes, and the documents' table of computation."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

from benchmarks import flops
from benchmarks.gpu_check import CHECKPOINT, FALLING, LAST, check
from benchmarks.measure import measure, profile
from benchmarks.watched_training import READS, Watched
from benchmarks.workspace import TINY, make_workspace
from models.sit import SiT_models
from scripts import ROOT, refusal, run
from train_ldm_only import ldm_step
from train_repae import repae_step

CPU = torch.device("cpu")


def test_measuring_counts_calls_time_and_products():
    a = torch.randn(256, 512)
    calls = []

    def work() -> None:
        calls.append(a @ a.T)

    found = measure(work, images=4, device=CPU, seconds=0)
    assert (found.flops, found.images, found.runs) == (2 * 256 * 512 * 256, 4, 3)
    assert len(calls) == 6  # to warm up, to count, for memory, and three
    assert 0 < found.fastest <= found.median <= found.slowest
    assert found.memory > 10**7
    assert profile(work, CPU)[0]["operation"] in ("aten::mm", "aten::matmul")


def test_operations_of_a_transformer_are_those_of_its_matrices_and_its_attention():
    with torch.device("meta"):
        sit = SiT_models["SiT-S/2"](input_size=32, encoder_depth=8)
        batch, draws = flops.build_batch("f8d4", 256)
    tokens, width, depth, wide = 256, 384, 12, 2048
    blocks = depth * (12 * width**2 * tokens + 6 * width**2 + 2 * tokens**2 * width)
    ends = tokens * 2 * 16 * width + 256 * width + width**2 + 2 * width**2
    projector = tokens * (width * wide + wide**2 + wide * 768)
    assert flops.count(sit, draws.noise, draws.t, batch.labels) == 2 * (blocks + ends + projector)


def test_the_parts_of_a_joint_step_are_all_of_it():
    flags = ("f4d4-tiny", "SiT-XXS/2", "efficientnet-lite0", 32, 2)
    found = flops.stage_flops(*flags)
    assert min(found.values()) > 0
    with torch.device("meta"):
        nets = flops.build_nets(*flags)
        batch, draws = flops.build_batch("f4d4-tiny", 32)
    for name, step in (("joint step", repae_step), ("frozen-VAE step", ldm_step)):
        assert flops.count(step, nets, batch, draws, flops.CONFIG) == pytest.approx(found[name], rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("vae", "model"), [("f8d4", "SiT-XL/2"), ("f16d32", "SiT-XL/1")])
def test_the_documents_say_what_is_counted(vae, model):
    text = "".join(page.read_text(encoding="utf8") for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    found = {name: value / 1e12 for name, value in flops.stage_flops(vae, model).items()}
    of_vae = found["VAE, forward"] + found["VAE, backward"]
    of_transformer = found["transformer's update"] + found["alignment through the transformer"]
    parts = f"(VAE {of_vae:.1f}, transformer {of_transformer:.2f})"
    assert f"| joint step, {vae}, {model}, DINOv2-B | about {found['joint step']:.1f} {parts} |" in text
    assert f"| about {found['frozen-VAE step']:.2f} |" in text
    guided = found["sampling"] + flops.SAMPLING_STEPS * found["sampling, an evaluation"]
    assert found["sampling"] == pytest.approx(60, abs=0.5)
    assert f"| {found['sampling']:.0f} without guidance, {guided:.0f} with guidance at all times |" in text


def watched_steps(step, tmp_path, monkeypatch, warm_up: int = 1, last: int = 5) -> dict:
    """The facts about the steps of a training whose step function is `step`."""
    monkeypatch.setattr(os, "kill", lambda *_: None)
    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, getattr(torch.Tensor, name))  # put back afterwards
        watched = Watched(step, tmp_path / "facts.json", warm_up, last)
        for number in range(last + 1):
            watched(None, SimpleNamespace(step=number, pixels=torch.zeros(1)), None, None)
    return json.loads((tmp_path / "facts.json").read_text())


def test_the_watch_sees_a_host_that_waits_after_the_warm_up(tmp_path, monkeypatch):
    def waits(*_) -> dict:
        return {"loss": torch.ones(2).sum().item()}

    assert watched_steps(lambda *_: {"loss": torch.ones(2).sum()}, tmp_path, monkeypatch)["waits"] == []
    (place,) = watched_steps(waits, tmp_path, monkeypatch)["waits"]
    assert place.startswith(__file__)
    assert watched_steps(waits, tmp_path, monkeypatch, warm_up=6)["waits"] == []


def test_every_failure_is_named(tmp_path, monkeypatch):
    def found(first=None, again=None, losses=None, restarted=None) -> list[str]:
        good = {"first_step": 1, "recompiled": 0, "graph_breaks": 0, "waits": [], "memory": 1, "graphs": 8}
        log = [{"step": i + 1, "images_per_second": 1.0, **dict.fromkeys(FALLING, -float(i))} for i in range(LAST)]
        before, after = [{**record, **(losses or {})} for record in log], [dict(record) for record in log]
        after = before if losses else after
        after[-1].update(restarted or {})
        second = {**good, "first_step": CHECKPOINT + 1, **(again or {})}
        runs = iter([({**good, **(first or {})}, before), (second, after)])
        monkeypatch.setattr("benchmarks.gpu_check.train", lambda *_: next(runs))
        return check(tmp_path, "made-up", TINY, "cpu")["failed"]

    assert found() == []
    assert found(first={"recompiled": 2}) == found(again={"recompiled": 2}) == ["2 graphs recompiled"]
    assert found(first={"graph_breaks": 1}) == found(again={"graph_breaks": 1}) == ["1 graph breaks"]
    assert found(again={"waits": ["run.py:1"]}) == ["the host waits at run.py:1"]
    assert found(again={"first_step": LAST + 1}) == ["the second start began at step 31, expected 21"]
    assert found(losses={"vae_loss": 1.0}) == ["vae_loss does not fall"]
    assert found(restarted={"proj_loss": 0.0}) == ["losses differ by 1.0e+00 after the restart"]


@pytest.mark.slow
def test_a_tiny_training_passes_the_check(tmp_path):
    """Falling losses, the same ones after SIGKILL, nothing recompiled, no host that waits."""
    make_workspace(tmp_path, TINY, workers=1)
    found = check(tmp_path, "tiny", TINY, "cpu")
    assert found["failed"] == []
    assert found["graphs"] == 8  # all were compiled
    assert found["restart_difference"] == 0
    assert found["flops_per_second"] > 0
    log = tmp_path / "exps/tiny/metrics.jsonl"
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, LAST + 1))


@pytest.mark.slow
def test_the_benchmarks_write_a_table_and_json(tmp_path):
    report = tmp_path / "report.json"
    done = run("benchmarks.__main__", "--tiny", "--seconds", 0, "--num-workers", 1, "--json", report)
    found = json.loads(report.read_text())
    stages = found["stages"]
    for name in (
        *("preprocessing", "reading", "encoder", "VAE", "LPIPS", "GAN", "alignment", "transformer", "three opt", "EMA"),
        *("joint step", "frozen step", "caching", "sampling", "decoding", "writing"),
    ):
        assert any(stage.startswith(name) for stage in stages), name
    assert stages["joint step"]["flops"] > stages["VAE"]["flops"] > 0
    assert found["machine"]["matrix_peak_flops"] > 0
    assert sum(entry["share"] for entry in found["profile"]) > 0.5
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == len(stages) + 2


@pytest.mark.parametrize("module", ["benchmarks.__main__", "benchmarks.gpu_check"])
def test_a_missing_gpu_is_one_line(module, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "PyTorch sees no GPU" in refusal(module, "--device", "cuda")
