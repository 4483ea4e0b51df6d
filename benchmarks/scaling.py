"""What training costs on 1 to 512 GPUs and 1.3 M to 1 B images: the formulas, and what of them a CPU can check.

    python -m benchmarks.scaling                # measures data sets, two processes and a checkpoint beside the formulas
    python -m benchmarks.scaling --tables       # the tables of docs/scaling.md

Operations are counted by flops.py. Times on GPUs and networks are arithmetic: operations or bytes over a rate.
"""

import argparse
import functools
import json
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.flops import CONFIG, build_batch, build_nets, stage_flops
from dataset import FIELDS, IMAGE_FORMAT, ImageDataset, images_directory
from errors import Parser, run_script
from models.numerics import GlobalBatchNorm2d
from preprocessing import SHARD_IMAGES
from storage.shards import read_index, shard_name, write_shard
from train_repae import JointNets, repae_step
from training.distributed import all_reduce_max, differing_tensor, host_group, mean_over_processes, unwrap
from training.estimates import SUSTAINED, amount, checkpoint_bytes, seconds, trained_parameters
from training.optimizer import Optimizer
from training.randomness import BatchOrder
from training.state import TrainingState

IMAGES_A_GPU = 32
GPUS = (1, 8, 64, 512)
# bytes a second that a GPU sends while it receives as many
LINKS = {"NVLink": 450e9, "InfiniBand": 50e9, "Ethernet": 12.5e9}
SET_SIZES = {"1.28 M": 1_281_167, "14 M": 14_000_000, "100 M": 100_000_000, "1 B": 1_000_000_000}
# bytes an image
PIXELS, LATENTS, TOKENS = 3 * 256 * 256, {"f8d4": 2 * 4 * 32 * 32 * 4, "f16d32": 2 * 32 * 16 * 16 * 4}, 256 * 768 * 2
INDEX_BYTES = 59  # of index.json a shard
LOOK = 30e-6, 160e-6  # seconds for a shard of an index and its header: measured; with a delay of 1 ms an opening
READ_AT_ONCE = 256
TINY = {"vae": "f4d4-tiny", "model": "SiT-XXS/2", "enc_type": "efficientnet-lite0", "resolution": 32}


class ShardFormat(NamedTuple):
    """A kind of run: its networks' rows in the registries, and whether the VAE trains with the transformer."""

    name: str
    vae: str
    model: str
    joint: bool

    def image_bytes(self) -> int:
        """Bytes that are read for an image."""
        return PIXELS if self.joint else PIXELS + LATENTS[self.vae]


KINDS = (
    ShardFormat("joint, f8d4, SiT-XL/2", "f8d4", "SiT-XL/2", joint=True),
    ShardFormat("joint, f16d32, SiT-XL/1", "f16d32", "SiT-XL/1", joint=True),
    ShardFormat("frozen, f16d32, SiT-XL/1", "f16d32", "SiT-XL/1", joint=False),
)


@functools.cache
def untrained(vae: str, model: str) -> JointNets:
    """Networks without memory."""
    with torch.device("meta"):
        return build_nets(vae, model)


def trained(nets: JointNets, joint: bool) -> list[nn.Module]:
    """The networks that a run trains."""
    return [nets.sit, nets.vae, nets.discriminator] if joint else [nets.sit]


def gradient_bytes(nets: JointNets, joint: bool) -> int:
    """Bytes of the gradients that are averaged in a step: float32."""
    return 4 * sum(map(trained_parameters, trained(nets, joint)))


def sent_by_ring(size: int, processes: int) -> float:
    """Bytes that each process sends, and receives, when `size` bytes are summed around a ring."""
    return 2 * (processes - 1) / processes * size


def statistics_bytes(nets: JointNets, joint: bool) -> dict[str, int]:
    """Bytes of batch statistics that are summed over processes in a step.

    Every layer of the discriminator sums a mean and a variance in the forward pass and their gradients in the backward
    pass, for real images, reconstructions and the generator's term; the latent normaliser goes forward only.
    """
    if not joint:
        return {"discriminator": 0, "latents": 0, "logits": 0}
    layers = [m for m in unwrap(nets.discriminator).modules() if isinstance(m, GlobalBatchNorm2d)]
    return {
        "discriminator": 3 * 4 * 4 * sum(layer.num_features for layer in layers),
        "latents": 2 * 4 * unwrap(nets.sit).in_channels,
        "logits": 2 * 4,
    }


