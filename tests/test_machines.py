"""Training on two machines, which are two launches on the loopback address, by hand and under SLURM."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from forked import free_port
from scripts import ENVIRONMENT, ROOT, assert_same_beginning, records, run, wait_for_log

pytestmark = pytest.mark.slow
STEPS = 10
LOOPBACK = {**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo"}
# What SLURM's commands do, for a job on two machines. Nothing else of it is there.
SLURM = {
    "srun": """
        while [[ $1 == -* ]]; do shift; done
        for node in 0 1; do SLURM_NODEID=$node SLURM_PROCID=$node "$@" & tasks+=($!); done
        code=0
        for task in "${tasks[@]}"; do wait "$task" || code=1; done
        exit $code""",
    "scontrol": """
        if [[ $* == "show hostnames machine[0-1]" ]]; then printf '127.0.0.1\\nmachine1\\n'; exit; fi
        echo "$*" >> "$REQUESTS" """,
}


@contextlib.contextmanager
def started(*lines: list[str], environment: dict[str, str], log: Path):
    """Processes of these command lines, which write to `log`; none of their descendants outlives the block."""
    processes = []
    try:
        with log.open("a") as output:
            options = {"cwd": ROOT, "env": environment, "stdout": output, "stderr": output, "start_new_session": True}
            processes += [subprocess.Popen(line, **options) for line in lines]
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                # torchrun gives those that it starts sessions of their own, which killpg would not reach
                for descendant in [*psutil.Process(process.pid).children(recursive=True), process]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        descendant.kill()
                process.wait()


def two_launches(*training: object, options: tuple[str, ...] = ()) -> list[list[str]]:
    """The command lines of two machines, each with one process, as docs/many-machines.md gives them."""
    launcher = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_id=joint", *options)
    rendezvous = ("--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--local_addr=127.0.0.1")
    return [[sys.executable, *launcher, *rendezvous, *map(str, training)]] * 2


def test_two_machines_do_as_one_process(joint, whole_run, tmp_path):
    """Even if a process is killed and torchrun replaces it."""
    output, flags = joint
    said, log = tmp_path / "said.txt", output / "two-machines/metrics.jsonl"
    lengths = ("--max-train-steps", STEPS, "--checkpointing-steps", 1)
    options = ("--max-restarts=1",)
    lines = two_launches("train_repae.py", *flags, "--exp-name", "two-machines", *lengths, options=options)
    environment = {**LOOPBACK, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with started(*lines, environment=environment, log=said) as machines:
        wait_for_log(log, 2, machines[0])
        (training,) = psutil.Process(machines[1].pid).children()
        training.kill()
        codes = [machine.wait(timeout=240) for machine in machines]
    assert codes == [0, 0], said.read_text()[-4000:]
    assert "4 images a step = 2 processes x 1 accumulation steps x 2" in said.read_text()
    assert "another process is gone" in said.read_text()
    assert "continuing after step" in said.read_text()
    assert [record["step"] for record in records(log)] == list(range(1, STEPS + 1))
    assert_same_beginning(whole_run, log.parent, steps=3)


@pytest.fixture
def slurm_job(joint, tmp_path) -> dict[str, str]:
    """The environment in which SLURM starts a job's script; what it asks of scontrol goes to requests.txt."""
    output, flags = joint
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in SLURM.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "71", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "machine[0-1]", "SLURM_CPUS_PER_TASK": "1"}
    settings = {"GPUS_PER_NODE": "1", "PYTHON": sys.executable, "OUTPUT_DIR": str(tmp_path), "PORT": str(free_port())}
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    settings["DATA_DIR"] = str(given.pop("--data-dir"))
    del given["--output-dir"]
    more = {"--exp-name": "job", "--max-train-steps": STEPS, "--checkpointing-steps": 1}
    settings["TRAIN_FLAGS"] = " ".join(f"{name} {value}" for name, value in {**given, **more}.items())
    path = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "TMPDIR": str(tmp_path),
        "REQUESTS": str(tmp_path / "requests.txt"),
    }
    return {**LOOPBACK, **job, **settings, **path, "SLURMD_NODENAME": "127.0.0.1"}


def test_a_slurm_job_near_its_limit_saves_and_queues_itself_again(slurm_job, joint, whole_run, tmp_path):
    log, said, requests = (tmp_path / name for name in ("job/metrics.jsonl", "said.txt", "requests.txt"))
    with started(["bash", "docs/train.sbatch"], environment=slurm_job, log=said) as (job,):
        wait_for_log(log, 3, job)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=120) != 0
    assert requests.read_text() == "requeue 71\n"
    saved = len(records(log))
    assert 3 <= saved < STEPS
    assert (tmp_path / f"job/checkpoints/{saved:07d}.pt").is_file()
    assert f"stopped by signal {signal.SIGTERM.value} after step {saved}" in said.read_text()
    assert_same_beginning(whole_run, log.parent, steps=3)
    more = ("--exp-name", "job", "--output-dir", tmp_path, "--max-train-steps", saved + 1)
    assert f"continuing after step {saved}" in run("train_repae.py", *joint[1], *more).stdout
