"""Sample a trained run from Python: its EMA transformer and its VAE, as generate.py loads them.

    python -m examples.sample exps/sit-repae samples.png --classes 207 360 387 974

writes one picture with a column for each class. If the VAE of a frozen-VAE run was moved, give its place by --vae-ckpt
FILE. Sample i depends on the seed and i alone, and equals sample i of generate.py with the same settings.
"""

from pathlib import Path

import torch
from PIL import Image

from diffusion.previews import grid
from diffusion.sampling import Sampling, check_finite, labels_with_images, sample_pixels
from errors import Parser, UserError, run_script
from weights.trained_run import load_experiment


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, with checkpoints/ and args.json")
    parser.add_argument("output", type=Path, help="the picture")
    parser.add_argument("--vae-ckpt", help="VAE weights of a frozen-VAE run, if they were moved")
    parser.add_argument("--classes", type=int, nargs="+", help="a column each (default: eight, evenly spaced)")
    parser.add_argument("--rows", type=int, default=4, help="samples of each class (default: 4)")
    parser.add_argument("--num-steps", type=int, default=50, help="Euler steps (default: 50)")
    parser.add_argument("--cfg-scale", type=float, default=2.5, help="1: no guidance (default: 2.5)")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = load_experiment(args.run, step=None, vae_ckpt=args.vae_ckpt)  # the latest checkpoint
    known = run.sit.num_classes
    trained = labels_with_images(run.class_counts, known)
    classes = args.classes or sorted({trained[i * len(trained) // 8] for i in range(8)})
    if not set(classes) <= set(range(known)):
        raise UserError(f"--classes {classes}: the run has classes 0 to {known - 1}")
    sampling = Sampling(
        path_type=run.flags["path_type"],
        num_steps=args.num_steps,
        cfg_scale=args.cfg_scale,
        guidance_high=0.75,
        classes=tuple(classes),
    )
    indices = list(range(args.rows * len(classes)))
    pixels, finite = sample_pixels(run.sit.to(device), run.vae.to(device), indices, sampling)  # (N,3,R,R) uint8
    check_finite(finite.cpu().numpy(), indices, sampling, known)
    picture = grid(pixels, columns=len(classes)).permute(1, 2, 0)
    Image.fromarray(picture.numpy()).save(args.output)
    print(f"{len(indices)} samples of {run.name} after {run.step} steps: {args.output}")


if __name__ == "__main__":
    run_script(main)
