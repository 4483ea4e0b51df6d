"""The counted numbers of docs/performance.md: operations on tensors, and bytes at the communication calls."""

import pytest
import torch

from benchmarks import flops, scaling
from models.sit import SiT_models
from scripts import ROOT

TINY = (*(scaling.TINY[key] for key in ("vae", "model", "enc_type", "resolution")), 2)


def test_operations_of_a_transformer_are_those_of_its_matrices_and_its_attention():
    with torch.device("meta"):
        sit = SiT_models["SiT-S/2"](input_size=32, encoder_depth=8)
        batch, draws = flops.build_batch("f8d4", 256)
    tokens, width, depth, wide = 256, 384, 12, 2048
    blocks = depth * (12 * width**2 * tokens + 6 * width**2 + 2 * tokens**2 * width)
    ends = tokens * 2 * 16 * width + 256 * width + width**2 + 2 * width**2
    projector = tokens * (width * wide + wide**2 + wide * 768)
    assert flops.count(sit, draws.noise, draws.t, batch.labels) == 2 * (blocks + ends + projector)


def test_the_parts_of_a_joint_step_are_all_of_it():
    found = flops.stage_flops(*TINY)
    parts = list(found)[: list(found).index("joint step")]
    assert sum(found[part] for part in parts) == pytest.approx(found["joint step"], rel=1e-9)
    assert min(found.values()) > 0
    parts = ("encoders, forward", "transformer's update")
    assert found["frozen-VAE step"] == pytest.approx(sum(found[part] for part in parts), rel=1e-9)


def test_what_is_read_does_not_grow_with_the_set():
    small, large = (scaling.measure_set(images, 16, side=8, reads=256) for images in (300, 3000))
    assert large["bytes kept"] / large["shards"] == small["bytes kept"] / small["shards"] == 32


def test_a_checkpoint_is_as_large_as_the_formula_says():
    found = scaling.measure_checkpoint()
    assert found["counted"] == pytest.approx(found["formula"], rel=0.005)


@pytest.mark.slow
def test_two_processes_exchange_what_the_formulas_say():
    found = scaling.measure_processes()
    assert found["counted"] == found["formula"]


@pytest.mark.slow
def test_the_table_of_computation_is_what_is_counted():
    page = (ROOT / "docs/performance.md").read_text(encoding="utf8")
    for kind in scaling.KINDS[:2]:
        found = {name: value / 1e12 for name, value in flops.stage_flops(kind.vae, kind.model).items()}
        vae = found["VAE, forward"] + found["VAE, backward"]
        transformer = found["transformer's update"] + found["alignment through the transformer"]
        parts = f"(VAE {vae:.1f}, transformer {transformer:.2f})"
        line = f"| joint step, {kind.vae}, {kind.model}, DINOv2-B | about {found['joint step']:.1f} {parts} |"
        assert line in page
        assert f"| about {found['frozen-VAE step']:.2f} |" in page
        guided = found["sampling"] + flops.SAMPLING_STEPS * found["sampling, an evaluation"]
        assert found["sampling"] == pytest.approx(60, abs=0.5)
        assert f"| {found['sampling']:.0f} without guidance, {guided:.0f} with guidance at all times |" in page
