"""Encoders' weights: which files are read, which are refused, and what training does with them."""

from argparse import Namespace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from errors import UserError
from hub import TIMM, timm_weights
from originals import original, tiny_encoder
from published import write_vae
from scripts import TINY, TINY_SIT, refusal, run
from weights.checkpoint_io import read_checkpoint, vae_files
from weights.encoders import load_encoder_weights, load_encoders, weights_fingerprint

CPU = torch.device("cpu")


def save(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def test_weights_are_known_by_a_hash_that_other_processors_share(tmp_path):
    encoders = [tiny_encoder("mae-vit-l", 2) for _ in range(3)]
    for encoder in encoders:
        load_encoder_weights(encoder, "mae-vit-l", save(original("mae-vit-l"), tmp_path / "weights.pth"))
    encoders[1].network.pos_embed += 1e-7  # as another processor rounds
    encoders[2].network.blocks[0].norm1.bias[3] += 1e-7
    first, rounded, other = map(weights_fingerprint, encoders)
    assert first == rounded != other


def test_weights_are_cast_once_and_known_by_the_hash_of_float32():
    def loaded(precision: str):
        flags = {"enc_type": "efficientnet-lite0", "enc_ckpt": [], "resolution": 32, "offline": True}
        (encoder,) = load_encoders(Namespace(**flags, mixed_precision=precision), 4, CPU)
        return encoder

    wide, cast = loaded("no"), loaded("bf16")
    assert wide.fingerprint == cast.fingerprint
    assert cast.network.conv_stem.weight.dtype == torch.bfloat16
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wide(pixels), cast(pixels))


def refused(name: str, path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_encoder_weights(tiny_encoder(name, 2), name, path)
    message = str(error.value)
    assert "\n" not in message and str(path) in message
    return message


def test_files_that_hold_no_such_encoder(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_text("<html>not found</html>")
    assert "not a readable PyTorch file" in refused("mae-vit-l", path)
    mae, dino, dinov2 = original("mae-vit-l"), original("dinov1-vit-b"), original("dinov2-vit-s")
    without_scale = {key: value for key, value in dinov2.items() if "ls1" not in key}
    for name, content, message in (
        ("dinov2-vit-s", original("dinov2reg-vit-s"), "no checkpoint of this encoder"),
        ("dinov1-vit-b", mae, "weights are missing, first"),
        ("dinov2-vit-s", mae["model"], "its patches are 16 px wide, expected 14"),
        ("dinov2-vit-s", without_scale, "2 weights are missing, first blocks.0.ls1.gamma: another"),
        ("dinov1-vit-b", {**dino, "head.weight": torch.zeros(9, 64)}, "1 unexpected weights, first head.weight"),
    ):
        torch.save(content, path)
        assert message in refused(name, path), message


def tree(state: dict[str, torch.Tensor]) -> nn.Module:
    root = Scripted()
    for key, value in state.items():
        *parents, name = key.split(".")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, Scripted())
            module = module._modules[parent]
        module.register_parameter(name, nn.Parameter(value))
    return root


class Scripted(nn.Module):
    """TorchScript needs a forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_clip_as_openai_publishes_it(tmp_path):
    # a TorchScript archive of half precision; its visual tower alone; and timm's form are the same weights
    weights = {key: value.half() for key, value in original("clip-vit-L").items()}
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    tokens = []
    for form in ("archive", "tower"):
        path = tmp_path / form
        if form == "archive":
            torch.jit.script(tree(weights)).save(path)
        else:
            prefix = "visual."
            torch.save({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}, path)
        encoder = tiny_encoder("clip-vit-L", 2)
        load_encoder_weights(encoder, "clip-vit-L", path)
        assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
        tokens.append(encoder(pixels))
    assert torch.equal(*tokens)


@pytest.mark.slow
def test_training_from_local_files_and_what_its_checkpoint_holds(tiny_data, vgg_weights, tmp_path):
    vae = write_vae(tmp_path / "vae")
    tiny = (*TINY, *TINY_SIT, "--data-dir", tiny_data, "--lpips-vgg-ckpt", vgg_weights, "--output-dir", tmp_path)
    tiny += ("--vae-ckpt", vae, "--disc-pretrained-ckpt", vae_files(vae).discriminator, "--num-workers", 0)
    weights = timm_weights()
    path, other = tmp_path / "a model=1.pth", tmp_path / "other.safetensors"
    torch.save({"state_dict": weights}, path)
    safetensors.torch.save_file(timm_weights(seed=1), other)
    encoders = ("--enc-type", f"{TIMM},efficientnet-lite0", "--resample-tokens")
    irepa = ("--projector", "conv", "--spatial-norm")
    run_flags = (*tiny, *encoders, *irepa, "--exp-name", "two-encoders", "--sampling-steps", 100)
    run("train_repae.py", *run_flags, "--max-train-steps", 2, "--enc-ckpt", f"{TIMM}={path}")
    checkpoint = read_checkpoint(tmp_path / "two-encoders/checkpoints/0000002.pt")
    shapes = [tuple(checkpoint["model"][f"projectors.{i}.weight"].shape) for i in range(2)]
    assert shapes == [(64, 64, 3, 3), (112, 64, 3, 3)]
    assert not any("encoder" in key for key in checkpoint.keys() - {"vae"})
    assert checkpoint["identity"]["encoders"].keys() == {TIMM, "efficientnet-lite0"}
    # the same weights in another file continue the run; other weights would make it another run
    same = tmp_path / "same.safetensors"
    safetensors.torch.save_file(weights, same)
    run("train_repae.py", *run_flags, "--max-train-steps", 3, "--enc-ckpt", f"{TIMM}={same}")
    line = refusal("train_repae.py", *run_flags, "--max-train-steps", 4, "--enc-ckpt", f"{TIMM}={other}")
    assert "was made with other weights of the encoders" in line
