"""Killed at any moment, and run again by the same command: the end is what an uninterrupted run leaves, to the bit."""

import json
import random
import shutil
from pathlib import Path

import pytest

import scripts
from good import cache_flags, good_flags
from killer import Killer
from scripts import LAST, TINY, TINY_SIT, assert_same_run
from weights.checkpoint_io import numbered_checkpoints

pytestmark = pytest.mark.slow
# a checkpoint after every step, of which one is kept beside the last
ROLLING = ("--checkpointing-minutes", 1e-6, "--keep-last", 1)
SHORT = ("--num-workers", 0, "--batch-size", 2, *ROLLING)
SAMPLE = 3  # operations at which writers are killed that write in the same way as frozen training


@pytest.fixture(scope="module")
def killer():
    return Killer()


def content(folder: Path) -> dict[str, bytes | list]:
    """All files below `folder` but locks, without what is timing."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock":
            timed = path.name == "metrics.jsonl"
            found[path.relative_to(folder).as_posix()] = scripts.records(path) if timed else path.read_bytes()
    return found


def assert_killed_is_continued(
    killer: Killer, folder: Path, command: list, sample: int | None = SAMPLE, check=lambda: None, constants=None
) -> list[str]:
    """Kill `command`, which writes to `folder` only, at `sample` evenly spaced operations on files, or at each if that
    is None, each time from the beginning; after each the same command must end in the same files. Returns all
    operations."""
    prepared = folder.with_name("prepared")
    if folder.exists():
        shutil.copytree(folder, prepared)
    assert killer.run(command, folder, constants=constants) == 0, killer.output(folder)
    operations, whole = killer.operations(folder), content(folder)
    numbers = range(1, len(operations) + 1)
    if sample is not None:
        numbers = [round((i + 0.5) * len(operations) / sample + 0.5) for i in range(sample)]
    for number in numbers:
        where = f"after a kill at {number}: {operations[number - 1]}"
        shutil.rmtree(folder)
        if prepared.exists():
            shutil.copytree(prepared, folder)
        assert killer.run(command, folder, kill=number, constants=constants) == -9, where
        check()
        assert killer.run(command, folder, constants=constants) == 0, where
        after = content(folder)
        assert after.keys() == whole.keys(), where
        for name, value in whole.items():
            if name.endswith("rolling.json"):  # it may still list a checkpoint that was deleted
                assert set(json.loads(after[name])["steps"]) >= set(json.loads(value)["steps"]), where
            else:
                assert after[name] == value, f"{name} differs {where}"
    return operations


def kinds(operations: list[str]) -> set[str]:
    return {operation.split()[0] for operation in operations}


def test_joint_training_killed_at_a_sample_of_its_operations(killer, joint, tmp_path):
    folder = tmp_path / "exps"
    command = ["train_repae.py", *joint[1], *SHORT, "--exp-name", "killed", "--output-dir", folder]
    wholes = {}

    def check() -> None:
        """What is there under a checkpoint's name is always all of it."""
        for path in numbered_checkpoints(folder / "killed/checkpoints"):
            assert wholes.setdefault(path.name, path.read_bytes()) == path.read_bytes(), path

    assert killer.run([*command, "--max-train-steps", 2], folder) == 0
    operations = assert_killed_is_continued(killer, folder, [*command, "--max-train-steps", 4], check=check)
    assert kinds(operations) == {"write", "fsync", "replace", "unlink"}
    for step in (3, 4):
        assert sum(f"checkpoints/.{step:07d}.pt" in operation for operation in operations) > 8
    assert set(wholes) > {"0000001.pt", "0000002.pt"}
    assert [path.name for path in numbered_checkpoints(folder / "killed/checkpoints")] == [
        f"000000{i}.pt" for i in (2, 3, 4)
    ]


def test_frozen_training_killed_at_every_write_fsync_and_rename(killer, tiny_vae, tiny_data, tmp_path):
    folder, data = tmp_path / "exps", tmp_path / "data"
    shutil.copytree(tiny_data, data)
    scripts.run("cache_latents.py", *cache_flags(data, tiny_vae[1]))
    flags = ("--data-dir", data, "--vae-latents-name", "latents", "--vae-ckpt", tiny_vae[1], "--output-dir", folder)
    command = ["train_ldm_only.py", *TINY, *TINY_SIT, *flags, *SHORT, "--enc-type", "none", "--exp-name", "killed"]
    assert killer.run([*command, "--max-train-steps", 2], folder) == 0
    operations = assert_killed_is_continued(killer, folder, [*command, "--max-train-steps", 4], sample=None)
    assert kinds(operations) == {"write", "fsync", "replace", "unlink"}


def test_preprocessing_killed_at_a_sample_of_its_operations(killer, good, tmp_path):
    folder = tmp_path / "data"
    command = ["preprocessing.py", *good_flags("preprocessing.py", good, folder), "--resolution", 32]
    operations = assert_killed_is_continued(killer, folder, command, constants={"preprocessing.SHARD_IMAGES": 4})
    assert sum(".safetensors" in operation and operation.startswith("replace") for operation in operations) == 5


def test_caching_killed_at_a_sample_of_its_operations(killer, good, tmp_path):
    folder = tmp_path / "cache"
    command = ["cache_latents.py", *cache_flags(good["data"], good["vae"], folder)]
    command += ["--num-workers", 1, "--pproc-batch-size", 3]
    operations = assert_killed_is_continued(killer, folder, command)
    assert sum(".safetensors" in operation and operation.startswith("replace") for operation in operations) == 5


@pytest.mark.parametrize("form", [(), ("--no-png",)])
def test_generation_killed_at_a_sample_of_its_operations(killer, good, tmp_path, form):
    folder = tmp_path / "samples"
    command = ["generate.py", *good_flags("generate.py", good, folder), "--num-fid-samples", 3]
    command += ["--pproc-batch-size", 2, *form]
    operations = assert_killed_is_continued(killer, folder, command)
    pngs = 0 if form else 3
    assert sum(operation.startswith("replace") for operation in operations) == pngs + 2 + 2  # parts; manifest and npz


def test_joint_training_killed_at_random_moments(killer, joint, whole_run):
    output, flags = joint
    often = ("--checkpointing-minutes", 0.003, "--max-train-steps", LAST)
    command = ["train_repae.py", *flags, *often, "--exp-name", "random"]
    moments, kills = random.Random(0), 0
    while kills < 2:
        code = killer.run(command, output / "random", after=moments.uniform(0.5, 3))
        if code == 0:  # it came to its end first: once more
            shutil.rmtree(output / "random")
        else:
            assert code == -9, killer.output(output / "random")[-2000:]
            kills += 1
    assert killer.run(command, output / "random") == 0
    assert_same_run(whole_run, output / "random")
