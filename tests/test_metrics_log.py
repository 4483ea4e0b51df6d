"""metrics.jsonl and trackers: every scalar of every step once, however often a run is interrupted."""

import argparse
import math
import shutil

import pytest
import torch
import wandb
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.numerics import GlobalBatchNorm2d
from scripts import assert_same_run, records, run
from training.log import MetricsLog, normaliser_drift
from weights.checkpoint_io import read_checkpoint


class Accelerator:
    """What the log needs of accelerate's; its tracker opens in those modes that `works` names."""

    is_main_process = True

    def __init__(self, log_with: list[str], works: tuple[str, ...] = ("online", "offline")):
        self.log_with, self.works, self.trackers, self.tried = log_with, works, [], []

    def init_trackers(self, name: str, config: dict, init_kwargs: dict) -> None:
        options = next(iter(init_kwargs.values()))
        mode = options.get("mode", "online")
        self.tried.append(mode)
        self.config, self.options = config, options
        if mode not in self.works:
            raise OSError(f"no {mode}\nway")
        self.trackers = [name]


def test_a_wandb_that_cannot_be_used_online_keeps_its_files_for_later(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("WANDB_MODE", "online")
    args = argparse.Namespace(report_to="wandb", exp_name="x", offline=False, enc_ckpt=["a=b"], spatial_norm=None)
    said = []
    for key, works, tried in (
        (True, ("online",), ["online"]),
        (False, ("offline",), ["offline"]),
        (True, ("offline",), ["online", "offline"]),
        (True, (), ["online", "offline"]),
    ):
        monkeypatch.setattr("wandb.login", lambda key=key, **how: key and how == {"prompt": False, "verify": False})
        MetricsLog(accelerator := Accelerator(["wandb"], works), args, tmp_path, said.append).open(step=0)
        assert accelerator.tried == tried
        assert bool(accelerator.trackers) == bool(works)
        assert accelerator.config == vars(args)
        assert accelerator.options["settings"].init_timeout <= 20
        assert 0 < accelerator.options["settings"].finish_timeout <= 120
    later = f"it keeps its files here, which `wandb sync {tmp_path}/wandb/offline-run-*` uploads"
    assert said == [
        f"warning: wandb cannot be used online (no API key; `wandb login` stores one); {later}",
        f"warning: wandb cannot be used online (no online way); {later}",
        f"warning: wandb cannot be used online (no online way); {later}",
        "warning: wandb is not available (no offline way); metrics.jsonl is written all the same",
    ]


def test_the_drift_of_a_normaliser_is_in_units_of_its_start():
    bn = GlobalBatchNorm2d(2)
    bn.running_mean.copy_(torch.tensor([1.0, -3.0]))
    bn.running_var.copy_(torch.tensor([4.0, 1.0]))
    drift = normaliser_drift(bn, torch.tensor([[1.0, 1.0], [1.0, 4.0]]))
    assert drift["bn_mean_drift"] == pytest.approx(1.0)  # 0 and 4/2
    assert drift["bn_std_drift"] == pytest.approx(math.log(2))  # twice and half


@pytest.mark.slow
def test_tensorboard_shows_each_step_once_after_a_crash(joint):
    output, flags = joint
    flags = (*flags, "--exp-name", "board", "--report-to", "tensorboard", "--checkpointing-steps", 2)
    flags = (*flags, "--sampling-steps", 3)
    run("train_repae.py", *flags, "--max-train-steps", 5)
    (output / "board/checkpoints/0000005.pt").unlink()  # as if it had crashed after logging step 5
    run("train_repae.py", *flags, "--max-train-steps", 7)
    events = output / "board/logs/repa-e"
    board = EventAccumulator(str(events)).Reload()
    log = records(output / "board/metrics.jsonl")
    assert [record["step"] for record in log] == list(range(1, 8))
    for name in log[0].keys() - {"step"}:
        shown = {event.step: event.value for event in board.Scalars(name)}
        assert len(shown) == len(board.Scalars(name))
        assert shown == pytest.approx({record["step"]: record[name] for record in log})
    for name in ("samples", "reconstructions"):
        assert [event.step for event in board.Images(name)] == [3, 6]
    hyperparameters = [yaml.safe_load(path.read_text()) for path in events.glob("*/hparams.yml")]
    assert {"enc_ckpt": "[]", "spatial_norm": "None", "batch_size": 4}.items() <= hyperparameters[-1].items()


@pytest.mark.slow
def test_a_tracker_that_fails_later_does_not_stop_the_run(joint, monkeypatch, capsys):
    def fail(*_, **__) -> None:
        raise OSError("no space for the tracker")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.log", fail)
    output, flags = joint
    flags = (*flags, "--exp-name", "failing", "--report-to", "tensorboard", "--num-workers", 0)
    run("train_repae.py", *flags, "--max-train-steps", 2)
    assert "warning: tensorboard is not available (no space for the tracker)" in "".join(capsys.readouterr())
    assert (output / "failing/checkpoints/0000002.pt").is_file()
    assert len(records(output / "failing/metrics.jsonl")) == 2


@pytest.mark.slow
def test_an_interrupted_run_in_half_precision_equals_an_uninterrupted_one(joint):
    output, flags = joint
    flags = (*flags, "--num-workers", 0, "--batch-size", 2, "--mixed-precision", "fp16")
    for name, lengths in (("half-whole", (2,)), ("half-parts", (1, 2))):
        for steps in lengths:
            run("train_repae.py", *flags, "--exp-name", name, "--max-train-steps", steps)
    assert_same_run(output / "half-whole", output / "half-parts", 2)
    checkpoint = read_checkpoint(output / "half-parts/checkpoints/0000002.pt")
    assert checkpoint["optimizer_extras"]["opt"]["scaler"]["_growth_tracker"] == 2
    assert all(value.dtype == torch.float32 for value in checkpoint["model"].values() if value.is_floating_point())
    first = records(output / "half-parts/metrics.jsonl")[0]
    assert {f"loss_scale_{optimizer}" for optimizer in ("sit", "vae", "disc")} <= first.keys()
    assert all(math.isfinite(first[key]) for key in ("vae_loss", "d_loss", "denoising_loss"))


@pytest.mark.slow
def test_wandb_goes_on_with_the_same_run(joint, whole_run, monkeypatch):
    logged, real = [], wandb.Run.log

    def log(self, data, step=None, **options) -> None:
        logged.append((step, data))
        real(self, data, step=step, **options)

    monkeypatch.setattr("wandb.Run.log", log)
    output, flags = joint
    flags = (*flags, "--exp-name", "wandb", "--report-to", "wandb", "--offline", "--sampling-steps", 2)
    for steps in (2, 4):
        run("train_repae.py", *flags, "--max-train-steps", steps)
    identity = (output / "wandb/wandb-id.txt").read_text()
    runs = sorted((output / "wandb/wandb").glob("offline-run-*"))
    assert [path.name.rsplit("-", 1)[1] for path in runs] == [identity, identity]
    assert (log := records(output / "wandb/metrics.jsonl")) == records(whole_run / "metrics.jsonl")[:4]
    assert [step for step, values in logged if "denoising_loss" in values] == [1, 2, 3, 4]
    for record in log:
        shown = dict(item for step, values in logged if step == record["step"] for item in values.items())
        assert record.items() - {("step", record["step"])} <= shown.items()
        assert shown["images_per_second"] > 0
        assert bool(shown.get("samples")) == (record["step"] % 2 == 0)


@pytest.mark.slow
def test_a_checkpoint_that_is_damaged_costs_no_more_than_the_steps_since_the_one_before(joint, capsys):
    output, flags = joint
    flags = (*flags, "--num-workers", 0, "--checkpointing-steps", 2, "--max-train-steps", 6)
    run("train_repae.py", *flags, "--exp-name", "sound")
    shutil.copytree(output / "sound", output / "damaged")
    path = output / "damaged/checkpoints/0000006.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    capsys.readouterr()
    run("train_repae.py", *flags, "--exp-name", "damaged")
    said = "".join(capsys.readouterr())
    assert "0000006.pt: damaged (checksum of" in said
    assert f"continuing after step 4 from {path.with_name('0000004.pt')}" in said
    assert said.count("peak memory of the first step: ") == 1
    assert_same_run(output / "sound", output / "damaged", 6)
