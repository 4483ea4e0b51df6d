"""Two gloo processes at one global batch compute what one process does."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import test_ldm_step
from forked import forkserver
from joint_golden import CONFIG
from loss.vae_loss import VAELossConfig
from metrics.features import Features
from metrics.statistics import METRICS, SetStatistics, compare
from models.discriminator import PatchDiscriminator
from models.numerics import compile_in_place
from test_joint_step import small_batch, small_nets
from train_ldm_only import ldm_step
from train_repae import JointNets, repae_step
from training.distributed import frozen_call, gradient_sync, unwrap
from training.loop import Batch
from training.randomness import Draws, Rows

STEPS = 3
# the discriminator learns from the second step
WITH_LECAM = replace(CONFIG, loss=VAELossConfig(lecam_regularization_weight=0.5, discriminator_start=1))


def start(rank: int, world: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )


def in_two_processes(function, tmp_path, *args):
    """Run `function(rank, world, *args)` on two processes and give back what each of them returned."""
    ranks = [forkserver().Process(target=_call, args=(rank, 2, str(tmp_path), function, args)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _call(rank: int, world: int, folder: str, function, args) -> None:
    start(rank, world, folder + "/rendezvous")
    torch.save(function(rank, world, *args), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def double_nets(accumulation: int) -> JointNets:
    nets = small_nets(accumulation_steps=accumulation)
    for module in (nets.vae, nets.discriminator, nets.sit, nets.ema, nets.lpips):
        module.double()
    nets.lecam = nets.lecam.double()
    return nets


def part_of(draws: Draws, rows: Rows) -> Draws:
    """Rows of the draws, in float64."""
    return Draws(*(tensor[slice(*rows)].double() for tensor in draws[:-1]), draws.drop[slice(*rows)])


def micro_batches(rank: int, world: int, accumulation: int) -> Iterator[tuple[int, Rows, bool]]:
    """STEPS global batches of eight: the step, this process's rows, and whether the micro-batch is the step's last."""
    size = 8 // (world * accumulation)
    for step in range(STEPS):
        for micro in range(accumulation):
            start = (micro * world + rank) * size
            yield step, Rows(start, start + size), micro == accumulation - 1


def joint_steps(rank: int, world: int, accumulation: int) -> dict:
    """Three float64 joint steps on this process's rows of a global batch of eight; every network and metric after."""
    nets = double_nets(accumulation)
    if world > 1:
        for name in ("vae", "discriminator", "sit"):
            setattr(nets, name, DistributedDataParallel(getattr(nets, name), broadcast_buffers=False))
    batch, draws, zs = small_batch(8)
    draws = draws._replace(drop=torch.tensor([False, True] * 4))
    metrics = []
    for step, rows, last in micro_batches(rank, world, accumulation):
        mine = slice(*rows)
        nets.encoders = [lambda pixels, mine=mine: zs[mine].double()]
        with gradient_sync([nets.vae, nets.discriminator, nets.sit], sync=last):
            part = Batch(batch.pixels[mine], batch.labels[mine], step, rows)
            result = repae_step(nets, part, part_of(draws, rows), WITH_LECAM)
        metrics += [{name: value for name, value in result.items() if value is not None}] * last
    networks = {"vae": nets.vae, "discriminator": nets.discriminator, "sit": nets.sit, "ema": nets.ema}
    return {
        "networks": {k: unwrap(v).state_dict() for k, v in networks.items()},
        "metrics": metrics,
        "lecam": nets.lecam,
    }


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_equal_one_in_float64(tmp_path, accumulation):
    one = joint_steps(0, 1, accumulation)
    two = in_two_processes(joint_steps, tmp_path, accumulation)
    for name, state in one["networks"].items():
        for key, value in state.items():
            first, second = (result["networks"][name][key] for result in two)
            assert torch.equal(first, second), f"ranks differ in {name} {key}"
            torch.testing.assert_close(first, value, atol=1e-10, rtol=1e-10, msg=f"{name} {key}")
    assert torch.equal(two[0]["lecam"], two[1]["lecam"])
    torch.testing.assert_close(two[0]["lecam"], one["lecam"], atol=1e-10, rtol=1e-10)
    assert all(metrics["lecam_loss"] > 0 for metrics in one["metrics"])
    if accumulation == 1:
        for step in range(STEPS):
            a, b = (result["metrics"][step] for result in two)
            for name, value in one["metrics"][step].items():
                if name != "psnr":  # a logarithm of a mean is no mean of logarithms
                    torch.testing.assert_close((a[name] + b[name]) / 2, value, atol=1e-9, rtol=1e-9, msg=name)
                if name.startswith("grad_norm"):
                    assert torch.equal(a[name], b[name])


