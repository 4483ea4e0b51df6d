"""What a training run would take, printed before it is begun: --dry-run.

Everything has been built and checked as for training. What a step computes and keeps is counted on copies of its
networks that have no values (training/estimates.py); what goes to the disk follows from the flags.
"""

import json
from collections.abc import Callable

from torch import nn

from diffusion.previews import PADDING, SAMPLES
from models.encoder_table import encoder_specs
from storage.files import free_space
from training.distributed import unwrap
from training.estimates import (
    MOMENTS,
    SUSTAINED,
    Cost,
    amount,
    bytes_of,
    checkpoint_bytes,
    count_step,
    seconds,
    trained_parameters,
)
from training.loop import Batch, Run
from training.randomness import Rows
from training.transformer_step import TransformerNets
from training.vae_step import VAENets
from weights.checkpoint_io import BEST_CHECKPOINT, checkpoint_path

TRAINED = {"vae": "VAE", "discriminator": "discriminator", "sit": "transformer"}
FROZEN = {"ema": "average", "lpips": "LPIPS"}


def dry_run(run: Run, data, step: Callable, nets, cfg, frozen: dict[str, nn.Module] | None = None) -> None:
    """Print sizes, operations, memory and disk of a run that has begun, and end it.

    Args:
        run: what its steps would be counted by.
        data: what its steps would read.
        step: called as step(nets, batch, draws, cfg), on copies of `nets`.
        nets: the step's networks.
        cfg: the step's numbers.
        frozen: further networks on the device, by name.
    """
    from torch.utils.data import default_collate

    pixels, labels, moments, tokens = run.on_device(default_collate([data[0]]))
    example = Batch(pixels, labels, 0, Rows(0, 1), moments, tokens)
    run.end()  # the first process counts, and must not wait for the others
    if not run.is_main:
        return
    latent, last = latent_of(nets, run.args.resolution), max(run.last_step(data), run.step)
    cost = count_step(step, nets, cfg, example, run.micro_batch, latent, run.args.mixed_precision)
    trained = {title: unwrap(getattr(nets, name)) for name, title in TRAINED.items() if hasattr(nets, name)}
    kept = {title: getattr(nets, name) for name, title in FROZEN.items() if hasattr(nets, name)}
    encoders = encoder_specs(getattr(run.args, "enc_type", "none"))  # of which none is there if tokens are cached
    kept |= dict(zip(encoders, getattr(nets, "encoders", []), strict=False)) | (frozen or {})
    parts = {
        "sizes": {"data": f"{len(data):,} images, {data.num_classes:,} classes"} | sizes(run, latent, trained, kept),
        "steps": steps(run, last, len(data)),
        "computation, counted": computation(run, last, cost),
        "memory of a process, estimated": memory(run, trained, kept, cost),
        f"disk at {run.directory}, estimated": disk(run, last, nets, trained, cost),
    }
    run.print("dry run: nothing was written, and no step was taken")
    for title, lines in parts.items():
        run.print("\n".join([title, *(f"    {name:<14}{text}" for name, text in lines.items())]))


def latent_of(nets, resolution: int) -> tuple[int, int, int]:
    """(C,h,w) of the latents that a step draws noise for."""
    if isinstance(nets, TransformerNets):
        sit = unwrap(nets.sit)
        return sit.in_channels, sit.input_size, sit.input_size
    config = unwrap(nets.vae).config
    side = resolution // config.downsampling
    return config.z_channels, side, side


def parameters(networks: dict[str, nn.Module]) -> str:
    """How many parameters each network has."""
    counts = {name: sum(parameter.numel() for parameter in module.parameters()) for name, module in networks.items()}
    return ", ".join(f"{name} {amount(count, '').strip()}" for name, count in counts.items()) + " parameters"


def sizes(run: Run, latent: tuple[int, int, int], trained: dict, kept: dict) -> dict[str, str]:
    """Shapes and networks."""
    grid = trained["transformer"].grid if "transformer" in trained else None
    return {
        "resolution": f"{run.args.resolution} px",
        "latents": "x".join(map(str, latent)) + (f", {grid**2} tokens" if grid else ""),
        "trained": parameters(trained),
        "frozen": parameters(kept),
    }


def steps(run: Run, last: int, images: int) -> dict[str, str]:
    """How long training is, and how images are shared."""
    args, seen = run.args, last * run.args.batch_size
    found = {
        "micro-batch": f"{run.micro_batch} images = {args.batch_size} / {run.world} processes / "
        f"{args.gradient_accumulation_steps} accumulation steps",
        "in all": f"{last:,} steps, {seen / images:,.1f} epochs, {seen:,} images",
    }
    start = f"after step {run.step:,} of a checkpoint" if run.step else "from the beginning: there is no checkpoint"
    return found | {"to do": f"{last - run.step:,} steps {start}"}


