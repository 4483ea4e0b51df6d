"""Flags: the reference's names and defaults, and where they end up."""

import argparse
import importlib
from pathlib import Path

import pytest
import torch

import published
import train_repae
from errors import UserError
from flags import config
from loss.vae_loss import VAELossConfig
from training.build import transformer_draws, warn_of_untrained_discriminator
from training.randomness import Rows, step_draws
from weights.vae import open_vae

# the reference's flags and defaults, and the defaults of our flags that change results
BOTH = """output_dir=exps logging_dir=logs report_to=wandb sampling_steps=10000 resume_step=0
    continue_train_exp_dir=None wandb_history_path=None prediction=v compile=True data_dir=data resolution=256
    batch_size=256 allow_tf32=True
    mixed_precision=fp16 epochs=1400 checkpointing_steps=50000 gradient_accumulation_steps=1 adam_beta1=0.9
    adam_beta2=0.999 adam_weight_decay=0.0 adam_epsilon=1e-08 max_grad_norm=1.0 seed=0 num_workers=4
    offline=False dry_run=False gradient_checkpointing=False"""
TRANSFORMER = """max_train_steps=400000 num_classes=None encoder_depth=8 qk_norm=False fused_attn=True cfg_prob=0.1
    learning_rate=0.0001 path_type=linear weighting=uniform enc_type=dinov2-vit-b proj_coeff=0.5 ema_decay=0.9999
    sit_ckpt=None enc_ckpt=[] resample_tokens=False projector=mlp spatial_norm=None eval_steps=0"""
VAE = """disc_pretrained_ckpt=None loss_cfg_path=configs/l1_lpips_kl_gan.yaml vae_learning_rate=0.0001
    disc_learning_rate=0.0001 disc_warmup_steps=0"""
JOINT = """model=SiT-XL/2 vae=f8d4 vae_ckpt=pretrained/sdvae-f8d4/sdvae-f8d4.pt bn_momentum=0.1
    vae_align_proj_coeff=1.5"""
FROZEN = """model=SiT-XL/1 vae=f16d32 vae_ckpt=pretrained/e2e-vavae-400k/e2e-vavae-400k.pt
    vae_latents_name=e2e-vavae-400k"""
CACHE = """vae_arch=f16d32 vae_latents_name=repae-invae-400k data_dir=data output_dir=data pproc_batch_size=128
    dtype=float32 mirrored=False"""
GENERATE = """global_seed=0 tf32=True sample_dir=samples train_steps=None pproc_batch_size=256 num_fid_samples=50000
    mode=ode cfg_scale=1.5 path_type=None num_steps=50 heun=False guidance_low=0.0 guidance_high=1.0
    mixed_precision=no labels=random classes=None png=True npz=True"""
DEFAULTS = {
    "preprocessing": ("--imagenet-path tree", "output_path=data resolution=256 num_workers=16 max_images=None"),
    "train_vae": ("--exp-name x", f"{BOTH} {VAE} vae=f8d4 vae_ckpt=None max_train_steps=100000 stats_only=False"),
    "train_repae": ("--exp-name x", f"{BOTH} {VAE} {TRANSFORMER} {JOINT}"),
    "train_ldm_only": ("--exp-name x", f"{BOTH} {TRANSFORMER} {FROZEN}"),
    "cache_latents": ("--vae-ckpt-path vae.pt", CACHE),
    "save_vae_weights": ("--repae-ckpt joint.pt", "vae_name=e2e-vae save_dir=exps format=pt"),
    "generate": ("--exp-path run", GENERATE),
}
# the published command lines, and the expected values of some of their flags
PUBLISHED = {
    "preprocessing.py": ("--imagenet-path /PATH/TO/IMAGENET_TRAIN", {"resolution": 256, "num_workers": 16}),
    "train_repae.py": (
        """--max-train-steps=400000 --report-to=wandb --allow-tf32 --mixed-precision=fp16 --seed=0 --data-dir=data
        --output-dir=exps --batch-size=256 --path-type=linear --prediction=v --weighting=uniform --model=SiT-XL/2
        --checkpointing-steps=50000 --loss-cfg-path=configs/l1_lpips_kl_gan.yaml --vae=f8d4
        --vae-ckpt=pretrained/sdvae/sdvae-f8d4.pt --enc-type=dinov2-vit-b --proj-coeff=0.5 --encoder-depth=8
        --disc-pretrained-ckpt=pretrained/sdvae/sdvae-f8d4-discriminator-ckpt.pt --vae-align-proj-coeff=1.5
        --bn-momentum=0.1 --exp-name=NAME""",
        {"vae_ckpt": "pretrained/sdvae/sdvae-f8d4.pt", "bn_momentum": 0.1},
    ),
    "save_vae_weights.py": (
        "--repae-ckpt pretrained/sit-repae-vavae/checkpoints/0400000.pt --vae-name e2e-vavae --save-dir exps",
        {"vae_name": "e2e-vavae", "save_dir": Path("exps")},
    ),
    "cache_latents.py": (
        """--vae-arch=f16d32 --vae-ckpt-path=pretrained/e2e-vavae/e2e-vavae-400k.pt --vae-latents-name=e2e-vavae
        --pproc-batch-size=128""",
        {"vae_arch": "f16d32", "vae_latents_name": "e2e-vavae", "dtype": "float32"},
    ),
    "train_ldm_only.py": (
        """--max-train-steps=4000000 --report-to=wandb --allow-tf32 --mixed-precision=fp16 --seed=0 --data-dir=data
        --batch-size=256 --path-type=linear --prediction=v --weighting=uniform --model=SiT-XL/1
        --checkpointing-steps=50000 --vae=f16d32 --vae-ckpt=pretrained/e2e-vavae/e2e-vavae-400k.pt
        --vae-latents-name=e2e-vavae --learning-rate=1e-4 --enc-type=dinov2-vit-b --proj-coeff=0.5
        --encoder-depth=8 --output-dir=exps --exp-name=NAME""",
        {"model": "SiT-XL/1", "vae_latents_name": "e2e-vavae"},
    ),
    "generate.py": (
        """--num-fid-samples 50000 --path-type linear --mode sde --num-steps 250 --cfg-scale 1.0 --guidance-high 1.0
        --guidance-low 0.0 --exp-path pretrained/sit-ldm-e2e-vavae --train-steps 4000000""",
        {"mode": "sde", "cfg_scale": 1.0, "train_steps": 4000000, "num_fid_samples": 50000},
    ),
}


