"""--dry-run: what it says is what is counted and stored otherwise, it says what training would, and writes nothing."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import published
import train_repae
from benchmarks.flops import CONFIG, build_batch, build_nets, stage_flops
from scripts import LAST, TINY, TINY_SIT, call, run, torchrun
from test_flags import OneProcess
from train_ldm_only import ldm_step
from train_repae import repae_step
from train_vae import vae_step
from training.dry_run import checkpoints_to_come
from training.estimates import amount, count_step
from training.transformer_step import TransformerNets
from training.vae_step import VAENets
from weights.checkpoint_io import read_checkpoint
from weights.vae import open_vae

TINY_NETS = {"vae": "f4d4-tiny", "model": "SiT-XXS/2", "enc_type": "efficientnet-lite0", "resolution": 32}
LATENT = (4, 8, 8)


def listing(*folders) -> dict:
    """Every path below folders, with its size and time of change."""
    paths = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def dry(capsys, script: str, *flags) -> dict[str, str]:
    """The lines of a dry run's report by their names; of those that are called alike, the first."""
    capsys.readouterr()
    code, stderr = call(script, *flags, "--dry-run")
    assert code == 0, stderr
    out = capsys.readouterr().out
    assert "dry run: nothing was written, and no step was taken" in out
    lines = [(line[4:17].strip(), line[18:]) for line in out.splitlines() if line.startswith("    ")]
    return dict(reversed(lines))


def number(text: str) -> float:
    """The first number of a text, with its unit's prefix."""
    value, unit = text.split()[:2]
    return float(value) * {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}.get(unit[0], 1)


def part_of(nets, kind) -> object:
    """The networks of another step, of those of the joint step."""
    return kind(**{field.name: getattr(nets, field.name) for field in dataclasses.fields(kind)})


@pytest.fixture(scope="module")
def tiny_nets():
    """The networks of a tiny joint step, and an example of what it is given."""
    torch.manual_seed(0)
    nets = build_nets(**TINY_NETS, encoder_depth=2)
    return nets, build_batch(TINY_NETS["vae"], TINY_NETS["resolution"], images=1)[0]


def test_operations_of_a_step_are_those_of_pytorchs_counter(tiny_nets):
    nets, example = tiny_nets
    expected = stage_flops(*TINY_NETS.values(), 2)
    joint = count_step(repae_step, nets, CONFIG, example, 3, LATENT, "no").flops
    assert list(joint) == ["encoders", "VAE's update", "discriminator's update", "transformer's update"]
    assert sum(joint.values()) == pytest.approx(expected["joint step"], rel=1e-9)
    assert joint["encoders"] == expected["encoders, forward"]
    assert joint["discriminator's update"] == expected["discriminator's update"]
    assert joint["transformer's update"] == expected["transformer's update"]
    frozen, vae = part_of(nets, TransformerNets), part_of(nets, VAENets)
    found = count_step(ldm_step, frozen, CONFIG, example, 2, LATENT, "bf16").flops
    assert sum(found.values()) == pytest.approx(expected["frozen-VAE step"], rel=1e-9)
    found = count_step(vae_step, vae, CONFIG, example, 2, LATENT, "fp16").flops
    alignment = expected["alignment through the transformer"] + expected["encoders, forward"]
    less = alignment + expected["transformer's update"]
    assert sum(found.values()) == pytest.approx(expected["joint step"] - less, rel=1e-9)
    assert all(parameter.grad is None for parameter in nets.sit.parameters()), "the networks stay as they are"


