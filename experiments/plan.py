"""The arms of the study and the command lines of their stages."""

from pathlib import Path
from typing import NamedTuple

from demo.runner import Stage

ENCODER = "efficientnet-lite0"
VAE_ARCH = "f4d4-small"
FEATURES = f"{ENCODER},vgg16"
REPAE = "repae"
NEVER = 10**9  # pictures of a run, because the study draws its own


class Settings(NamedTuple):
    """Sizes that all arms share."""

    steps: int
    vae_steps: int
    batch: int
    samples: int
    sampling_steps: int


class Arm(NamedTuple):
    """How a transformer is trained: jointly with the VAE, or on a frozen one."""

    title: str
    joint: bool
    flags: str
    tuned_by: str = ""  # the joint arm whose VAE it takes, instead of the one that all start from


ALIGNED = f"--enc-type {ENCODER} --encoder-depth 3"
NONE = "--enc-type none --encoder-depth 3"
MAIN_ARMS = {
    "diffusion": Arm("diffusion alone, frozen VAE", False, NONE),
    "repa": Arm("REPA, frozen VAE", False, ALIGNED),
    REPAE: Arm("REPA-E, joint", True, ALIGNED),
    "naive": Arm("naive end-to-end", True, f"{NONE} --vae-diffusion-coeff 1"),
    "tuned": Arm("REPA, frozen VAE that REPA-E tuned", False, ALIGNED, tuned_by=REPAE),
}
ABLATIONS = {
    "fixed-normaliser": Arm("running statistics not updated", True, f"{ALIGNED} --bn-momentum 0"),
    "align-0": Arm("alignment of the VAE 0", True, f"{ALIGNED} --vae-align-proj-coeff 0"),
    "tuned-align-0": Arm("REPA, frozen VAE tuned with alignment 0", False, ALIGNED, tuned_by="align-0"),
    "align-0.5": Arm("alignment of the VAE 0.5", True, f"{ALIGNED} --vae-align-proj-coeff 0.5"),
    "align-5": Arm("alignment of the VAE 5", True, f"{ALIGNED} --vae-align-proj-coeff 5"),
    "depth-1": Arm("alignment at block 1", True, f"--enc-type {ENCODER} --encoder-depth 1"),
    "depth-6": Arm("alignment at block 6", True, f"--enc-type {ENCODER} --encoder-depth 6"),
    "random-encoder": Arm("untrained encoder", True, f"{ALIGNED} --enc-ckpt {ENCODER}={{data}}/random-encoder.pth"),
}
ARMS = MAIN_ARMS | ABLATIONS


def data_stages(photographs: Path, data: Path) -> list[Stage]:
    """What all seeds share: photographs, networks, and the statistics of all training photographs."""
    return [
        Stage("fetch", "Fetch CIFAR-10", f"demo/fetch_cifar10.py {photographs}"),
        Stage("lpips", "VGG16's convolutions", f"demo/convert_lpips.py {data}/vgg16.pt"),
        Stage("random", "An untrained encoder", f"-m experiments.random_encoder {data}/random-encoder.pth"),
        *(
            Stage(
                f"preprocess-{split}",
                f"Preprocess the {split} photographs",
                f"""preprocessing.py --imagenet-path {photographs}/{split} --output-path {data}/{split} --resolution 32
                    --num-workers 2""",
            )
            for split in ("train", "held-out")
        ),
        Stage(
            "statistics",
            "Features of all training photographs",
            f"""evaluate.py --reference {photographs}/train {feature_flags(data)} --metrics fid,kid
                --save-stats {data}/statistics.npz""",
        ),
    ]


def vae_stages(settings: Settings, seed: int, data: Path, folder: Path) -> list[Stage]:
    """The VAE that all arms of a seed start from, its latents and its reconstructions."""
    train = f"""train_vae.py --exp-name vae {run_flags(settings.vae_steps, settings, seed, data, folder)}
        {vae_loss_flags(data)} --vae-learning-rate 1e-3"""
    return [
        Stage(f"{folder.name}/vae", f"Train a VAE, seed {seed}", train),
        cache_stage(folder / "vae/vae.pt", seed, data, folder),
        reconstruction_stage("vae", folder / "vae/vae.pt", data, folder),
    ]


