"""The whole method on 4500 real photographs of 32 pixels, in minutes on two CPU cores: `make demo`.

Runs the real scripts by their real command lines, one after the other. Each continues where it stopped, so an
interrupted demo goes on when it is started again. The pictures end up in exps/demo/.
"""

import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from demo.pictures import draw_overview, draw_reconstructions, plot_curves  # noqa: E402
from training.checkpoint import read_checkpoint  # noqa: E402

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "exps" / "demo"


def cpu_has_bfloat16() -> bool:
    """Whether the CPU computes in bfloat16; without, it is slower than float32 instead of twice as fast."""
    try:
        return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(Path("/proc/cpuinfo").read_text().split()))
    except OSError:
        return False


def stages() -> dict[str, str]:
    """Title -> command line of every stage, sized for ten minutes on two cores; shorter runs where all is float32."""
    precision, vae_steps, joint_steps = ("bf16", 320, 220) if cpu_has_bfloat16() else ("no", 200, 120)
    common = f"""--output-dir exps --data-dir data-demo/train --resolution 32 --batch-size 32 --num-workers 1
        --report-to none --mixed-precision {precision} --vae f4d4-small --loss-cfg-path demo/loss.yaml
        --lpips-vgg-ckpt pretrained/demo/vgg16-features.pt"""
    return {
        "photographs: sheets in the repository -> a folder a class": "demo/cifar10.py unpack data-demo/cifar10",
        "LPIPS: VGG16's convolutions in torchvision's keys": "demo/convert_lpips.py pretrained/demo/vgg16-features.pt",
        "preprocessing, training images": """preprocessing.py --imagenet-path data-demo/cifar10/train
            --output-path data-demo/train --resolution 32 --num-workers 2""",
        "preprocessing, held-out images": """preprocessing.py --imagenet-path data-demo/cifar10/test
            --output-path data-demo/test --resolution 32 --num-workers 2""",
        "VAE and discriminator from scratch": f"""train_vae.py --exp-name demo-vae {common}
            --vae-learning-rate 1e-3 --max-train-steps {vae_steps} --sampling-steps {vae_steps // 2}
            --checkpointing-steps 100""",
        "REPA-E: VAE and transformer, jointly": f"""train_repae.py --exp-name demo-joint {common}
            --vae-ckpt exps/demo-vae/demo-vae.pt
            --disc-pretrained-ckpt exps/demo-vae/demo-vae-discriminator-ckpt.pt
            --model SiT-XS/1 --num-classes 10 --enc-type efficientnet-lite0 --encoder-depth 3
            --learning-rate 5e-4 --vae-learning-rate 3e-4 --ema-decay 0.98
            --max-train-steps {joint_steps} --sampling-steps {joint_steps // 2} --checkpointing-steps 50""",
    }


def run_stage(title: str, line: str) -> None:
    """Run one script, showing its command line; stop the demo with its exit code if it fails."""
    arguments = shlex.split(line)
    print(f"\n== {title}\n$ python {shlex.join(arguments)}", flush=True)
    started = time.monotonic()
    script = subprocess.Popen([sys.executable, *arguments], cwd=ROOT)
    # the terminal sends Ctrl-C to the script as well, which saves its work and exits
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = script.wait()
    signal.signal(signal.SIGINT, previous)
    if code:
        print(f"stopped: {arguments[0]} exited with {code}; `make demo` continues from here", file=sys.stderr)
        sys.exit(code)
    print(f"-- {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    """All stages, then the pictures."""
    started = time.monotonic()
    for title, line in stages().items():
        run_stage(title, line)
    PICTURES.mkdir(parents=True, exist_ok=True)
    alone, joint = ROOT / "exps/demo-vae", ROOT / "exps/demo-joint"
    plot_curves({"VAE alone": alone / "metrics.jsonl", "joint": joint / "metrics.jsonl"}, PICTURES / "curves.png")
    shutil.copyfile(max((joint / "samples").glob("*.png")), PICTURES / "samples.png")
    vaes = [read_checkpoint(max((run / "checkpoints").glob("*.pt")))["vae"] for run in (alone, joint)]
    draw_reconstructions(vaes, ROOT / "data-demo/test", PICTURES / "reconstructions.png")
    draw_overview(PICTURES)
    print(f"\ndone in {(time.monotonic() - started) / 60:.1f} minutes; look at")
    for path in sorted(PICTURES.glob("*.png")):
        print(f"  {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
