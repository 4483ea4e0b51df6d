"""metrics.jsonl and trackers: every scalar of every step once, however often a run is interrupted."""

import argparse
import shutil
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts import assert_same_run, call, records, run
from training.checkpoint import read_checkpoint
from training.metrics_log import MetricsLog

pytestmark = pytest.mark.slow


def test_tensorboard_shows_each_step_once_after_a_crash(joint):
    output, flags = joint
    flags = (*flags, "--exp-name", "board", "--report-to", "tensorboard", "--checkpointing-steps", 2)
    assert call("train_repae.py", *flags, "--max-train-steps", 5)[0] == 0
    (output / "board/checkpoints/0000005.pt").unlink()  # as if it had crashed after logging step 5
    assert call("train_repae.py", *flags, "--max-train-steps", 7)[0] == 0
    events = output / "board/logs/repa-e"
    board = EventAccumulator(str(events)).Reload()
    log = records(output / "board/metrics.jsonl")
    assert [record["step"] for record in log] == list(range(1, 8))
    for name in ("denoising_loss", "d_loss", "grad_norm_vae"):
        shown = {event.step: event.value for event in board.Scalars(name)}
        assert len(shown) == len(board.Scalars(name))
        assert shown == pytest.approx({record["step"]: record[name] for record in log})


def test_a_tracker_that_fails_later_does_not_stop_the_run(joint, monkeypatch, capsys):
    def fail(*_, **__) -> None:
        raise OSError("no space for the tracker")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.log", fail)
    output, flags = joint
    flags = (*flags, "--exp-name", "failing", "--report-to", "tensorboard", "--num-workers", 0)
    assert call("train_repae.py", *flags, "--max-train-steps", 2)[0] == 0
    assert "warning: tensorboard is not available (no space for the tracker)" in "".join(capsys.readouterr())
    assert (output / "failing/checkpoints/0000002.pt").is_file()
    assert len(records(output / "failing/metrics.jsonl")) == 2


def test_an_empty_identity_of_wandb_is_made_anew(tmp_path):
    args = argparse.Namespace(report_to="wandb", exp_name="x", offline=True)
    (tmp_path / "wandb-id.txt").write_text("")
    opened = {}
    accelerator = SimpleNamespace(
        init_trackers=lambda name, config, init_kwargs: opened.update(init_kwargs["wandb"]), is_main_process=True
    )
    MetricsLog(accelerator, args, tmp_path, say=print).open(step=0)
    assert len(opened["id"]) == 8
    assert (tmp_path / "wandb-id.txt").read_text() == opened["id"]


def test_a_run_whose_checkpoints_are_gone_begins_again_and_keeps_the_log(joint, capsys):
    output, flags = joint
    flags = (*flags, "--exp-name", "gone", "--num-workers", 0)
    assert call("train_repae.py", *flags, "--max-train-steps", 3)[0] == 0
    before = (output / "gone/metrics.jsonl").read_bytes()
    shutil.rmtree(output / "gone/checkpoints")
    assert call("train_repae.py", *flags, "--max-train-steps", 1)[0] == 0
    assert "no checkpoint; beginning again, the log is kept as" in "".join(capsys.readouterr())
    assert (output / "gone/metrics-before-restart.jsonl").read_bytes() == before
    assert len(records(output / "gone/metrics.jsonl")) == 1


def test_an_interrupted_run_in_half_precision_equals_an_uninterrupted_one(joint):
    output, flags = joint
    flags = (*flags, "--num-workers", 0, "--batch-size", 2, "--mixed-precision", "fp16")
    for name, lengths in (("half-whole", (4,)), ("half-parts", (2, 4))):
        for steps in lengths:
            assert call("train_repae.py", *flags, "--exp-name", name, "--max-train-steps", steps)[0] == 0
    assert_same_run(output / "half-whole", output / "half-parts", 4)
    checkpoint = read_checkpoint(output / "half-parts/checkpoints/0000004.pt")
    assert checkpoint["optimizer_extras"]["opt"]["scaler"]["_growth_tracker"] == 4


def test_wandb_goes_on_with_the_same_run(joint, whole_run):
    output, flags = joint
    flags = (*flags, "--exp-name", "wandb", "--report-to", "wandb", "--offline")
    for steps in (2, 4):
        run("train_repae.py", *flags, "--max-train-steps", steps)
    identity = (output / "wandb/wandb-id.txt").read_text()
    runs = list((output / "wandb/wandb").glob("offline-run-*"))
    assert [path.name.rsplit("-", 1)[1] for path in runs] == [identity, identity]
    assert all(list(path.glob("*.wandb")) for path in runs)
    assert records(output / "wandb/metrics.jsonl") == records(whole_run / "metrics.jsonl")[:4]


def test_a_checkpoint_that_is_damaged_costs_no_more_than_the_steps_since_the_one_before(joint):
    output, flags = joint
    flags = (*flags, "--num-workers", 0, "--checkpointing-steps", 2, "--max-train-steps", 6)
    assert call("train_repae.py", *flags, "--exp-name", "sound")[0] == 0
    shutil.copytree(output / "sound", output / "damaged")
    path = output / "damaged/checkpoints/0000006.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    done = run("train_repae.py", *flags, "--exp-name", "damaged")
    assert "0000006.pt: damaged (checksum of" in done.stdout + done.stderr
    assert f"continuing after step 4 from {path.with_name('0000004.pt')}" in done.stdout + done.stderr
    assert path.with_name("0000006.pt.damaged").read_bytes() == data
    assert_same_run(output / "sound", output / "damaged", 6)
