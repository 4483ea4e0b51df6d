"""The stages of the method, each as a function to be measured; the scripts' own functions build the networks."""

import copy
import io
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import train_repae
from benchmarks.workspace import Setting, training_flags
from cache_latents import encode
from dataset import open_images
from diffusion.sampling import Sampling, decode_pixels, sample_pixels
from diffusion.transport import diffusion_loss, interpolate
from loss.alignment import alignment_loss
from models.autoencoder import pixels_to_image
from models.numerics import cast_weights, compile_in_place, to_device
from models.sit import SiT
from preprocessing import preprocess
from storage.files import writing_behind
from storage.sample_files import SampleFiles
from train_ldm_only import ldm_step
from training.build import transformer_draws
from training.distributed import frozen_call
from training.loop import Batch, Run
from training.optimizer import Optimizer
from training.randomness import Draws, Rows
from training.transformer_step import encoder_tokens, update_ema
from weights.vae import latent_shape, open_vae

READ, READ_AT_ONCE = 4096, 32  # images of a call and of a batch
GUIDANCE_SCALE = 2.0


class Stage(NamedTuple):
    """A call of `work` handles `images` images."""

    work: Callable[[], object]
    images: int


class Networks(NamedTuple):
    """Shared by the stages: a joint run's networks, its average as sampling uses it, a batch and its draws."""

    nets: train_repae.JointNets
    sampled: SiT
    cfg: train_repae.JointStepConfig
    batch: Batch
    draws: Draws


def data_stages(folder: Path, setting: Setting, workers: int) -> dict[str, Stage]:
    """Reading as in training, and preprocessing."""
    data = open_images(folder / "data")

    def read(workers: int) -> None:
        rows = torch.randint(len(data), (READ,)).split(READ_AT_ONCE)
        for _ in DataLoader(data, batch_sampler=[part.tolist() for part in rows], num_workers=workers):
            pass

    def prepare() -> None:
        shutil.rmtree(folder / "again", ignore_errors=True)
        with redirect_stderr(io.StringIO()):  # the progress bar
            preprocess(folder / "photographs", folder / "again", setting.resolution, workers, None)

    return {
        "preprocessing": Stage(prepare, len(data)),
        "reading, no workers": Stage(lambda: read(0), READ),
        f"reading, {workers} workers": Stage(lambda: read(workers), READ),
    }


def build_networks(folder: Path, setting: Setting) -> Networks:
    """The networks of a joint run on the workspace in `folder`, and its first batch."""
    args = train_repae.parse_args(training_flags(folder, setting, "benchmark"))
    run = Run(args)
    source = open_vae(args.vae, args.vae_ckpt, offline=True)
    nets = train_repae.build(args, run, source)
    sampled = copy.deepcopy(nets.ema)
    cast_weights(sampled, setting.precision)
    compile_in_place(sampled.blocks, args.compile, run.device)
    cfg = train_repae.step_config(args, run.device)
    data = open_images(args.data_dir, args.resolution)
    pixels, labels = zip(*(data[i] for i in range(setting.batch)), strict=True)
    rows = Rows(0, setting.batch)
    draws = transformer_draws(args, latent_shape(source, args.resolution), 1, rows).to(run.device)
    moments = torch.cat([draws.posterior, draws.noise.abs()], dim=1)
    loaded = to_device([torch.stack(pixels), torch.tensor(labels)], run.device)
    return Networks(nets, sampled, cfg, Batch(*loaded, 0, rows, moments), draws)


def backward(loss: Tensor, network: nn.Module) -> None:
    """Compute the gradients of the network's parameters and drop them."""
    loss.backward()
    network.zero_grad(set_to_none=True)


def vae_stages(networks: Networks, images: int) -> dict[str, Stage]:
    """The VAE and its losses, each forward and backward."""
    nets, _, cfg, batch, draws = networks
    image = pixels_to_image(batch.pixels)
    with torch.no_grad(), cfg.autocast():
        recon = nets.vae(image, draws.posterior)[2]

    def vae() -> None:
        with cfg.autocast():
            posterior, _, recon = nets.vae(image, draws.posterior)
        backward(recon.mean() + posterior.kl().mean(), nets.vae)

    def lpips() -> None:
        nets.lpips(image, recon.detach().requires_grad_()).mean().backward()

    def gan() -> None:
        with cfg.autocast():
            (logits,) = frozen_call(nets.discriminator, recon.detach().requires_grad_())
        logits.float().mean().backward()
        with cfg.autocast():
            real, fake = nets.discriminator(image, recon)
        backward((real.float() - fake.float()).mean(), nets.discriminator)

    return {"VAE": Stage(vae, images), "LPIPS": Stage(lpips, images), "GAN": Stage(gan, images)}