@pytest.mark.parametrize("script", PUBLISHED)
def test_the_published_command_lines_are_accepted(script):
    line, expected = PUBLISHED[script]
    args = vars(importlib.import_module(script.removesuffix(".py")).parse_args(line.split()))
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize("script", DEFAULTS)
def test_defaults_are_the_references(script):
    required, expected = DEFAULTS[script]
    args = importlib.import_module(script).parse_args(required.split())
    assert set(expected.split()) - {f"{name}={value}" for name, value in vars(args).items()} == set()


def under_accelerate(monkeypatch, *flags: str, script: str = "train_vae", **settings: str) -> argparse.Namespace:
    """The flags that a script has where accelerate sets its own."""
    for name, value in settings.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    required = {"train_vae": ["--exp-name", "x"], "generate": ["--exp-path", "x"]}[script]
    return importlib.import_module(script).parse_args([*required, *flags])


@pytest.mark.parametrize(
    ("setting", "flags", "taken", "said"),
    [
        ("no", "", "fp16", "exp_name=x"),  # what accelerate sends if nothing was set
        ("bf16", "", "bf16", "flags from accelerate launch: mixed_precision=bf16"),
        ("bf16", "--mixed-precision bf16", "bf16", "exp_name=x mixed_precision=bf16"),
        ("bf16", "--mixed-precision=fp16", "fp16", "mixed_precision=fp16 takes precedence over accelerate's bf16"),
        ("fp8", "--mixed-precision no", "no", "mixed_precision=no takes precedence over accelerate's fp8"),
        ("fp16", "--config {file}", "no", "mixed_precision=no takes precedence over accelerate's fp16"),
    ],
)
def test_precision_of_accelerate_holds_unless_ours_is_given(monkeypatch, tmp_path, capsys, setting, flags, taken, said):
    (tmp_path / "flags.yaml").write_text("mixed_precision: no")
    words = flags.format(file=tmp_path / "flags.yaml").split()
    assert under_accelerate(monkeypatch, *words, MIXED_PRECISION=setting).mixed_precision == taken
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.endswith(said)
    assert ("accelerate" in said) == ("accelerate" in printed)
    monkeypatch.setenv("RANK", "1")
    under_accelerate(monkeypatch, *words)
    assert capsys.readouterr().out == ""


def test_sampling_takes_the_precision_of_accelerate(monkeypatch):
    assert under_accelerate(monkeypatch, script="generate", MIXED_PRECISION="bf16").mixed_precision == "bf16"
    assert under_accelerate(monkeypatch, "--mixed-precision=no", script="generate").mixed_precision == "no"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MIXED_PRECISION", "fp8", "accelerate launch: argument --mixed-precision: invalid choice: 'fp8'"),
        ("USE_FSDP", "true", "accelerate's FSDP is not supported: every process holds all weights"),
        ("USE_DEEPSPEED", "true", "accelerate's DEEPSPEED is not supported"),
        ("USE_MEGATRON_LM", "true", "accelerate's MEGATRON_LM is not supported"),
        ("USE_PARALLELISM_CONFIG", "True", "accelerate's PARALLELISM_CONFIG is not supported"),
    ],
)
def test_what_accelerate_cannot_have_is_one_line(monkeypatch, tmp_path, name, value, message):
    (tmp_path / "flags.yaml").write_text("seed: 1")
    for flags in ((), ("--config", str(tmp_path / "flags.yaml"))):
        with pytest.raises(UserError, match=f"^{message}"):
            under_accelerate(monkeypatch, *flags, **{name: value})
    monkeypatch.setenv(f"ACCELERATE_{name}", "false" if name.startswith("USE") else "NO")
    under_accelerate(monkeypatch)


