"""Which checkpoints are kept, and which one a run continues from."""

import json

import pytest
import torch

from errors import UserError
from training.checkpoints import CheckpointFolder
from weights.checkpoint_io import read_checkpoint


@pytest.fixture
def folder(tmp_path):
    """A run's checkpoints; `said` holds its messages."""
    said = []
    found = CheckpointFolder(tmp_path / "run/checkpoints", said.append)
    found.said = said
    return found


def save(folder: CheckpointFolder, *steps: int, permanent: bool = False, keep_last: int = 2) -> None:
    for step in steps:
        folder.save({"steps": step, "weights": torch.full((1000,), float(step))}, permanent, keep_last)


def steps(folder: CheckpointFolder) -> list[int]:
    return sorted(int(path.stem) for path in folder.directory.glob("*.pt"))


def spoil(folder: CheckpointFolder, step: int, how: str = "flip") -> None:
    path = folder.directory / f"{step:07d}.pt"
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((1,), float(step)).numpy().tobytes() * 3) + 1] ^= 1
    path.write_bytes(data if how == "flip" else data[: len(data) // 2])


def test_the_newest_rolling_checkpoints_stay_and_all_permanent_ones(folder):
    save(folder, 10, permanent=True)
    save(folder, 13, 17)
    assert steps(folder) == [10, 13, 17]
    save(folder, 20, permanent=True)
    save(folder, 24)
    assert steps(folder) == [10, 17, 20, 24]
    save(folder, 28, keep_last=1)
    assert steps(folder) == [10, 20, 28]


def test_without_the_list_of_rolling_checkpoints_nothing_is_deleted(folder):
    save(folder, 10, 11)
    folder.rolling_note.write_text("{")
    save(folder, 12, 13, 14, keep_last=1)
    assert steps(folder) == [10, 11, 14]


def test_damage_is_reported_and_the_checkpoint_before_is_used(folder):
    save(folder, 10, 20, 30, keep_last=3)
    spoil(folder, 30, "cut")
    spoil(folder, 20)
    assert folder.to_continue(0, None).name == "0000010.pt"
    assert [line.count("trying the one before") for line in folder.said] == [1, 1]
    assert "0000030.pt" in folder.said[0]
    assert "0000020.pt: damaged (checksum" in folder.said[1]
    save(folder, 15, keep_last=2)
    assert steps(folder) == [15, 30]  # what is written last stays, not what has the highest step
    with pytest.raises(UserError, match="0000030.pt: not a readable"):
        folder.to_continue(30, None)


def test_if_all_are_damaged_the_run_does_not_begin_again(folder):
    save(folder, 10, 20)
    spoil(folder, 10)
    spoil(folder, 20)
    with pytest.raises(UserError, match="all 2 checkpoints are damaged; put copies of them back, or choose another"):
        folder.to_continue(0, None)


def test_without_own_checkpoints_those_of_another_run_are_the_start(folder, tmp_path):
    other, where = CheckpointFolder(tmp_path / "other/checkpoints", print), str(tmp_path / "other")
    with pytest.raises(UserError, match="no checkpoints in"):
        folder.to_continue(0, where)
    save(other, 5, 10, 20, keep_last=3)
    spoil(other, 20)
    assert folder.to_continue(0, where) == other.directory / "0000010.pt"
    assert folder.to_continue(5, where) == other.directory / "0000005.pt"
    assert steps(other) == [5, 10, 20]
    save(folder, 6, 7)
    assert folder.to_continue(0, where) == folder.directory / "0000007.pt"
    assert folder.to_continue(5, where) == folder.directory / "0000007.pt"  # the same command goes on
    assert folder.to_continue(6, where) == folder.directory / "0000006.pt"


def test_the_best_is_kept_beside_and_never_deleted(folder):
    folder.directory.mkdir(parents=True)
    folder.best_note.write_text("{")  # damaged
    # after step 30 the run was interrupted and is at step 20 again; measure b cannot be compared to a
    measured = ((10, "a", 5.0, 10), (20, "a", 7.0, 10), (30, "a", 3.0, 30), (20, "a", 7.0, 30), (40, "b", 9.0, 40))
    for step, measure, value, best in (*measured, (50, "b", float("nan"), 40)):
        folder.save_if_best({"steps": step}, measure, "fid", {"fid": value})
        save(folder, step + 1, step + 2, keep_last=1)
        assert read_checkpoint(folder.directory / "best.pt")["steps"] == best
        assert json.loads(folder.best_note.read_text())["step"] == best
    assert json.loads(folder.best_note.read_text()) == {"measure": "b", "step": 40, "values": {"fid": 9.0}}