def transformer_stages(networks: Networks, images: int) -> dict[str, Stage]:
    """The encoder, the alignment pass through the frozen transformer, and the transformer, forward and backward."""
    nets, _, cfg, batch, draws = networks
    sit = nets.sit
    zs = encoder_tokens(nets.encoders, batch.pixels, cfg)

    def alignment() -> None:
        z_norm = sit.bn.by_running_statistics(draws.posterior).requires_grad_()
        x_t, _ = interpolate(cfg.path_type, z_norm, draws.noise, draws.t)
        with cfg.autocast():
            _, tokens = frozen_call(sit, x_t, draws.t, batch.labels, depth=sit.encoder_depth)
        alignment_loss(tokens, zs).backward()

    def transformer() -> None:
        x_t, target = interpolate(cfg.path_type, draws.posterior, draws.noise, draws.t)
        with cfg.autocast():
            prediction, tokens = sit(x_t, draws.t, batch.labels)
        backward(diffusion_loss(prediction.float(), target).mean() + alignment_loss(tokens, zs), sit)

    return {
        "encoder": Stage(lambda: encoder_tokens(nets.encoders, batch.pixels, cfg), images),
        "alignment pass": Stage(alignment, images),
        "transformer": Stage(transformer, images),
    }


def optimiser_step(optimizer: Optimizer) -> Callable[[], object]:
    """Unscaling, clipping and AdamW on given gradients."""
    gradients = [torch.full_like(parameter, 1e-6) for parameter in optimizer.parameters]
    loss = torch.zeros((), device=gradients[0].device, requires_grad=True)

    def work() -> None:
        for parameter, gradient in zip(optimizer.parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.backward_and_step(loss)

    return work


def step_stages(networks: Networks, images: int) -> dict[str, Stage]:
    """Optimisers and EMA, and both training steps as a whole."""
    nets, _, cfg, batch, draws = networks
    updates = [optimiser_step(optimizer) for optimizer in (nets.opt_vae, nets.opt_disc, nets.opt_sit)]
    return {
        "three optimisers": Stage(lambda: [update() for update in updates], images),
        "EMA": Stage(lambda: update_ema(nets.ema, nets.sit, cfg.ema_decay), images),
        "joint step": Stage(lambda: train_repae.repae_step(nets, batch, draws, cfg), images),
        "frozen step": Stage(lambda: ldm_step(nets, batch, draws, cfg), images),
    }


def inference_stages(networks: Networks, setting: Setting, folder: Path) -> dict[str, Stage]:
    """Caching, sampling by the SDE without and with guidance, decoding, and writing raw pixels and PNGs."""
    nets, sampled, cfg, batch, draws = networks
    images = setting.batch
    indices = list(range(images))
    vae = nets.vae.eval()

    def sample(scale: float) -> Tensor:
        sampling = Sampling(mode="sde", num_steps=setting.sampling_steps, cfg_scale=scale, autocast=cfg.autocast)
        return sample_pixels(sampled, vae, indices, sampling)[0]

    def decode() -> Tensor:
        with cfg.autocast():
            return decode_pixels(vae, draws.posterior)[0]

    def write() -> None:
        with writing_behind(lambda _: None) as begin:
            begin(files.writes(indices, pixels), lambda: None, images)

    pixels = decode().permute(0, 2, 3, 1).cpu().numpy()
    files = SampleFiles(folder / "written", "set", {"count": images, "resolution": setting.resolution}, True, True)
    files.parts.mkdir(parents=True)
    steps = f"SDE, {setting.sampling_steps} steps"
    return {
        "caching": Stage(lambda: encode(vae, batch.pixels).cpu(), images),
        f"sampling, {steps}": Stage(lambda: sample(1.0), images),
        f"sampling, {steps}, guided": Stage(lambda: sample(GUIDANCE_SCALE), images),
        "decoding": Stage(decode, images),
        "writing": Stage(write, images),
    }