def allocated_at_most(step) -> int:
    """Bytes that the CPU's allocator gave at most in a call, beside those given before, by PyTorch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    live = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def test_activations_are_what_the_allocator_gives(tiny_nets):
    (nets, example), count = tiny_nets, 8
    estimate = count_step(repae_step, nets, CONFIG, example, count, LATENT, "no").activations
    for parameter in (*nets.vae.parameters(), *nets.discriminator.parameters(), *nets.sit.parameters()):
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    batch, draws = build_batch(TINY_NETS["vae"], TINY_NETS["resolution"], images=count)
    measured = allocated_at_most(lambda: repae_step(nets, batch, draws, CONFIG))
    for parameter in (*nets.vae.parameters(), *nets.discriminator.parameters(), *nets.sit.parameters()):
        parameter.grad = None
    assert estimate == pytest.approx(measured, rel=0.01)


def test_half_precision_and_gradient_checkpointing_take_less_memory(tiny_nets):
    nets, example = tiny_nets
    whole, half = (count_step(repae_step, nets, CONFIG, example, 32, LATENT, how) for how in ("no", "bf16"))
    assert half.activations < 0.95 * whole.activations
    assert half.flops == whole.flops
    with pytest.MonkeyPatch.context() as patch:
        for network in (nets.vae.encoder, nets.vae.decoder, nets.lpips.net, nets.sit):
            patch.setattr(network, "recompute", True)
        again = count_step(repae_step, nets, CONFIG, example, 32, LATENT, "no")
    assert again.activations < 0.8 * whole.activations
    assert sum(again.flops.values()) > 1.1 * sum(whole.flops.values())


def test_a_joint_runs_report_is_what_is_on_the_disk_and_nothing_is_written(capsys, joint, whole_run, tiny_vae):
    output, flags = joint
    length = ("--max-train-steps", LAST, "--sampling-steps", LAST // 2, "--checkpointing-steps", 10)
    before = listing(output, tiny_vae[0])
    found = dry(capsys, "train_repae.py", *flags, "--exp-name", "planned", *length)
    assert listing(output, tiny_vae[0]) == before
    checkpoint = whole_run / f"checkpoints/{LAST:07d}.pt"
    assert number(found["a checkpoint"]) == pytest.approx(checkpoint.stat().st_size, rel=0.02)
    content = read_checkpoint(checkpoint)
    args = train_repae.parse_args([*map(str, flags), "--exp-name", "x"])
    source = open_vae(args.vae, args.vae_ckpt, offline=True)
    sit = train_repae.build(args, OneProcess(), source)[0].sit
    buffers = {name for name, _ in sit.named_buffers()}
    count = sum(value.numel() for name, value in content["model"].items() if name not in buffers)
    vae = sum(value.numel() for value in content["vae"].values())
    assert f"VAE {amount(vae, '').strip()}, " in found["trained"]
    assert f"transformer {amount(count, '').strip()} parameters" in found["trained"]
    assert found["frozen"].startswith(f"average {amount(count, '').strip()}, LPIPS 14.7 M, efficientnet-lite0 3.37 M")
    assert found["data"] == "18 images, 3 classes"
    assert found["latents"] == "4x8x8, 16 tokens"
    assert found["micro-batch"] == "4 images = 4 / 1 processes / 1 accumulation steps"
    assert found["to do"] == f"{LAST} steps from the beginning: there is no checkpoint"
    assert "4 that stay, and up to 2 by time" in found["checkpoints"]
    assert number(found["checkpoints"].split(":")[0]) == pytest.approx(6 * number(found["a checkpoint"]), rel=0.01)
    assert "warning:" not in found
    log, pictures = found["log, pictures"].split(", up to ")
    assert number(log) == pytest.approx((whole_run / "metrics.jsonl").stat().st_size, rel=0.1)
    written = sum(path.stat().st_size for path in whole_run.glob("*/*.png"))
    assert written < number(pictures) < 3 * written
    expected = stage_flops(*TINY_NETS.values(), 2)["joint step"]
    assert number(found["an image"]) == pytest.approx(expected, rel=0.01)
    assert number(found["a step"]) == pytest.approx(4 * expected, rel=0.01)
    assert number(found["all to do"].split(":")[0]) == pytest.approx(4 * LAST * expected, rel=0.01)
    trained = sum(
        p["exp_avg"].numel() for name in ("opt", "opt_vae", "opt_disc") for p in content[name]["state"].values()
    )
    assert number(found["gradients"]) == pytest.approx(4 * trained, rel=0.01)
    assert number(found["optimisers"]) == pytest.approx(8 * trained, rel=0.01)


def test_a_run_that_continues_says_what_is_left_and_refuses_other_flags(capsys, joint, whole_run):
    output, flags = joint
    before = listing(output)
    found = dry(capsys, "train_repae.py", *flags, "--exp-name", "whole", "--max-train-steps", LAST + 8)
    assert found["to do"] == f"8 steps after step {LAST} of a checkpoint"
    done = dry(capsys, "train_repae.py", *flags, "--exp-name", "whole", "--max-train-steps", 2)
    assert done["to do"] == f"0 steps after step {LAST} of a checkpoint"
    assert done["checkpoints"].startswith("0 B: 0 that stay, and up to 0 ")
    code, stderr = call("train_repae.py", *flags, "--exp-name", "whole", "--proj-coeff", "2", "--dry-run")
    assert code == 2
    assert "was made with other flags (--proj-coeff 0.5 -> 2.0)" in stderr
    assert listing(output) == before


def test_a_disk_that_is_too_small_is_warned_of_and_an_evaluations_images_are_not_looked_at(capsys, joint, monkeypatch):
    monkeypatch.setattr("files.shutil.disk_usage", lambda path: SimpleNamespace(free=10**8))
    monkeypatch.delattr("training.evaluation.statistics_of")
    flags = (*joint[1], "--exp-name", "planned", "--eval-steps", 4, "--eval-features", "efficientnet-lite0")
    found = dry(capsys, "train_repae.py", *flags)
    assert found["warning:"].startswith("it will not fit")
    assert "up to 3 by time" in found["checkpoints"]


def test_errors_come_as_they_do_in_training(joint, tmp_path, monkeypatch):
    output, flags = joint
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for wrong, message in {
        ("--vae-ckpt", "nowhere.pt"): "VAE weights nowhere.pt: no such file",
        ("--output-dir", "README.md"): "README.md/bad: a file is in the way of this folder",
        ("--continue-train-exp-dir", "nowhere"): "--continue-train-exp-dir nowhere: no checkpoints in",
        ("--eval-steps", 5, "--offline"): "and offline",
    }.items():
        code, stderr = call("train_repae.py", *flags, "--exp-name", "bad", *wrong, "--dry-run")
        assert (code, message in stderr) == (2, True), stderr
    assert not (output / "bad").exists()


def test_a_vae_alone(capsys, tiny_data, tmp_path, vgg_weights):
    paths = ("--output-dir", tmp_path / "exps", "--data-dir", tiny_data, "--lpips-vgg-ckpt", vgg_weights)
    found = dry(capsys, "train_vae.py", *TINY, *paths, "--exp-name", "vae", "--mixed-precision", "fp16")
    assert found["latents"] == "4x8x8"
    assert list(tmp_path.iterdir()) == []
    assert "transformer" not in found["an image"]


def test_a_frozen_vae_with_pixels_without_and_with_cached_tokens(capsys, tiny_data, tmp_path):
    vae = published.write_vae(tmp_path / "vae")
    data = ("--data-dir", tiny_data, "--output-dir", tmp_path / "data", "--num-workers", 0)
    latents = ("--vae-arch", published.VAE, "--vae-ckpt-path", vae, "--vae-latents-name", "latents")
    assert call("cache_latents.py", *data, *latents)[0] == 0
    tokens = ("--enc-type", "efficientnet-lite0", "--tokens-name", "tokens", "--token-grid", 4)
    assert call("cache_tokens.py", *data, *tokens)[0] == 0
    (tmp_path / "data/images").symlink_to(tiny_data / "images")
    paths = ("--output-dir", tmp_path / "exps", "--data-dir", tmp_path / "data")
    flags = (*TINY, *TINY_SIT, *paths, "--exp-name", "ldm", "--vae-ckpt", vae, "--vae-latents-name", "latents")
    expected = stage_flops(*TINY_NETS.values(), 2)
    found = dry(capsys, "train_ldm_only.py", *flags)
    assert number(found["an image"]) == pytest.approx(expected["frozen-VAE step"], rel=0.01)
    assert "efficientnet-lite0" in found["frozen"]
    assert "VAE" in found["frozen"]
    found = dry(capsys, "train_ldm_only.py", *flags, "--cached-tokens", "tokens")
    assert number(found["an image"]) == pytest.approx(expected["transformer's update"], rel=0.01)
    assert "efficientnet-lite0" not in found["frozen"]
    found = dry(capsys, "train_ldm_only.py", *flags, "--enc-type", "none")
    assert number(found["an image"]) < 0.9 * expected["transformer's update"]
    assert not (tmp_path / "exps").exists()


@pytest.mark.parametrize(
    ("step", "last", "interval", "rolling", "expected"),
    [
        (0, 400_000, 50_000, [], (8, 2)),
        (0, 410_000, 50_000, [], (9, 2)),
        (120_000, 400_000, 50_000, [110_000, 120_000], (6, 0)),
        (150_000, 400_000, 50_000, [140_000], (5, 1)),
        (400_000, 400_000, 50_000, [], (0, 0)),
    ],
)
def test_checkpoints_that_are_to_come(tmp_path, step, last, interval, rolling, expected):
    for there in rolling:
        (tmp_path / f"{there:07d}.pt").touch()
    folder = SimpleNamespace(directory=tmp_path, rolling=lambda: {*rolling, 7})
    args = SimpleNamespace(checkpointing_steps=interval, keep_last=2)
    assert checkpoints_to_come(SimpleNamespace(step=step, args=args, checkpoints=folder), last) == expected


@pytest.mark.slow
def test_two_processes_print_one_report(joint):
    output, flags = joint
    done = run("train_repae.py", *flags, "--exp-name", "planned", "--dry-run", launcher=torchrun(2))
    assert done.stdout.count("dry run: nothing was written, and no step was taken") == 1
    assert "2 images = 4 / 2 processes / 1 accumulation steps" in done.stdout
    assert not (output / "planned").exists()
