"""Errors under torchrun: the rank that failed first is the one that is reported."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from fp8train.distributed import launch, rank_exit_code
from fp8train.errors import ConfigError, TrainingError
from tests.distributed.ranks import ROOT, free_port, rendezvous

PROGRAM = """
from fp8train.distributed import init, rank_exit_code
from fp8train.errors import TrainingError

def main(argv):
    with init(60, "cpu") as world:
        if world.main:
            print("ranks", world.all_reduce_sum(1.0), flush=True)
        else:
            world.all_reduce_sum(1.0)
            raise TrainingError("train: loss of rank 1 is not finite")
        world.all_reduce_sum(1.0)
    return 0

raise SystemExit(rank_exit_code(main))
"""


def test_first_failing_rank_is_the_root_cause_in_torchruns_report(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stdout == "ranks 2.0\n"
    root_cause = done.stderr.partition("Root Cause (first observed failure):")[2]
    assert "rank      : 1" in root_cause
    assert "TrainingError: train: loss of rank 1 is not finite" in root_cause


RESTARTED = """
import os, signal, time
from fp8train.distributed import init

again = os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"
if again and os.environ["RANK"] == "1":
    time.sleep(2)  # rank 0 is there before and looks for it
with init(60, "cpu") as world:
    ranks = int(world.all_reduce_sum(1.0))
    if again and world.main:
        print("ranks", ranks)
    if not again and world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.all_reduce_sum(0.0)