def comparison_bytes(state: TrainingState) -> int:
    """Bytes by which all processes' states are compared: a checksum and its complement a tensor."""
    networks = sum(len(network.state_dict()) for network in state.networks.values())
    moments = sum(3 * len(optimizer.parameters) + 2 for optimizer in state.optimizers.values())
    return 16 * (networks + moments + len(state.tensors))


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables() -> list[str]:
    """The tables of docs/scaling.md, in their order."""
    kinds, steps, fixed, reading = [], [], [], []
    for kind in KINDS:
        nets = untrained(kind.vae, kind.model)
        flops = stage_flops(kind.vae, kind.model)["joint step" if kind.joint else "frozen-VAE step"]
        gradients = gradient_bytes(nets, kind.joint)
        small = sum(statistics_bytes(nets, kind.joint).values())
        networks = trained(nets, kind.joint)
        stored = checkpoint_bytes([*networks, nets.ema], networks)
        kinds.append([kind.name, f"{flops / 1e12:.2f}", amount(gradients), amount(small), amount(stored)])
        for row, batch_of, numbers in ((steps, lambda n: IMAGES_A_GPU * n, GPUS), (fixed, lambda n: 256, GPUS[:3])):
            for gpus in numbers:
                batch = batch_of(gpus)
                computing = flops * batch / gpus / SUSTAINED
                sent = sent_by_ring(gradients, gpus)
                times = [seconds(sent / rate) if gpus > 1 else "-" for rate in LINKS.values()]
                needed = f"{sent / computing / 1e9:.0f} GB/s" if gpus > 1 else "-"
                work = [f"{batch:,}", amount(flops * batch, "FLOP"), seconds(computing)]
                row.append([kind.name, str(gpus), *work, amount(sent) if gpus > 1 else "-", *times, needed])
        speed = SUSTAINED / flops
        rates = [amount(speed * kind.image_bytes() * gpus) + "/s" for gpus in GPUS]
        reading.append([kind.name, f"{speed:.0f}", amount(kind.image_bytes()), *rates])
    speeds = ["run", "images/s a GPU", "an image", "1 GPU", *(f"{gpus} GPUs" for gpus in GPUS[1:])]
    head = ["run", "GPUs", "batch", "a step", "computing", "sent by each GPU", *LINKS, "link that keeps up"]
    return [
        table(["run", "TFLOP an image", "gradients", "batch statistics", "checkpoint"], kinds),
        table(head, steps),
        table(head, fixed),
        table(speeds, reading),
        data_table(),
    ]


