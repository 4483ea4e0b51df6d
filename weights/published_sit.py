"""The transformers of SiT and REPA as they are published, in the names and conventions of models/sit.py."""

import math

import torch
from torch import Tensor

from errors import UserError
from models.sit import SIT_SIZES

OUTPUT = "final_layer.linear."
TIME = "t_embedder.mlp.0.weight"
SIT_CONVENTION = (
    "in SiT's convention (t = 1 is data, the output is data minus noise), converted to ours; a file of DiT, which "
    "predicts noise, looks the same"
)


def convert_published(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """A published state dict in our names and conventions, and in words what was converted, if anything.

    A state dict without projectors and normaliser is SiT's (Ma et al., arXiv 2401.08740). DiT's files have the same
    names but predict noise; they cannot be told from SiT's. Second halves of the output's channels, which SiT
    trained without a loss, are dropped. Older files of REPA count the blocks behind the aligned one from 0 again.
    """
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    late = [key for key in state if key.startswith("decoder_blocks.")]
    for key in late:
        _, number, rest = key.split(".", 2)
        state[f"blocks.{depth + int(number)}.{rest}"] = state.pop(key)
    channels, side = state["x_embedder.proj.weight"].shape[1:3]
    if len(state[OUTPUT + "weight"]) == 2 * side**2 * channels:
        for key in (OUTPUT + "weight", OUTPUT + "bias"):
            state[key] = state[key].unflatten(0, (side**2, 2 * channels))[:, :channels].flatten(0, 1)
    if not any(key.startswith(("bn.", "projectors.")) for key in state):
        return reverse_time(state), SIT_CONVENTION
    return state, ""


def reverse_time(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict whose network is -net(x, 1 - t, y), for `net` with the given one.

    The time is embedded as cosines and sines of ωt. Those of ω(1 - t) are linear in them, by the addition theorems, so
    the first layer of the time's MLP takes the reversal up.
    """
    cosines, sines = state[TIME].double().chunk(2, dim=1)
    half = cosines.shape[1]
    omega = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32)).double()
    cos, sin = omega.cos(), omega.sin()
    time = torch.cat([cosines * cos + sines * sin, cosines * sin - sines * cos], dim=1).float()
    return {**state, TIME: time, **{OUTPUT + name: -state[OUTPUT + name] for name in ("weight", "bias")}}


def model_of(state: dict[str, Tensor], source: str) -> str:
    """The name in SiT_models of a transformer with these weights; a UserError if there is none."""
    width, _, patch, _ = state["x_embedder.proj.weight"].shape
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    for name, size in SIT_SIZES.items():
        if size[:2] == (depth, width):
            return f"{name}/{patch}"
    raise UserError(f"{source}: {depth} blocks of width {width}, which is no size of SiT (models/sit.py)")
