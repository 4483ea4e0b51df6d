"""The tests of the joint step are worth something: each sabotage below is caught by the test named beside it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
REPAE, LDM = "train_repae.py", "train_ldm_only.py"
DIFFUSION, VAE_STEP = "training/transformer_step.py", "training/vae_step.py"
NOISE = "interpolate(cfg.path_type, z_norm, draws.noise, draws.t)"
LABELS = "frozen_call(sit, x_t, draws.t, batch.labels"

# name -> file, what is replaced by what, and the test that fails
SABOTAGES = {
    "drop the detach of z": (REPAE, "sit.bn(z.detach())", "sit.bn(z)", "statistics_move_once"),
    "alignment by batch statistics": (REPAE, "sit.bn.by_running_statistics(z)", "sit.bn(z)", "statistics_move_once"),
    "fresh noise": (DIFFUSION, NOISE, NOISE.replace("draws.noise", "torch.randn_like(z_norm)"), "same_t_and_noise"),
    "fresh times": (DIFFUSION, NOISE, NOISE.replace("draws.t", "torch.rand_like(draws.t)"), "same_t_and_noise"),
    "latents by running statistics": (
        *(REPAE, "sit.bn(z.detach())", "sit.bn.by_running_statistics(z.detach())"),
        "statistics_move_once",
    ),
    "EMA left out": (DIFFUSION, "update_ema(nets.ema, sit, cfg.ema_decay)", "pass", "ema_averages"),
    "EMA lacks buffers": (DIFFUSION, "floating_point()]", 'floating_point() and "running" not in key]', "ema_averages"),
    "sign of the alignment loss": ("loss/alignment.py", "return -torch", "return torch", "shuffled_tokens"),
    "clip omitted": ("training/optimizer.py", "self.max_grad_norm, foreach", 'float("inf"), foreach', "clipped"),
    "alignment moves the transformer": (REPAE, "frozen_call(sit, x_t", "sit(x_t", "does_not_reach_the_transformer"),
    "labels dropped in the alignment pass": (
        *(REPAE, f"{LABELS},", f"{LABELS}.masked_fill(draws.drop, sit.null_label),", "dropped_labels"),
    ),
    "no label drop": (DIFFUSION, "labels.masked_fill(draws.drop, sit.null_label)", "labels", "dropped_labels"),
    "diffusion loss into the VAE": (
        *(REPAE, "vae_loss + cfg.vae_align", "vae_loss + (velocity - x_t).square().mean() + cfg.vae_align"),
        "never_reaches_the_vae",
    ),
    "generator gradient into the discriminator": (
        *(VAE_STEP, "frozen_call(nets.discriminator, recon)", "nets.discriminator(recon)"),
        "discriminator_gets_no_gradient",
    ),
    "discriminator in eval mode for the generator": (
        *(VAE_STEP, "frozen_call(nets.discriminator, recon)", "frozen_call(nets.discriminator.eval(), recon)"),
        "discriminators_statistics",
    ),
    "frozen training normalised by batch statistics": (
        *(LDM, "bn.by_running_statistics(mean", "bn(mean", "test_ldm_step.py -k latent_statistics_stay"),
    ),
    "cached deviation taken for the log-variance": (
        *(LDM, "mean + std * draws", "mean + (0.5 * std).exp() * draws"),
        "test_ldm_step.py -k sample_of_the_cached_posterior",
    ),
    "position embedding trained": ("models/sit.py", "self.grid), requires_grad=False)", "self.grid))", "pos_embed"),
    "alignment weight of the VAE ignored": (
        *(REPAE, "cfg.vae_align_proj_coeff * vae_align_loss", "vae_align_loss", "gradient_of_the_vae_is_the_formulas"),
    ),
}


# Imports what the tests import but nothing of the project, fills LPIPS' weights, and forks a pytest for each line that
# it is sent: its exit code is answered, and what it prints goes to the file that the line names.
SERVER = """
import os, sys
sys.dont_write_bytecode = True  # sources change within a second, which caches of bytecode would not see
import numpy, PIL.Image, pytest, safetensors.torch, torch, torch._dynamo, torch.distributed, torch.utils.data, tqdm
sys.path.insert(0, "tests")
from golden_weights import lpips_state  # which needs nothing of the project
lpips_state()
for line in sys.stdin:
    output, *arguments = line.rstrip("\\n").split("|")
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        code = pytest.main(arguments)
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    skip = shutil.ignore_patterns(".*", "exps", "data", "data-demo", "pretrained", "cifar10", "*.png", "__pycache__")
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("sabotage") / "tree", ignore=skip)


@pytest.fixture(scope="module")
def run_test(tree):
    """Runs a test of the copy by its name; returns the exit code and what pytest printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SERVER], cwd=tree, env=environment, **pipes) as server:

        def run(test: str) -> tuple[int, str]:
            file, words = test.split(" -k ") if " -k " in test else ("test_joint_step.py", test)
            output = tree.parent / "said.txt"
            arguments = ("-q", "-p", "no:cacheprovider", f"tests/{file}", "-k", words)
            print(output, *arguments, sep="|", file=server.stdin, flush=True)
            return int(server.stdout.readline()), output.read_text()

        yield run
        server.stdin.close()


@pytest.mark.parametrize("name", SABOTAGES)
def test_sabotage_is_caught(tree, run_test, name):
    file, *replacements, test = SABOTAGES[name]
    source = good = (tree / file).read_text()
    for old, new in zip(replacements[::2], replacements[1::2], strict=True):
        assert source.count(old) == 1, f"the line to sabotage is not there: {old}"
        source = source.replace(old, new)
    (tree / file).write_text(source)
    code, said = run_test(test)
    (tree / file).write_text(good)
    assert code == 1, f"not caught: exit code {code}\n{said[-2000:]}"
    assert "1 failed" in said
    assert "SyntaxError" not in said
    assert "NameError" not in said
