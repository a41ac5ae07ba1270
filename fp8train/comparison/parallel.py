"""Several runs at a time on one machine, each trained in a process of its own that gets its share of the threads."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TextIO

import torch

from fp8train.config import RunConfig
from fp8train.distributed import World
from fp8train.errors import DivergedError, TrainingError, UserError
from fp8train.trainer.console import Console
from fp8train.trainer.loop import Trainer
from fp8train.trainer.run_folder import RESULT_FILE
from fp8train.trainer.stopping import StopRequest

POLL_SECONDS = 0.5
SENT_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGXCPU)
FACTS = ("finished", "diverged", "init_hash", "stream_hash")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A run to train: its configuration and what precedes its lines on the console."""

    config: RunConfig
    label: str


@dataclass(kw_only=True, slots=True)
class _Worker:
    number: int
    job: Job
    slot: int
    process: BaseProcess
    outcome: Connection
    stop: Connection  # its end, closed or with this process, asks the worker to save and stop


def train_in_processes(
    jobs: Sequence[Job], processes: int, begin: Callable[[int], None], done: Callable[[int, dict[str, Any]], None]
) -> bool:
    """Train the jobs in their order, `processes` at a time.

    A signal to stop (StopRequest) or a run that stops early (its time limit) ends them all: each saves a checkpoint,
    none is begun.

    Args:
        begin: called with a job's number before it is started, to complete its configuration and to announce it.
        done: called with its number and FACTS of its result when it has finished or diverged.

    Returns:
        bool: whether all of them did.

    Raises:
        UserError, TrainingError: as a run raised it (but for one that diverged), after the others were stopped.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // processes)
    waiting, live, stopping = list(range(len(jobs))), list[_Worker](), False
    with StopRequest() as stop, _ended(live):
        while live or (waiting and not stopping):
            while waiting and len(live) < processes and not stopping:
                number = waiting.pop(0)
                begin(number)
                slot = min(set(range(processes)) - {worker.slot for worker in live})
                live.append(_start(context, number, jobs[number], slot, threads, processes))
            ready = wait([worker.outcome for worker in live], timeout=POLL_SECONDS)
            stopping = (
                stopping or stop.reason is not None
            )  # first: Ctrl-C reaches a worker that is not yet training too
            for worker in [worker for worker in live if worker.outcome in ready]:
                live.remove(worker)
                facts = _outcome(worker, stopping)
                if facts["finished"] or facts["diverged"]:
                    done(worker.number, facts)
                else:
                    stopping = True
            if stopping:
                for worker in live:
                    worker.stop.close()
    return not waiting and not stopping


def _start(context: Any, number: int, job: Job, slot: int, threads: int, processes: int) -> _Worker:
    outcome, outcome_sender = context.Pipe(duplex=False)
    told, stop = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, slot, threads, processes, outcome_sender, told), name=job.label)
    process.start()
    outcome_sender.close()  # or the end of the process would not be seen
    told.close()
    return _Worker(number=number, job=job, slot=slot, process=process, outcome=outcome, stop=stop)


def _outcome(worker: _Worker, stopping: bool) -> dict[str, Any]:
    """FACTS of a finished process; raises what it raised."""
    try:
        value = worker.outcome.recv()
    except EOFError:
        value = None
    worker.process.join()
    if isinstance(value, Exception):
        raise value
    if value is None and not stopping:
        raise TrainingError(f"compare: the process of {worker.job.label} {_ending(worker.process.exitcode)}")
    return value or dict.fromkeys(FACTS)


def _ending(code: int | None) -> str:
    """How a process ended that gave no result, and what to do, from its status: negative is a signal's number."""
    if code is None or code >= 0:
        return f"ended with status {code}. Its output says why."
    name = signal.Signals(-code).name
    if -code not in SENT_FROM_OUTSIDE:
        return f"crashed ({name}). Its output, or the system's log, says where."
    return (
        f"was ended by {name}, which another process sent, e.g. the system for lack of memory (its log says so). If "
        "memory is short lower compare.parallel; the same command goes on from what is saved."
    )


@contextlib.contextmanager
def _ended(live: list[_Worker]) -> Iterator[None]:
    """Leaves no process behind: on an error they are asked to save and stop, and waited for."""
    try:
        yield
    finally:
        for worker in live:
            worker.stop.close()
        for worker in live:
            worker.process.join()


def _work(job: Job, slot: int, threads: int, processes: int, outcome: Connection, told: Connection) -> None:
    """Body of a process: it saves and stops when the parent closes its end of `told`, or dies."""
    torch.set_num_threads(threads)
    device, sharing = torch.device("cpu"), processes
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        device, sharing = torch.device("cuda", slot % gpus), -(-processes // gpus)
        torch.cuda.set_device(device)
    config = job.config
    lines = _Lines(sys.stdout)
    console = Console(config.steps, print_every=config.log.print_every, label=job.label, stream=lines)  # type: ignore[arg-type]
    try:
        trainer = Trainer(config, World(device=device), console, runs_on_device=sharing)
        result = trainer.run(lambda: "its comparison" if told.poll() else None)
        value: dict[str, Any] | Exception = {name: getattr(result, name) for name in FACTS}
    except DivergedError:
        content = json.loads((Path(str(config.run_dir)) / RESULT_FILE).read_text(encoding="utf-8"))
        value = {name: content[name] for name in FACTS}
    except (UserError, TrainingError) as error:
        value = error
    except KeyboardInterrupt:  # the parent got it too, and says so
        sys.exit(130)
    with contextlib.suppress(BrokenPipeError):  # the parent is gone; what was trained is saved
        outcome.send(value)


class _Lines:
    """Standard output that is no terminal: progress bars of several runs would overwrite one another."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return False
