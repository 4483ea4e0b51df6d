"""What errors say on machines that give too little, on other systems, and with REPAE_DEBUG."""

import ctypes
import errno
import importlib
import os
import resource
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import DistBackendError

from errors import UserError, explain, run_script
from forked import forkserver
from good import good_flags
from scripts import ROOT, run_in_process
from training.loop import peak_memory

CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000
IN_A_WORKER = "Caught {0} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n{0}: {1}\n"
FULL = "unable to allocate shared memory(shm) for file </torch_16_49_0>: No space left on device (28)"
SHARED_MEMORY = (
    RuntimeError(IN_A_WORKER.format("RuntimeError", FULL)),
    RuntimeError("unable to open shared memory object </torch_9_1> in read-write mode: Permission denied (13)"),
    RuntimeError("unable to mmap 160 bytes from file </torch_9_1>: Cannot allocate memory (12)"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. Its workers are out of shared memory."),
    RuntimeError("NCCL error in: x.cpp:3\nLast error:\nError while creating shared memory segment /dev/shm/nccl-aBc"),
    OSError(errno.ENOSPC, "No space left on device", "/dev/shm/pym-7"),
)
OPEN_FILES = (
    RuntimeError("Too many open files. Communication with the workers is no longer possible. Please ..."),
    RuntimeError("unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)"),
    RuntimeError("received 0 items of ancdata"),
    OSError(errno.ENFILE, "Too many open files in system", "data/images/00000.safetensors"),
    OSError(IN_A_WORKER.format("OSError", "[Errno 24] Too many open files: 'x'")),
)


def test_want_of_shared_memory_and_of_open_files_is_named_with_its_remedies_and_nothing_else_is():
    for error in SHARED_MEMORY:
        said = explain(error)
        for word in ("shared memory (/dev/shm) is too small", "--shm-size", "--ipc=host", "--num-workers 0"):
            assert word in said
        assert "\n" not in said and "free some space" not in said
    for error in OPEN_FILES:
        remedies = "raise the limit, by ulimit -n 65536, or use fewer --num-workers"
        assert explain(error) == f"too many open files; {remedies}"
    assert "--gradient-checkpointing" in explain(torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate 2 GiB"))
    assert "another process is gone" in explain(DistBackendError("NCCL error in: x.cpp, remote process exited or"))
    full = explain(OSError(errno.ENOSPC, "No space left on device", "exps/1.pt"))
    assert full.endswith("No space left on device: 'exps/1.pt'; free some space and run the same again")
    assert explain(OSError(errno.ENOENT, "No such file or directory", "/dev/shm/x")).endswith("'/dev/shm/x'")
    assert explain(RuntimeError("out of resource: shared memory, Required: 147456, Hardware limit: 101376")) is None
    assert explain(OSError(errno.ECHILD, "No child processes")) is None


def limited(kind: str, script: str, flags: list, said: Path) -> None:
    """In a process of its own: run a script with little shared memory, or few open files; writes what it says."""
    if kind == "memory":
        libc = ctypes.CDLL(None)
        steps = (
            libc.unshare(CLONE_NEWNS)
            or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
            or libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=64k")
        )
        if steps:
            said.write_text("no permission")
            return
    else:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 12,) * 2)
    done = run_in_process(script, *flags)
    said.write_text(f"{done.returncode}\n{done.stderr}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["memory", "files"])
@pytest.mark.parametrize("script", ["cache_latents.py", "train_vae.py", "evaluate.py"])
def test_a_script_that_lacks_them_ends_with_one_line(kind, script, good, tmp_path):
    said, tree = tmp_path / "said.txt", good["tree"]
    flags = {
        "train_vae.py": ["--stats-only", "--vae-ckpt", good["vae"], "--batch-size", 18],
        "evaluate.py": ["--samples", tree, "--reference", tree, "--metrics", "fid"],
    }.get(script, [])
    flags = [*good_flags(script, good, tmp_path), *flags, "--num-workers", 2]
    process = forkserver().Process(target=limited, args=(kind, script, flags, said))
    process.start()
    process.join(120)
    assert said.exists(), "it ended with a traceback"
    if said.read_text() == "no permission":
        pytest.skip("mounts are not permitted here")
    code, *lines = said.read_text().splitlines()
    assert code == "2", lines
    (line,) = [line for line in lines if line.startswith("error: ")]
    assert ("--shm-size" if kind == "memory" else "ulimit -n") in line
    assert "Traceback" not in lines


ERRORS = {
    "input": (UserError("--x 3: too many"), False),
    "missing file": (FileNotFoundError(errno.ENOENT, "No such file or directory", "weights.pt"), True),
    "full disk": (OSError(errno.ENOSPC, "No space left on device", "a"), True),
    "memory": (torch.OutOfMemoryError("CUDA out of memory."), True),
}


@pytest.mark.parametrize("debug", ["", "0", "1"])
@pytest.mark.parametrize("case", ERRORS)
def test_an_error_that_may_hide_a_fault_of_the_program_says_how_to_see_where(case, debug, monkeypatch, capsys):
    error, may_hide = ERRORS[case]

    def load_weights() -> None:
        raise error

    monkeypatch.setenv("REPAE_DEBUG", debug)
    with pytest.raises(SystemExit) as end:
        run_script(load_weights)
    assert end.value.code == 2
    *trace, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {explain(error)}")
    assert line.endswith(" (REPAE_DEBUG=1 shows where)") == (may_hide and debug != "1")
    assert any("in load_weights" in text for text in trace) == (debug == "1")


@pytest.mark.parametrize("script", sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "progress"))
def test_on_windows_every_script_names_wsl_in_one_line(script, monkeypatch, capsys):
    """Although Python for Windows lacks modules that scripts import."""
    ours = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("[a-z]*/__init__.py")}
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("resource", "fcntl"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "WSL" in line


def test_the_peak_of_memory_is_in_the_systems_unit(monkeypatch):
    cpu = torch.device("cpu")
    linux = peak_memory(cpu)
    assert 2**26 < linux < 2**40
    monkeypatch.setattr("sys.platform", "darwin")
    assert peak_memory(cpu) == pytest.approx(linux / 1024, rel=0.05)