"""


@pytest.mark.parametrize("machines", [1, 2])
def test_ranks_that_torchrun_starts_again_meet(machines, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(RESTARTED)
    with free_port() as port:
        several = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
        place = several if machines == 2 else ["--standalone", "--nproc-per-node=2"]
        command = [sys.executable, "-m", "torch.distributed.run", *place, "--max-restarts=1"]
        agents = [
            subprocess.Popen(
                [*command, f"--node-rank={number}", str(program)], env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for number in range(machines)
        ]  # fmt: skip
        ended = [(*agent.communicate(timeout=240), agent.returncode) for agent in agents]
    assert [status for *_, status in ended] == [0] * machines, ended
    assert [out for out, *_ in ended] == ["ranks 2\n", ""][:machines]


@pytest.fixture
def torchrun(monkeypatch, tmp_path):
    """As a rank under torchrun: sets the rank, returns what torchrun would read after the command."""
    error_file = tmp_path / "error.json"
    for name, value in {
        "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_ERROR_FILE": str(error_file), "WORLD_SIZE": "2", "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)

    def command(rank, error):
        def main(argv):
            raise error

        monkeypatch.setenv("RANK", str(rank))
        try:
            status = rank_exit_code(main, [])
        finally:
            report = json.loads(error_file.read_text())["message"]["message"]
        return status, report

    return command


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("steps: is -1; needs at least 1."), 2, "fp8train: error: steps: is -1; needs at least 1.\n"),
        (TrainingError("train: loss is NaN."), 1, "fp8train: failed: train: loss is NaN.\n"),
    ],
    ids=["configuration", "training"],
)
def test_error_reaches_torchrun_from_any_rank_and_the_terminal_from_rank_0(torchrun, capsys, rank, error, status, line):
    got, report = torchrun(rank, error)
    assert got == status
    assert report == f"{type(error).__name__}: {error}"
    assert capsys.readouterr().err == (line if rank == 0 else "")


def test_defect_keeps_its_traceback(torchrun):
    with pytest.raises(ZeroDivisionError):
        torchrun(1, ZeroDivisionError("defect"))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[.../gloo/transport/tcp/pair.cc:553] Connection closed by peer\nmore"),
        dist.DistBackendError("NCCL"),
    ],
    ids=["gloo", "nccl"],
)
def test_rank_whose_peer_is_gone_waits_so_that_the_peer_is_the_root_cause(torchrun, monkeypatch, capsys, error):
    waits = []
    monkeypatch.setattr(launch.time, "sleep", waits.append)
    status, report = torchrun(0, error)
    assert (status, waits) == (1, [launch.YIELD_SECONDS])
    assert report.startswith("TrainingError: distributed: another rank is gone")
    assert capsys.readouterr().err.count("\n") == 1


def test_other_runtime_errors_do_not_wait(torchrun, monkeypatch):
    monkeypatch.setattr(launch.time, "sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(RuntimeError, match="shapes"):
        torchrun(0, RuntimeError("shapes cannot be multiplied"))


def test_without_torchrun_nothing_is_recorded(monkeypatch, capsys):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)

    def main(argv):
        raise ConfigError("wrong.")

    assert rank_exit_code(main, []) == 2
    assert capsys.readouterr().err == "fp8train: error: wrong.\n"


def test_launcher_refuses_a_port_in_use_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        several = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        done = subprocess.run(
            ["bash", str(ROOT / "launch" / "torchrun.sh")],
            env=os.environ | several, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"torchrun.sh: port {port} is in use on this machine; needs a free one. Set MASTER_PORT to another, alike on "
        "every machine.\n"
    )


END_OF_JOB = "sleep 1; kill -USR1 $PPID; while :; do sleep 0.1; done"


RUN_DIR = "\u00e4: b"  # YAML writes it in quotes


def run_batch_script(folder: Path, end: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it among programs that stand for Slurm's, of which srun ends as `end` says."""
    tools = {
        "scontrol": '[[ $1 == requeue ]] && printf "<%s>" "$@" && echo && exit; echo node1; sleep 0.2; echo node2',
        "srun": f'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done; {end}',
        "launch/torchrun.sh": 'echo "$MASTER_ADDR $NNODES $NODE_RANK"; printf "<%s>" "$@"; echo',
        ".venv/bin/python": f'exec "{sys.executable}" "$@"',
    }
    for name in ("launch", ".venv/bin", RUN_DIR):
        (folder / name).mkdir(parents=True)
    (folder / RUN_DIR / "result.json").write_text("of 10\n")  # of the job before
    for name, text in tools.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7"}
    return subprocess.run(
        ["bash", str(ROOT / "launch" / "slurm.sbatch"), f"run_dir={RUN_DIR}", *arguments], cwd=folder,
        env=os.environ | job | {"PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("exit 0", 0, ""),
        ("exit 3", 3, ""),
        (f"trap 'echo saves; echo of 20 > *b/result.json; exit 1' USR1; {END_OF_JOB}", 0, "saves\n<requeue><7>\n"),
        (f"trap 'exit 0' USR1; {END_OF_JOB}", 0, ""),
        (f"trap 'echo disk full; exit 1' USR1; {END_OF_JOB}", 1, "disk full\n"),
    ],
    ids=["finished", "failed", "end of the job", "finished at the end of the job", "failed at the end of the job"],
)  # fmt: skip
def test_batch_script_starts_every_node_on_the_first_ones_address_and_goes_back_into_the_queue(
    end, status, said, tmp_path
):
    done = run_batch_script(tmp_path, end)
    begun = "".join(f"node1 2 {node}\n<run_dir={RUN_DIR}>\n" for node in range(2))
    assert (done.returncode, done.stdout) == (status, begun + said), done.stderr


def test_batch_script_with_a_misspelt_key_is_one_line(tmp_path):
    done = run_batch_script(tmp_path, "exit 0", "stepz=1")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("fp8train: error: train: unknown key 'stepz'")


@pytest.mark.parametrize("command", ["export", "prepare", "search", "sensitivity", "generate", "doctor", "replay"])
def test_commands_of_one_process_refuse_several_ranks(command: str, monkeypatch: pytest.MonkeyPatch):
    for name, value in rendezvous(1, 2, 1).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"^{command}: got 2 ranks; needs one process. Leave torchrun out"):
        importlib.import_module(f"fp8train.{command}").main([])