def computation(run: Run, last: int, cost: Cost) -> dict[str, str]:
    """Operations of an image, of a step and of all that are left; multiply and add are two."""
    image = sum(cost.flops.values())
    batch = image * run.args.batch_size
    whole = batch * (last - run.step)
    parts = ", ".join(f"{name} {amount(flops, 'FLOP')}" for name, flops in cost.flops.items())
    time, rate = seconds(whole / run.world / SUSTAINED), amount(SUSTAINED, "FLOP/s")
    return {
        "an image": f"{amount(image, 'FLOP')} = {parts}",
        "a step": amount(batch, "FLOP"),
        "all to do": f"{amount(whole, 'FLOP')}: {time} if each process sustained {rate} (arithmetic)",
    }


def memory(run: Run, trained: dict[str, nn.Module], kept: dict[str, nn.Module], cost: Cost) -> dict[str, str]:
    """Bytes on a process's device at the moment when they are most."""
    count = sum(map(trained_parameters, trained.values()))
    found = {
        "weights": sum(map(module_bytes, trained.values())),
        "gradients": 4 * count * (2 if run.world > 1 else 1),  # and copies of them, in the buckets that are sent
        "optimisers": MOMENTS * count,
        "frozen": sum(map(module_bytes, kept.values())),
        "activations": cost.activations,
    }
    how = "with" if run.args.gradient_checkpointing else "without"
    precision = f"precision {run.args.mixed_precision}, {how} --gradient-checkpointing, not compiled"
    lines = {name: amount(size) for name, size in found.items()}
    lines["activations"] += f" of {run.micro_batch} images, {precision}"
    return lines | {"in all": f"{amount(sum(found.values()))}, and what libraries, pictures and --eval-steps need"}


def module_bytes(module: nn.Module) -> int:
    """Bytes of a network's parameters and buffers."""
    return bytes_of((*module.parameters(), *module.buffers()))


def disk(run: Run, last: int, nets, trained: dict[str, nn.Module], cost: Cost) -> dict[str, str]:
    """Bytes that the run will write at most, and those that are free."""
    size = checkpoint_bytes(run.state.networks.values(), trained.values())
    permanent, others = checkpoints_to_come(run, last)
    stored, log = (permanent + others) * size, log_bytes(run, last, nets, cost)
    pictures, free = picture_bytes(run, last, nets), free_space(run.directory)
    needed = stored + log + pictures
    lines = {
        "a checkpoint": amount(size),
        "checkpoints": f"{amount(stored)}: {permanent} that stay, and up to {others} by time, by signals or the best",
        "log, pictures": f"{amount(log)}, up to {amount(pictures)}",
        "in all": f"{amount(needed)} to be written, {amount(free)} free",
    }
    if needed > free:
        lines["warning:"] = "it will not fit; free some, write elsewhere, or take a larger --checkpointing-steps"
    return lines


def checkpoints_to_come(run: Run, last: int) -> tuple[int, int]:
    """How many checkpoints are still to be written that stay, and how many others there will be at most.

    Those are the newest by time or signals, and the best one of --eval-steps, but for those that are there already.
    """
    if run.step == last:
        return 0, 0
    interval, folder = run.args.checkpointing_steps, run.checkpoints
    permanent = last // interval - run.step // interval + (last % interval > 0)
    there = [step for step in folder.rolling() if checkpoint_path(folder.directory, step).is_file()]
    best = getattr(run.args, "eval_steps", 0) > 0 and not (folder.directory / BEST_CHECKPOINT).is_file()
    return permanent, max(run.args.keep_last - len(there), 0) + best


def log_bytes(run: Run, last: int, nets, cost: Cost) -> int:
    """Bytes of the lines of metrics.jsonl that are to come."""
    health = [name for key, value in vars(nets).items() if key.startswith("opt_") for name in value.health(key[4:])]
    drift = ["bn_mean_drift", "bn_std_drift"] if "bn_start" in run.state.tensors else []
    names = [*cost.metrics, *health, *drift, "images_per_second"]
    record = {"step": last, **dict.fromkeys(names, 0.12345678901234567)}
    return len(json.dumps(record) + "\n") * (last - run.step)


def picture_bytes(run: Run, last: int, nets) -> int:
    """Bytes of the pictures that are to come, uncompressed."""
    times = last // run.args.sampling_steps - run.step // run.args.sampling_steps
    kinds = isinstance(nets, TransformerNets) + isinstance(nets, VAENets)
    return times * kinds * 3 * SAMPLES * (run.args.resolution + PADDING) ** 2
