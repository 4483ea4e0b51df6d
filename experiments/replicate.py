"""The claims of REPA-E (Leng et al., arXiv 2504.10483), measured on CIFAR-10 with this code.

    python -m experiments.replicate --data-dir data-demo/cifar10-whole --output-dir exps/replication

trains every arm of experiments/plan.py from each seed by the scripts' command lines, and writes replication.md, its
pictures and replication.json to --page-dir; docs/ is the published page. It continues where it was stopped. Seeds may
be measured in parts, also on several machines: the results that --page-dir already has are kept. All arms of a seed
need the same --output-dir, because they start from the VAE that is trained there.
"""

from pathlib import Path

from demo.runner import Record, run_stage
from errors import Parser, run_script
from experiments.page import add_results, draw_pictures, open_page, write_page
from experiments.plan import (
    ABLATIONS,
    ARMS,
    MAIN_ARMS,
    REPAE,
    Settings,
    arm_stages,
    data_stages,
    vae_stages,
)
from flags.types import COUNT, POSITIVE, number, one_of

SAMPLING_STEPS = 25


def parse_args(argv: list[str] | None = None):
    parser = Parser(__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="where demo/fetch_cifar10.py puts the photographs")
    parser.add_argument("--output-dir", type=Path, required=True, help="where runs are kept")
    page = "where the page is written, and results of other seeds are kept (default: --output-dir)"
    parser.add_argument("--page-dir", type=Path, help=page)
    parser.add_argument("--seeds", type=POSITIVE, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--first-seed", type=COUNT, default=0, help="(default: %(default)s)")
    about_steps = "of every arm; the VAE trains for 1.2 times as many (default: %(default)s)"
    parser.add_argument("--steps", type=POSITIVE, default=600, help=about_steps)
    parser.add_argument("--batch-size", type=POSITIVE, default=32, help="of every arm (default: %(default)s)")
    parser.add_argument("--samples", type=number(int, at_least=2), default=5000, help="of every arm (default: 5000)")
    arms = f"joined by commas, of {', '.join(ARMS)}, or main or ablations (default: %(default)s)"
    parser.add_argument("--arms", type=arm_list, default="main,ablations", help=arms)
    return parser.parse_args(argv)


def arm_list(text: str) -> list[str]:
    """An argparse type: names of arms in the order of `ARMS`, with those that they stand on and are compared with."""
    groups = {"main": list(MAIN_ARMS), "ablations": list(ABLATIONS)}
    check = one_of("arm", {**ARMS, **groups})
    named = {arm for name in text.split(",") for arm in groups.get(check(name), [name])}
    named |= {ARMS[name].tuned_by for name in named}
    named |= {REPAE if ARMS[name].joint else "repa" for name in named & ABLATIONS.keys()}
    return [name for name in ARMS if name in named]


def main() -> None:
    args = parse_args()
    settings = Settings(args.steps, round(1.2 * args.steps), args.batch_size, args.samples, SAMPLING_STEPS)
    page_dir, data = args.page_dir or args.output_dir, args.output_dir / "data"
    for folder in (data, page_dir):
        folder.mkdir(parents=True, exist_ok=True)
    record = Record(args.output_dir / "stages.json", settings._asdict())
    open_page(page_dir, settings)  # refuses other settings before hours of work

    def run(stages: list) -> None:
        for stage in stages:
            if not record.is_done(stage):
                run_stage(stage, record, again="python -m experiments.replicate ...")

    run(data_stages(args.data_dir, data))
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        folder = args.output_dir / f"seed-{seed}"
        folder.mkdir(exist_ok=True)
        run(vae_stages(settings, seed, data, folder))
        for name in args.arms:
            run(arm_stages(name, settings, seed, data, folder))
        done = [name for name in ARMS if all(map(record.is_done, arm_stages(name, settings, seed, data, folder)))]
        content = open_page(page_dir, settings)  # now, because another machine may have added results meanwhile
        add_results(content, record, settings, seed, folder, done)
        write_page(content, page_dir)
        if MAIN_ARMS.keys() <= set(done):
            draw_pictures(settings, args.output_dir, seed, page_dir)


if __name__ == "__main__":
    run_script(main)