class OneProcess:
    """The parts of a Run that `build` uses."""

    device, directory = torch.device("cpu"), Path("exps/x")
    print = log = staticmethod(lambda text: None)

    def prepare(self, module):
        return module


@pytest.fixture(scope="module")
def built(good):
    """Joint nets built from unusual flags, with those flags."""
    flags = f"""--exp-name x --resolution 32 --vae f4d4-tiny --vae-ckpt {good["vae"]} --model SiT-XXS/2
        --encoder-depth 3 --num-classes 7 --enc-type efficientnet-lite0 --bn-momentum 0.3 --cfg-prob 0.2
        --path-type cosine --weighting lognormal --proj-coeff 0.7 --vae-align-proj-coeff 2.5 --ema-decay 0.5
        --learning-rate 1e-3 --vae-learning-rate 2e-3 --disc-learning-rate 3e-3 --adam-beta1 0.8 --adam-beta2 0.95
        --adam-weight-decay 0.1 --adam-epsilon 1e-6 --max-grad-norm 2 --mixed-precision fp16
        --gradient-accumulation-steps 3 --disc-warmup-steps 5 --lpips-vgg-ckpt {good["vgg"]}"""
    args = train_repae.parse_args(flags.split())
    return args, train_repae.build(args, OneProcess(), open_vae(args.vae, args.vae_ckpt, offline=True))


def test_flags_reach_the_networks_and_the_optimisers(built):
    args, nets = built
    for network in (nets.sit, nets.ema):
        for found, expected in zip(network.latent_statistics(), published.STATISTICS.values(), strict=True):
            torch.testing.assert_close(found.flatten(), expected)
    assert (nets.sit.encoder_depth, nets.sit.null_label, nets.sit.bn.momentum) == (3, 7, 0.3)
    for optimizer, rate in ((nets.opt_sit, 1e-3), (nets.opt_vae, 2e-3), (nets.opt_disc, 3e-3)):
        group = optimizer.adamw.param_groups[0]
        assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (rate, (0.8, 0.95), 0.1, 1e-6)
        assert (optimizer.max_grad_norm, optimizer.accumulation_steps) == (2, 3)
        assert optimizer.scaler.is_enabled()
    trained = sum(p.numel() for name, p in nets.sit.named_parameters() if name != "pos_embed")
    assert sum(p.numel() for p in nets.opt_sit.parameters) == trained


def test_flags_reach_the_step_and_the_draws(built):
    args, _ = built
    cfg = train_repae.step_config(args, torch.device("cpu"))
    numbers = (cfg.path_type, cfg.proj_coeff, cfg.vae_align_proj_coeff, cfg.ema_decay, cfg.loss.kl_weight)
    assert (*numbers, cfg.disc_warmup_steps) == ("cosine", 0.7, 2.5, 0.5, 1e-6, 5)
    with cfg.autocast():
        assert torch.get_autocast_dtype("cpu") == torch.float16
    rows = Rows(1, args.batch_size)
    draws = transformer_draws(args, (4, 8, 8), 4, rows)
    expected = step_draws(args.seed, 4, rows, (4, 8, 8), "lognormal", "cosine", 0.2)
    assert all(torch.equal(a, b) for a, b in zip(draws, expected, strict=True))
    assert not torch.equal(draws.noise, transformer_draws(args, (4, 8, 8), 5, rows).noise)


@pytest.mark.parametrize(
    ("flags", "step", "factor", "warned"),
    [("", 0, 1.0, True), ("--disc-warmup-steps 9", 0, 1.0, False), ("", 3, 1.0, False), ("", 0, 0.0, False)],
)
def test_an_untrained_discriminator_is_warned_of(flags, step, factor, warned):
    args, said = train_repae.parse_args(["--exp-name", "x", *flags.split()]), []
    run = argparse.Namespace(step=step, print=said.append)
    warn_of_untrained_discriminator(args, run, VAELossConfig(discriminator_factor=factor))
    assert bool(said) == warned
    assert all(line.startswith("warning: ") and "--disc-warmup-steps" in line for line in said)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("losses: {kl_wieght: 1}", "Did you mean: 'kl_weight'?"),
        ("losses: {kl_weight: much}", "losses.kl_weight: Value 'much'"),
    ],
)
def test_loss_yaml_errors(tmp_path, text, message):
    (tmp_path / "loss.yaml").write_text(text)
    with pytest.raises(UserError, match="--loss-cfg-path .*loss.yaml") as error:
        config.load_loss_config(str(tmp_path / "loss.yaml"))
    assert message in str(error.value)