def arm_stages(name: str, settings: Settings, seed: int, data: Path, folder: Path) -> list[Stage]:
    """Training, samples and metrics of an arm; of a joint one also its VAE."""
    arm, step = ARMS[name], settings.steps
    vae = tuned_vae(arm.tuned_by, folder) if arm.tuned_by else folder / "vae/vae.pt"
    script, latents = "train_ldm_only.py", f"--vae-latents-name {vae.stem}-{seed}"
    if arm.joint:
        script = "train_repae.py"
        latents = f"""{vae_loss_flags(data)} --vae-learning-rate 3e-4
            --disc-pretrained-ckpt {folder}/vae/vae-discriminator-ckpt.pt"""
    stages = [
        Stage(
            f"{folder.name}/{name}",
            f"{arm.title}, seed {seed}",
            f"""{script} --exp-name {name} {run_flags(step, settings, seed, data, folder)} --vae-ckpt {vae}
                {arm.flags.format(data=data)} {latents} --model SiT-XS/1 --learning-rate 5e-4 --ema-decay 0.99""",
        ),
        Stage(
            f"{folder.name}/{name}-samples",
            f"{settings.samples} samples",
            f"""generate.py --exp-path {folder}/{name} --train-steps {step} --cfg-scale 1 --labels balanced --no-png
                --num-fid-samples {settings.samples} --num-steps {settings.sampling_steps} --mixed-precision bf16
                --sample-dir {folder}/samples --pproc-batch-size 250""",
        ),
        Stage(
            f"{folder.name}/{name}-metrics",
            "Their distances from the training photographs",
            f"""evaluate.py --samples {samples_file(name, settings, folder)} --reference {data}/statistics.npz
                {feature_flags(data)} --metrics fid,kid --output {folder}/{name}-samples.json""",
        ),
    ]
    if arm.joint:
        stages += [
            Stage(
                f"{folder.name}/{name}-vae",
                "Extract the VAE",
                f"""save_vae_weights.py --repae-ckpt {folder}/{name}/checkpoints/{step:07d}.pt --vae-name {name}-vae
                    --save-dir {folder}""",
            ),
            reconstruction_stage(name, tuned_vae(name, folder), data, folder),
        ]
    return [cache_stage(vae, seed, data, folder), *stages] if arm.tuned_by else stages


def tuned_vae(name: str, folder: Path) -> Path:
    """Where a joint arm's VAE is extracted to."""
    return folder / f"{name}-vae/{name}-vae.pt"


def samples_file(name: str, settings: Settings, folder: Path) -> Path:
    return folder / f"samples/{name}_{settings.steps:07d}_cfg1.0-0.0-1.0.npz"


def run_flags(steps: int, settings: Settings, seed: int, data: Path, folder: Path) -> str:
    """Flags of every training run."""
    return f"""--output-dir {folder} --report-to none --seed {seed} --mixed-precision bf16 --checkpointing-steps {steps}
        --checkpointing-minutes 5 --max-train-steps {steps} --sampling-steps {NEVER} --data-dir {data}/train
        --resolution 32 --batch-size {settings.batch} --num-workers 1 --vae {VAE_ARCH}"""


def vae_loss_flags(data: Path) -> str:
    return f"--loss-cfg-path demo/loss.yaml --lpips-vgg-ckpt {data}/vgg16.pt"


def feature_flags(data: Path) -> str:
    return f"--features {FEATURES} --enc-ckpt vgg16={data}/vgg16.pt --mixed-precision bf16 --num-workers 1"


def cache_stage(vae: Path, seed: int, data: Path, folder: Path) -> Stage:
    line = f"""cache_latents.py --vae-arch {VAE_ARCH} --vae-ckpt-path {vae} --vae-latents-name {vae.stem}-{seed}
        --data-dir {data}/train --output-dir {data}/train --num-workers 1"""
    return Stage(f"{folder.name}/{vae.stem}-latents", "Cache latents", line)


def reconstruction_stage(name: str, vae: Path, data: Path, folder: Path) -> Stage:
    line = f"""evaluate.py --vae {vae} --vae-arch {VAE_ARCH} --data-dir {data}/held-out {feature_flags(data)}
        --lpips-vgg-ckpt {data}/vgg16.pt --output {folder}/{name}-vae.json"""
    return Stage(f"{folder.name}/{name}-reconstructions", "Reconstructions of held-out photographs", line)