def data_table() -> str:
    """What sets of images take."""
    rows = []
    for name, images in SET_SIZES.items():
        shards = -(-images // SHARD_IMAGES)
        sizes = [amount(images * size) for size in (PIXELS, *LATENTS.values(), TOKENS)]
        looks = [seconds(shards * look) for look in LOOK]
        rows.append([name, *sizes, f"{shards:,}", amount(shards * INDEX_BYTES), *looks])
    heads = ["images", "pixels", "latents f8d4", "latents f16d32", "tokens", "shards", "index.json"]
    return table([*heads, "opening", "opening, 1 ms away"], rows)


def clock(function: Callable[[], object]) -> tuple[float, object]:
    """Seconds that a call takes, and what it gives."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def write_set(folder: Path, images: int, shard_images: int, side: int) -> None:
    """A data directory of random images."""
    directory = images_directory(folder)
    directory.mkdir(parents=True)
    random, shards = np.random.default_rng(0), []
    for number, first in enumerate(range(0, images, shard_images)):
        count = min(shard_images, images - first)
        pixels = random.integers(0, 256, (count, 3, side, side), dtype=np.uint8)
        labels = random.integers(0, 1000, count)
        write_shard(directory / shard_name(number), {"pixels": pixels, "labels": labels}, {"plan": ""})
        shards.append({"images": count, "digest": ""})
    index = {"format": IMAGE_FORMAT, "resolution": side, "num_classes": 1000, "classes": None, "fingerprint": ""}
    (directory / "index.json").write_text(json.dumps({**index, "shards": shards}, indent=1))


def measure_set(images: int, shard_images: int, side: int, reads: int) -> dict[str, float]:
    """What opening, ordering and reading cost a sample, in microseconds, and what stays in memory, in bytes.

    The files are in memory. Each is the least of several times, since others may use the machine.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder), images, shard_images, side)
        opening, data = min((clock(lambda: ImageDataset(folder)) for _ in range(3)), key=lambda found: found[0])
        order = BatchOrder(images, 256, 0, 0, reads // 256, 0, 1, 1)
        ordering, batches = min((clock(lambda: list(order)) for _ in range(3)), key=lambda found: found[0])
        indices = [i for batch in batches for i in batch]
        parts = [indices[first : first + READ_AT_ONCE] for first in range(0, len(indices), READ_AT_ONCE)]
        reading = min(clock(lambda part=part: [data[i] for i in part])[0] for part in 4 * parts) / READ_AT_ONCE
        shards = data.shards
        kept = sum(len(values) * values.itemsize for values in (shards.ends, *shards.offsets.values()))
    return {
        "images": images,
        "shards": -(-images // shard_images),
        "opening": opening / images * 1e6,
        "opening, a shard": opening / (images / shard_images) * 1e6,
        "ordering": ordering / len(indices) * 1e6,
        "reading": reading * 1e6,
        "bytes kept": kept,
    }


def measure_index(shards: int) -> dict[str, float]:
    """What reading an index costs, without the shards that it lists."""
    with tempfile.TemporaryDirectory() as folder:
        listed = [{"images": SHARD_IMAGES, "digest": "0" * 64}] * shards
        index = {"format": IMAGE_FORMAT, "resolution": 256, "num_classes": 1000, "classes": None, "fingerprint": ""}
        path = Path(folder) / "index.json"
        path.write_text(json.dumps({**index, "shards": listed}, indent=1))
        taken, _ = clock(lambda: read_index(Path(folder), IMAGE_FORMAT, FIELDS[IMAGE_FORMAT], ""))
        return {"shards": shards, "seconds": taken, "bytes a shard": path.stat().st_size / shards}


def tiny_nets() -> tuple[JointNets, TrainingState]:
    """The networks of a joint run that a CPU steps in a fraction of a second, and what its checkpoints hold."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    nets = build_nets(**TINY, encoder_depth=2, optimizer=lambda network: Optimizer(network.parameters(), device))
    state = TrainingState(
        networks={"model": nets.sit, "ema": nets.ema, "vae": nets.vae, "discriminator": nets.discriminator},
        optimizers={"opt": nets.opt_sit, "opt_vae": nets.opt_vae, "opt_disc": nets.opt_disc},
        tensors={"lecam": nets.lecam},
    )
    return nets, state


def counted_step(rank: int, world: int, folder: str) -> None:
    """One process's joint step, and what a run exchanges beside it; the bytes of each go to `folder`."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # of broadcast_buffers, as training/loop.py does
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    nets, state = tiny_nets()
    for name in ("vae", "discriminator", "sit"):
        wrapped = DistributedDataParallel(getattr(nets, name), broadcast_buffers=False)
        wrapped.register_comm_hook(None, allreduce_hook)  # what is done anyway, where it is seen
        setattr(nets, name, wrapped)
    hosts = host_group()
    batch, draws = build_batch(TINY["vae"], TINY["resolution"])
    counted, reduce = Counter(), dist.all_reduce
    part = "warm-up"

    def counting(tensor: Tensor, *args, **kwargs):
        size = unwrap(nets.sit).in_channels
        kinds = {size: "latents", 2: "logits"}
        of_step = "gradients" if kwargs.get("async_op") else kinds.get(tensor.numel(), "discriminator")
        counted[of_step if part == "step" else part] += tensor.numel() * tensor.itemsize
        return reduce(tensor, *args, **kwargs)

    with patch.object(dist, "all_reduce", counting):
        repae_step(nets, batch, draws, CONFIG)
        part = "step"
        metrics = repae_step(nets, batch, draws, CONFIG)
        part = "agreement"
        all_reduce_max([0, 0], hosts)
        part = "metrics"
        mean_over_processes(torch.stack([value.float() for value in metrics.values()])[None])
        part = "comparison"
        assert differing_tensor(state.named_tensors(), torch.device("cpu")) is None
    del counted["warm-up"]
    if rank == 0:
        Path(folder, "counted.json").write_text(json.dumps({**counted, "metrics a step": len(metrics)}))
    dist.destroy_process_group()


def measure_processes() -> dict[str, dict[str, int]]:
    """Bytes that two processes sum in a tiny joint step, as counted at the calls, and by the formulas."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(counted_step, args=(2, folder), nprocs=2)
        counted = json.loads(Path(folder, "counted.json").read_text())
    nets, state = tiny_nets()
    formulas = {
        "gradients": gradient_bytes(nets, joint=True),
        **statistics_bytes(nets, joint=True),
        "agreement": 2 * 8,
        "metrics": 4 * counted.pop("metrics a step"),
        "comparison": comparison_bytes(state),
    }
    return {"counted": counted, "formula": formulas}


def measure_checkpoint() -> dict[str, int]:
    """Bytes of a tiny joint run's checkpoint after a step, and by the formula."""
    nets, state = tiny_nets()
    repae_step(nets, *build_batch(TINY["vae"], TINY["resolution"]), CONFIG)
    with tempfile.NamedTemporaryFile() as file:
        torch.save(state.to_dict({}, 1), file.name)
        formula = checkpoint_bytes(state.networks.values(), trained(nets, joint=True))
        return {"counted": os.path.getsize(file.name), "formula": formula}


def measure() -> dict:
    """Everything that is measured; prints it on the way."""
    found = {"sets": [], "index": measure_index(200_000)}
    print(f"index of {found['index']['shards']:,} shards: {found['index']['seconds']:.2f} s")
    for images, shard_images in ((1_000, 512), (10_000, 512), (100_000, 512), (100_000, 40)):
        found["sets"].append(measure_set(images, shard_images, side=16, reads=10_240 if images > 1_000 else 768))
        print(", ".join(f"{name} {value:.4g}" for name, value in found["sets"][-1].items()), flush=True)
    found |= {"two processes": measure_processes(), "checkpoint": measure_checkpoint()}
    for name in ("two processes", "checkpoint"):
        print(name, found[name])
    return found


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--tables", action="store_true", help="print the document's tables instead of measuring")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
    return parser.parse_args()


def main() -> None:
    """Measure, or print the tables."""
    args = parse_args()
    if args.tables:
        print("\n\n".join(tables()))
        return
    torch.set_num_threads(1)
    found = measure()
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
