"""Four hundred steps: memory and open files stay as they are."""

import os
import subprocess
import time
from statistics import median

import psutil
import pytest

from images import make_data
from scripts import ENVIRONMENT, ROOT, TINY, TINY_SIT, command, records
from weights.checkpoint_io import vae_files

pytestmark = pytest.mark.slow
STEPS, WARM = 400, 100
MEGABYTES, FILES = 12, 2  # that may come and go


def look(process: psutil.Process) -> tuple[float, int, int]:
    """Memory in MB and open files of a run and its data workers, and how many processes these are."""
    family = [process, *process.children(recursive=True)]
    memory = sum(one.memory_info().rss - one.memory_info().shared for one in family) / 1e6
    return memory, sum(one.num_fds() for one in family), len(family)


def test_four_hundred_joint_steps_use_no_more_memory_or_files_than_half_of_them(joint, tiny_vae, vgg_weights, tmp_path):
    """With pictures, logging to tensorboard, and a checkpoint every few seconds, of which most are deleted again."""
    data = make_data(tmp_path, per_class=6, resolution=24)
    flags = (*TINY, *TINY_SIT, "--resolution", 24, "--batch-size", 1, "--enc-type", "none")
    places = ("--data-dir", data, "--output-dir", tmp_path, "--lpips-vgg-ckpt", vgg_weights, "--vae-ckpt", tiny_vae[1])
    more = ("--disc-pretrained-ckpt", vae_files(tiny_vae[1]).discriminator, "--checkpointing-minutes", 0.1)
    more += ("--report-to", "tensorboard")
    often = ("--checkpointing-steps", STEPS, "--sampling-steps", STEPS // 4, "--max-train-steps", STEPS)
    line = command("train_repae.py", *flags, *places, *more, *often, "--exp-name", "soak")
    log, seen = tmp_path / "soak/metrics.jsonl", []
    with open(tmp_path / "said.txt", "w") as said:
        process = subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=said, stderr=said)
    family = psutil.Process(process.pid)
    while process.poll() is None:
        time.sleep(0.2)
        try:
            at = len(records(log))
            if at >= WARM and (not seen or at > seen[-1][0]):
                seen.append((at, *look(family)))
        except psutil.NoSuchProcess:
            break
    assert process.wait() == 0, (tmp_path / "said.txt").read_text()[-2000:]
    assert [record["step"] for record in records(log)] == list(range(1, STEPS + 1))
    whole = [found for found in seen if found[3] == 2]
    early = [found for found in whole if found[0] < STEPS // 2]
    late = [found for found in whole if found[0] >= STEPS * 3 // 4]
    assert len(early) > 5
    assert len(late) > 5
    assert median(found[1] for found in late) < median(found[1] for found in early) + MEGABYTES, seen
    assert max(found[2] for found in late) <= max(found[2] for found in early) + FILES, seen
    assert os.listdir(tmp_path / "soak/checkpoints")
