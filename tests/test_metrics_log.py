"""metrics.jsonl and trackers: every scalar of every step once, however often a run is interrupted."""

import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts import assert_same_run, call, records, run

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
