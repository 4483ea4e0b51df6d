"""Which checkpoints are kept, and which one a run continues from."""

import json

import pytest
import torch

from errors import UserError
from training.state import CheckpointFolder
from weights.checkpoint_io import latest_checkpoint, read_checkpoint


@pytest.fixture
def folder(tmp_path):
    """A run's checkpoints; `said` is what it said."""
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


def test_a_permanent_checkpoint_stays_whatever_is_saved_in_its_place(folder):
    save(folder, 10, permanent=True)
    save(folder, 10, 11, 12, keep_last=1)  # as when the run went back and came here again at another time
    assert steps(folder) == [10, 12]
    save(folder, 12, permanent=True)
    save(folder, 13, 14, keep_last=1)
    assert steps(folder) == [10, 12, 14]


@pytest.mark.parametrize("lost", ["", "{", '{"steps": 3}', '{"steps": ["x"]}', "[]"])
def test_without_the_list_of_rolling_checkpoints_nothing_is_deleted(folder, lost):
    save(folder, 10, 11)
    folder.rolling_note.write_text(lost)
    save(folder, 12, 13, 14, keep_last=1)
    assert steps(folder) == [10, 11, 14]


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_damage_is_reported_and_the_checkpoint_before_is_used(folder, how):
    save(folder, 10, 20, 30, keep_last=9)
    spoil(folder, 30, how)
    spoil(folder, 20)
    path = folder.to_continue(0, None)
    assert path.name == "0000010.pt"
    assert [line.count("trying the one before") for line in folder.said] == [1, 1]
    assert "0000030.pt" in folder.said[0]
    assert "0000020.pt: damaged (checksum" in folder.said[1]
    assert steps(folder) == [10, 20, 30]  # nothing is touched before the run is accepted
    folder.take_over(0, 10, folder.directory.parent / "metrics.jsonl")
    assert steps(folder) == [10]
    assert latest_checkpoint(folder.directory) == path
    assert {path.name for path in folder.directory.glob("*.damaged")} == {"0000020.pt.damaged", "0000030.pt.damaged"}


def test_if_all_are_damaged_the_run_does_not_begin_again(folder):
    save(folder, 10, 20)
    spoil(folder, 10)
    spoil(folder, 20)
    with pytest.raises(UserError, match="all 2 checkpoints are damaged; put copies of them back, or choose another"):
        folder.to_continue(0, None)


def test_the_checkpoint_asked_for_by_resume_step_is_used_or_nothing(folder):
    save(folder, 10, 20, 30, keep_last=9)
    assert folder.to_continue(20, None).name == "0000020.pt"
    spoil(folder, 20)
    with pytest.raises(UserError, match="0000020.pt: damaged"):
        folder.to_continue(20, None)
    with pytest.raises(UserError, match="0000025.pt: no such file; its folder holds"):
        folder.to_continue(25, None)


def test_going_back_puts_later_checkpoints_aside_even_if_it_is_interrupted(folder):
    save(folder, 10, 20, 30, keep_last=9)
    log = folder.directory.parent / "metrics.jsonl"
    log.write_text('{"step": 30}\n')
    folder.superseded(20).with_suffix(".tmp").mkdir()
    (folder.directory / "0000030.pt").rename(folder.superseded(20).with_suffix(".tmp") / "0000030.pt")  # killed here
    assert folder.to_continue(20, None).name == "0000020.pt"
    folder.take_over(20, 20, log)
    assert steps(folder) == [10, 20]
    assert {path.name for path in folder.superseded(20).iterdir()} == {"0000030.pt", "metrics.jsonl"}
    save(folder, 25, keep_last=9)
    assert folder.to_continue(20, None).name == "0000025.pt"  # going back is done once
    assert "went back to step 20 before" in folder.said[-1]


def test_without_own_checkpoints_those_of_another_run_are_the_start(folder, tmp_path):
    other = CheckpointFolder(tmp_path / "other/checkpoints", print)
    with pytest.raises(UserError, match="no checkpoints in"):
        folder.to_continue(0, str(tmp_path / "other"))
    save(other, 10, 20)
    spoil(other, 20)
    assert folder.to_continue(0, str(tmp_path / "other")) == other.directory / "0000010.pt"
    folder.take_over(0, 10, tmp_path / "none")
    assert steps(other) == [10, 20]  # another run's files are left as they are
    save(folder, 11)
    assert folder.to_continue(0, str(tmp_path / "other")) == folder.directory / "0000011.pt"


@pytest.mark.parametrize("moved", [("best.pt",), ("best.pt", "best.json")])
def test_the_best_goes_aside_with_its_note_even_if_that_is_interrupted(folder, moved):
    save(folder, 10, 20, keep_last=9)
    folder.save_if_best({"steps": 20}, "a", "fid", {"fid": 1.0})
    aside = folder.superseded(10).with_suffix(".tmp")
    aside.mkdir()
    for name in moved:
        (folder.directory / name).rename(aside / name)  # killed here
    folder.take_over(10, 10, folder.directory.parent / "metrics.jsonl")
    assert {path.name for path in folder.superseded(10).iterdir()} == {"0000020.pt", "best.pt", "best.json"}


@pytest.mark.parametrize("note", ["{", "[]", '{"measure": "a"}'])
def test_a_damaged_note_of_the_best_is_taken_for_none(folder, note):
    folder.directory.mkdir(parents=True)
    folder.best_note.write_text(note)
    folder.save_if_best({"steps": 5}, "a", "fid", {"fid": 3.0})
    assert json.loads(folder.best_note.read_text())["values"] == {"fid": 3.0}


def test_checkpoints_that_a_link_leads_to_must_be_there(folder, tmp_path):
    folder.directory.parent.mkdir()
    folder.directory.symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError, match="a link to .*unmounted, which is not there; mount or mend it"):
        folder.to_continue(0, None)


def test_the_best_is_kept_beside_and_never_deleted(folder):
    folder.save_if_best({"steps": 5}, "a", "fid", {"fid": 3.0})
    folder.save_if_best({"steps": 6}, "a", "fid", {"fid": float("nan")})
    save(folder, 7, 8, 9, keep_last=1)
    assert read_checkpoint(folder.directory / "best.pt")["steps"] == 5
    assert json.loads(folder.best_note.read_text()) == {"measure": "a", "step": 5, "values": {"fid": 3.0}}
