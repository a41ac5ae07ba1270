"""What a person sees while a run goes on: a progress bar on a terminal, plain lines otherwise, nothing on rank > 0."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from fp8train.config import RunConfig
from fp8train.conversion_report import ConversionReport
from fp8train.data import Batcher
from fp8train.distributed import World
from fp8train.models import count_parameters
from fp8train.trainer.assembly import shard_ranks
from fp8train.trainer.progress import Progress

GIB = 2**30


class Console:
    """Lines and progress of one run.

    Args:
        total_steps: steps of the whole run.
        enabled: false on every rank but the first: nothing is written.
        print_every: steps between progress lines where the stream is no terminal.
        label: precedes every line, such as "fp8 seed 1"; "" for none.
        stream: None is standard output as it is when a line is written.
    """

    def __init__(
        self,
        total_steps: int = 0,
        *,
        enabled: bool = True,
        print_every: int = 10,
        label: str = "",
        stream: TextIO | None = None,
    ) -> None:
        self.enabled = enabled
        self.total_steps = total_steps
        self.print_every = print_every
        self._label = f"[{label}] " if label else ""
        self._given_stream = stream
        self._bar: Any = None

    def info(self, text: str) -> None:
        """Write text, line by line, above the progress bar if there is one."""
        if not self.enabled:
            return
        text = "\n".join(self._label + line for line in text.splitlines())
        with self._going_on():
            if self._bar is not None:
                self._bar.write(text, file=self._stream)
            else:
                self._stream.write(text + "\n")
                self._stream.flush()

    def warn(self, text: str) -> None:
        """Write one line that begins with `warning:`."""
        self.info(f"warning: {text}")

    def step(self, row: Mapping[str, Any], eta_seconds: float | None) -> None:
        """Show a finished step: moves the bar on a terminal; otherwise a line every print_every steps and last."""
        if not self.enabled:
            return
        if self._stream.isatty():
            with self._going_on():
                self._move_bar(row)
        elif row["step"] % self.print_every == 0 or row["step"] == self.total_steps:
            self.info(progress_line(row, self.total_steps, eta_seconds))

    def close(self) -> None:
        """Finish the progress bar."""
        if self._bar is not None:
            with self._going_on():
                self._bar.close()
            self._bar = None

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        """What cannot be written, to a pipe without a reader or a full disk, is lost; the run goes on without it."""
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self.enabled = False
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"warning: standard output cannot be written ({error}); the run goes on without it\n")

    @property
    def _stream(self) -> TextIO:
        return self._given_stream or sys.stdout

    def _move_bar(self, row: Mapping[str, Any]) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total_steps, initial=row["step"] - 1, file=self._stream, unit="step", dynamic_ncols=True
            )
            self._bar.set_description(self._label.strip() or None)
        self._bar.set_postfix_str(_numbers(row), refresh=False)
        self._bar.update(row["step"] - self._bar.n)


def progress_line(row: Mapping[str, Any], total_steps: int, eta_seconds: float | None) -> str:
    """`step 120/5000 (2.4%) loss 3.214 lr 3.0e-04 gnorm 0.81 dt 412ms tok/s 318k mfu 44.1% mem 61.2GiB eta 0:33:10`."""
    step = row["step"]
    head = f"step {step}/{total_steps} ({100 * step / max(total_steps, 1):.1f}%)"
    eta = "" if eta_seconds is None else f" eta {timedelta(seconds=round(eta_seconds))}"
    return f"{head} {_numbers(row)}{eta}"


def norm_text(norm: float) -> str:
    """A gradient norm: 0.81, and three digits where two places do not show them: 0.000412, 3.52e+08."""
    return f"{norm:.2f}" if 0.1 <= norm < 1000 or norm == 0 else f"{norm:.3g}"


def rate_text(count: float) -> str:
    """A rate in three digits: 950, 31.8k, 318k, 1.25M."""
    for unit, size in (("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12)):
        scaled = count / size
        if scaled < 999.5 or unit == "T":
            digits = 0 if not unit or scaled >= 99.95 else 1 if scaled >= 9.995 else 2
            return f"{scaled:.{digits}f}{unit}"
    raise AssertionError("unreachable: T takes everything")


def _numbers(row: Mapping[str, Any]) -> str:
    loss = row["loss"]
    parts = [
        f"loss {loss:.3f}" if math.isfinite(loss) else "loss non-finite",
        *(["(skipped)"] if row.get("skipped") else []),
        f"lr {row['lr']:.1e}",
        f"gnorm {norm_text(row['grad_norm'])}",
        f"dt {row['step_seconds'] * 1000:.0f}ms",
        f"tok/s {rate_text(row['tokens_per_second'])}",
    ]
    if row.get("mfu") is not None:
        parts.append(f"mfu {100 * row['mfu']:.1f}%")
    if row.get("memory_bytes") is not None:
        parts.append(f"mem {row['memory_bytes'] / GIB:.1f}GiB")
    return " ".join(parts)


def introduction(config: RunConfig, world: World, report: ConversionReport, batcher: Batcher) -> str:
    """What a run is about to do, in lines."""
    step = f"{batcher.num_micro_batches} x {batcher.micro_batch_samples} sequences"
    ranks = f"{world.world_size} rank{'s' * (world.world_size > 1)}"
    over = shard_ranks(config, world.world_size)
    ranks += f", parameters sharded over {over}" if over > 1 else ""
    read = batcher.dataset.epochs(config.steps * config.global_batch_samples)
    epochs = ", ".join(f"{count:.3g} epochs of {name}" for name, count in read.items())
    return "\n".join(
        [
            f"model {config.model.name}: {count_parameters(config.model):,} parameters, seq_len {config.seq_len}",
            f"data {batcher.dataset.describe()}",
            f"recipe {report.recipe}: {report.planned_fp8_share():.1%} of the linears' FLOPs planned in FP8",
            report.backend_reason,
            f"step of {config.global_batch_tokens:,} tokens = {step} on {ranks}",
            *([f"{config.steps:,} steps read {epochs}"] if read else []),
            f"run folder {config.run_dir}",
        ]
    )


def ending(config: RunConfig, progress: Progress, stopped_by: str | None, saved: Path, fp8_share: float) -> str:
    """How a run ended, what part of its linears' FLOPs ran in FP8, and where its last checkpoint is."""
    if stopped_by is not None:
        return (
            f"stopped by {stopped_by} after step {progress.step} of {config.steps}; saved {saved}. "
            "The same command goes on from there."
        )
    demoted = len(progress.watchers.get("alarm", {}).get("demoted", ()))
    note = f", {demoted} linears demoted to BF16 by the recipe's alarm" if demoted else ""
    if progress.skipped_steps:
        note += f", {progress.skipped_steps} steps skipped, since loss or gradient was not finite"
    share = f", {fp8_share:.1%} of the linears' FLOPs in FP8 (coverage.json says which)" if fp8_share else ""
    return (
        f"finished {progress.step} steps in {progress.train_seconds:.1f} s of training{share}{note}: {config.run_dir}"
    )