def frozen_steps(rank: int, world: int, accumulation: int) -> dict:
    """Three float64 steps on cached moments: this process's rows of a global batch of eight."""
    nets = test_ldm_step.nets([test_ldm_step.toy_encoder], accumulation_steps=accumulation)
    nets.sit.double()
    nets.ema.double()
    sit = nets.sit
    if world > 1:
        nets.sit = DistributedDataParallel(sit, broadcast_buffers=False)
    batch, draws = test_ldm_step.batch_and_draws(8)
    for step, rows, last in micro_batches(rank, world, accumulation):
        mine = slice(*rows)
        part = Batch(batch.pixels[mine], batch.labels[mine], step, rows, batch.moments[mine])
        with gradient_sync([nets.sit], sync=last):
            ldm_step(nets, part, part_of(draws, rows), test_ldm_step.CONFIG)
    return {"sit": sit.state_dict(), "ema": nets.ema.state_dict()}


def test_frozen_training_is_the_same_on_any_processes_and_micro_batches(tmp_path):
    one = frozen_steps(0, 1, 1)
    others = [frozen_steps(0, 1, 4), *in_two_processes(frozen_steps, tmp_path, 2)]
    assert not torch.equal(one["sit"]["final_layer.linear.weight"], one["ema"]["final_layer.linear.weight"])
    for name, state in one.items():
        for key, value in state.items():
            for other in others:
                torch.testing.assert_close(other[name][key], value, atol=1e-10, rtol=1e-10, msg=f"{name} {key}")


def set_statistics(rank: int, world: int) -> dict:
    """Every metric of 11 images, whose features this process sees a share of, and moments."""
    generator = torch.Generator().manual_seed(0)
    pool, spatial = torch.randn(11, 6, generator=generator), torch.randn(11, 4, generator=generator)
    probabilities = torch.rand(11, 5, generator=generator).softmax(1)
    statistics = SetStatistics(11, torch.device("cpu"), keep_features=True)
    statistics.inception_score.split, statistics.inception_score.splits = 4, 3
    statistics.inception_score.negentropy = torch.zeros(3, dtype=torch.float64)
    for indices in torch.arange(rank, 11, world).split(2):
        statistics.update(indices, Features(pool[indices], spatial[indices], probabilities[indices]))
    moments = statistics.over_processes().moments("inception")
    if rank > 0:
        return {}
    reference = {key: value + 0.1 for key, value in moments.items()}
    metrics = compare(statistics, reference, statistics.features.flip(0) + 0.3, list(METRICS), "inception")
    return {**metrics, "features": statistics.features, **moments}


def test_metrics_of_uneven_shares_are_those_of_one_process(tmp_path):
    one = set_statistics(0, 1)
    two, nothing = in_two_processes(set_statistics, tmp_path)
    assert nothing == {}
    assert list(one)[:6] == ["fid", "sfid", "inception_score", "precision", "recall", "kid"]
    assert torch.equal(one["features"], two["features"])
    for name in one:
        torch.testing.assert_close(torch.as_tensor(one[name]), torch.as_tensor(two[name]), rtol=1e-10, atol=1e-12)


def discriminator_gradients(rank: int, world: int, compiled: bool) -> dict:
    """Gradients of both of the discriminator's passes over this process's images, graphs compiled and breaks."""
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    discriminator = PatchDiscriminator()
    if compiled:
        discriminator.main.compile(backend="aot_eager", dynamic=False)
    wrapped = DistributedDataParallel(discriminator, broadcast_buffers=False)
    real, fake = torch.randn(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(rank))
    image = fake.requires_grad_()
    for _ in range(2):
        wrapped.zero_grad()
        (logits,) = frozen_call(wrapped, image)
        (through_frozen,) = torch.autograd.grad(logits.square().mean(), image)
        logits_real, logits_fake = wrapped(real, fake.detach())
        (logits_real.square().mean() + logits_fake.mean()).backward()
    gradients = [through_frozen, *(parameter.grad for parameter in discriminator.parameters())]
    return {
        "gradients": gradients,
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": len(counters["graph_break"]),
    }


@pytest.mark.slow
def test_batch_statistics_over_processes_are_compiled_whole(tmp_path):
    for folder in ("eager", "compiled"):
        (tmp_path / folder).mkdir()
    eager = in_two_processes(discriminator_gradients, tmp_path / "eager", False)
    compiled = in_two_processes(discriminator_gradients, tmp_path / "compiled", True)
    for one, other in zip(eager, compiled, strict=True):
        assert (one["graphs"], other["graphs"], other["breaks"]) == (0, 2, 0)  # the frozen pass, and the trained one
        for a, b in zip(one["gradients"], other["gradients"], strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def graphs_of_blocks(rank: int, world: int) -> dict:
    """How many graphs two equal blocks, compiled one by one, make within DistributedDataParallel, whose buckets are
    smaller than a block."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    real = nn.Module.compile
    blocks = [nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 512)) for _ in range(2)]
    with mock.patch.object(nn.Module, "compile", lambda module, **options: real(module, backend=count, **options)):
        compile_in_place(blocks, True, torch.device("cuda"))
    network = DistributedDataParallel(nn.Sequential(*blocks), bucket_cap_mb=1)
    for _ in range(2):
        network(torch.randn(4, 512, requires_grad=True)).sum().backward()
    return {"graphs": torch.tensor(len(graphs))}


def test_blocks_that_are_compiled_one_by_one_are_not_split_at_the_borders_of_buckets(tmp_path):
    assert [int(found["graphs"]) for found in in_two_processes(graphs_of_blocks, tmp_path)] == [1, 1]
