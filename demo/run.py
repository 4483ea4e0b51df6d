"""The whole method on 4500 real photographs of 32 pixels, in minutes on two CPU cores: `make demo`.

Runs the scripts one after the other and writes exps/demo/report.html. Every script resumes, so an interrupted demo
continues when it is started again.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from demo.runner import ROOT, Record, Stage, cpu_description, run_stage

FOLDER = Path("exps/demo")
CLASSES, SAMPLES_A_CLASS = 10, 8
COMPARED = 200  # samples of each run without guidance, as many as demo/sets.py has of each kind
GUIDANCE = 2.5


class Plan(NamedTuple):
    """Precision and lengths of the demo's runs."""

    precision: str
    vae_steps: int
    joint_steps: int
    frozen_steps: int


def make_plan(steps: int | None) -> Plan:
    """The plan for so many joint steps, by default for a quarter of an hour: fewer steps where all is float32.

    Without instructions for bfloat16, a CPU computes it more slowly than float32 instead of twice as fast.
    """
    has_bfloat16 = {"avx512_bf16", "amx_bf16", "bf16"} & set(cpu_description().split())
    precision, default = ("bf16", 220) if has_bfloat16 else ("no", 110)
    steps = steps or default
    return Plan(precision, round(1.5 * steps), steps, 3 * steps)


def stages(plan: Plan) -> list[Stage]:
    """Every stage in order."""
    data = "--data-dir data-demo/train --resolution 32 --batch-size 32 --num-workers 1"
    run = f"--output-dir {FOLDER} --report-to none --mixed-precision {plan.precision} --checkpointing-steps 50"
    vae_loss = "--loss-cfg-path demo/loss.yaml --lpips-vgg-ckpt pretrained/demo/vgg16-features.pt"
    transformer = "--model SiT-XS/1 --enc-type efficientnet-lite0 --encoder-depth 3 --learning-rate 5e-4"
    sampling = f"""--sample-dir {FOLDER}/samples --labels balanced --pproc-batch-size 40 --num-steps 50
        --mixed-precision {plan.precision} --no-png"""
    comparing = f"""--reference {FOLDER}/sets/train-statistics.npz --features efficientnet-lite0 --num-workers 1"""
    tuned = f"{FOLDER}/e2e-vae/e2e-vae.pt"
    return [
        Stage("unpack", "Photographs: a folder a class", "demo/cifar10.py data-demo/cifar10"),
        Stage("lpips", "LPIPS weights", "demo/convert_lpips.py pretrained/demo/vgg16-features.pt"),
        *(
            Stage(
                f"preprocess-{split}",
                f"Preprocess {what} images",
                f"""preprocessing.py --imagenet-path data-demo/cifar10/{split} --output-path data-demo/{split}
                    --resolution 32 --num-workers 2""",
            )
            for split, what in (("train", "training"), ("test", "held-out"))
        ),
        Stage(
            "vae",
            "Train a VAE from scratch",
            f"""train_vae.py --exp-name vae {run} {data} --vae f4d4-small {vae_loss} --vae-learning-rate 1e-3
                --max-train-steps {plan.vae_steps}""",
        ),
        Stage(
            "joint",
            "REPA-E: train VAE and transformer jointly",
            f"""train_repae.py --exp-name joint {run} {data} --vae f4d4-small --vae-ckpt {FOLDER}/vae/vae.pt
                --disc-pretrained-ckpt {FOLDER}/vae/vae-discriminator-ckpt.pt {vae_loss} {transformer}
                --vae-learning-rate 3e-4 --ema-decay 0.98
                --max-train-steps {plan.joint_steps}""",
        ),
        Stage(
            "extract",
            "Extract the tuned VAE",
            f"""save_vae_weights.py --repae-ckpt {FOLDER}/joint/checkpoints/{plan.joint_steps:07d}.pt
                --vae-name e2e-vae --save-dir {FOLDER}""",
        ),
        Stage(
            "cache",
            "Cache its latents",
            f"""cache_latents.py --vae-arch f4d4-small --vae-ckpt-path {tuned} --vae-latents-name e2e-vae
                --data-dir data-demo/train --output-dir data-demo/train --num-workers 1 --mirrored""",
        ),
        Stage(
            "frozen",
            "Train a transformer on the frozen tuned VAE",
            f"""train_ldm_only.py --exp-name frozen {run} {data} --vae f4d4-small --vae-ckpt {tuned}
                --vae-latents-name e2e-vae {transformer} --ema-decay 0.99
                --max-train-steps {plan.frozen_steps}""",
        ),
        *(
            Stage(
                f"samples-{name}-{scale}",
                f"Sample the {name} run, {'with' if scale > 1 else 'without'} guidance",
                f"""generate.py --exp-path {FOLDER}/{name} --train-steps {steps} --cfg-scale {scale} {sampling}
                    --num-fid-samples {CLASSES * SAMPLES_A_CLASS if scale > 1 else COMPARED}""",
            )
            for name, steps in (("joint", plan.joint_steps), ("frozen", plan.frozen_steps))
            for scale in (1.0, GUIDANCE)
        ),
        Stage("sets", "Held-out photographs, and noise", f"demo/sets.py data-demo/test {FOLDER}/sets"),
        Stage(
            "statistics",
            "Features of the training photographs",
            f"""evaluate.py --reference data-demo/cifar10/train --features efficientnet-lite0 --num-workers 1
                --save-stats {FOLDER}/sets/train-statistics.npz""",
        ),
        *(
            Stage(
                f"distance-{name}",
                f"Fréchet distance of {title}",
                f"evaluate.py --samples {path} {comparing} --output {FOLDER}/sets/{name}.json",
            )
            for name, (title, path) in compared_sets(plan).items()
        ),
    ]


def compared_sets(plan: Plan) -> dict[str, tuple[str, Path]]:
    """Sets of images whose distance to the training photographs is measured: name -> (title, npz)."""
    unguided = "cfg1.0-0.0-1.0.npz"
    return {
        "held-out": ("held-out photographs", FOLDER / "sets/held-out.npz"),
        "joint": ("samples of the joint run", FOLDER / f"samples/joint_{plan.joint_steps:07d}_{unguided}"),
        "frozen": ("samples on the frozen VAE", FOLDER / f"samples/frozen_{plan.frozen_steps:07d}_{unguided}"),
        "noise": ("noise", FOLDER / "sets/noise.npz"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="of the joint run; other runs are in proportion")
    steps = parser.parse_args().steps
    if steps is not None and steps < 10:
        sys.exit(f"error: STEPS={steps} is too small, expected at least 10")
    plan = make_plan(steps)
    record = Record(ROOT / FOLDER / "stages.json", plan._asdict())
    for stage in stages(plan):
        run_stage(stage, record, again="make demo")

    from demo.report import write_report

    write_report(ROOT, ROOT / FOLDER, record.content)
    minutes = sum(entry["seconds"] for entry in record.content["stages"].values()) / 60
    print(f"\ndone, {minutes:.1f} minutes in all; open {FOLDER / 'report.html'}")


if __name__ == "__main__":
    main()
