"""Where the numbers of a run go: metrics.jsonl always, wandb and TensorBoard on request. Rank 0 only.

What metrics.jsonl cannot take ends the run. wandb or TensorBoard that fails is announced in one line and dropped, and
training goes on; wandb online first falls back to offline.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from fp8train.errors import CheckpointError, TrainingError
from fp8train.whole_file import whole_file

Row = Mapping[str, Any]
Warn = Callable[[str], None]

METRICS_FILE = "metrics.jsonl"
WANDB_END_SECONDS = 120  # without a network wandb would wait for ever, and the job with it; `wandb sync` sends the rest
WANDB_INIT_SECONDS = 15  # wandb's own default blocks for 90 s where there is a key but no network

# Dense BF16 peaks in FLOP/s by a part of the device name, the longer name first; without sparsity.
# Source: NVIDIA data sheets.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "GH200": 989.4e12, "H100": 989.4e12, "H200": 989.4e12,
    "B200": 2250e12, "A100": 312e12, "L40S": 362e12,
}  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """Dense BF16 peak of a device in FLOP/s, or None where it is not known (every CPU)."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)


class Sink(Protocol):
    """A place that takes one row at a time."""

    name: str

    def write(self, row: Row) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """One strict-JSON object a line; a non-finite number becomes null and the row says `"nonfinite": true`.

    Raises:
        CheckpointError: the file cannot be opened.
        TrainingError: from write and close: it cannot be written; the line may be there in part. From write also: it
            is not under its name any more, so that the row would go nowhere.
    """

    name = METRICS_FILE

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise _not_written(path, error) from error

    def write(self, row: Row) -> None:
        line = to_json_line(row)
        if not self._is_there():
            raise TrainingError(
                f"{self._path}: has been removed or renamed while the run wrote to it; needs to stay there. Leave "
                f"the folder of a live run alone; the row of step {row['step']} is lost."
            )
        try:
            self._file.write(line)
        except OSError as error:
            with contextlib.suppress(OSError):  # closing tries to write what is left of the line once more
                self._file.close()
            raise self._lost(f"the row of step {row['step']}", error) from error

    def sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._lost("the last rows", error) from error

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            raise self._lost("the last rows", error) from error

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False
        except OSError:  # a file system that is away for a moment: writing says more
            return True

    def _lost(self, what: str, error: OSError) -> TrainingError:
        return TrainingError(
            f"{self._path}: {what} cannot be written ({error.strerror or error}); needs a writable run_dir with space. "
            "Make room: the same command goes on from the newest checkpoint."
        )


class WandbSink:
    """Mirror in Weights & Biases; the id is kept in the run folder, so that a resumed run goes on in the same chart."""

    def __init__(self, run_dir: Path, project: str, mode: str, config: Row) -> None:
        import wandb

        id_file = run_dir / "wandb_id"
        if not id_file.is_file():
            id_file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        self.name = f"wandb ({mode})"
        self._run = wandb.init(
            project=project,
            name=run_dir.name,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(run_dir),
            mode=mode,  # type: ignore[arg-type]
            config=dict(config),
            settings=wandb.Settings(
                init_timeout=WANDB_INIT_SECONDS, finish_timeout=WANDB_END_SECONDS, silent=True, console="off"
            ),
        )

    def write(self, row: Row) -> None:
        self._run.log({key: value for key, value in flat(row).items() if key != "step"}, step=row["step"])

    def close(self) -> None:
        self._run.finish()


class TensorBoardSink:
    """Event files in run_dir/tensorboard."""

    name = "tensorboard"

    def __init__(self, run_dir: Path, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def write(self, row: Row) -> None:
        for key, value in flat(row).items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, row["step"])
            elif isinstance(value, str):
                self._writer.add_text(key, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class Metrics:
    """All sinks of a run.

    Args:
        run_dir: run folder.
        wandb: "off", "offline" or "online".
        wandb_project: project name there.
        tensorboard: also write event files.
        config: resolved configuration, shown by wandb.
        resumed_step: step of the checkpoint that training goes on from; later rows of metrics.jsonl are removed.
        warn: takes the one line that announces that wandb or TensorBoard fails.

    Raises:
        CheckpointError: metrics.jsonl cannot be read or opened.
        TrainingError: from write and close: metrics.jsonl cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        wandb: str = "off",
        wandb_project: str = "fp8train",
        tensorboard: bool = False,
        config: Row | None = None,
        resumed_step: int = 0,
        warn: Warn,
    ) -> None:
        self._warn = warn
        self._sinks: list[Sink] = []
        self._reopen_wandb: Callable[[], Sink] | None = None
        path = run_dir / METRICS_FILE
        truncate_metrics(path, resumed_step)
        self._jsonl = JsonlSink(path)
        if tensorboard:
            self._open("tensorboard", lambda: TensorBoardSink(run_dir, resumed_step + 1))
        if wandb != "off":
            if wandb == "online":
                self._reopen_wandb = lambda: WandbSink(run_dir, wandb_project, "offline", config or {})
            self._open("wandb", lambda: WandbSink(run_dir, wandb_project, wandb, config or {}))

    def write(self, row: Row, sync: bool = False) -> None:
        """Give the row to metrics.jsonl, if `sync` also to the disk, then to every other sink; `step` is required."""
        self._jsonl.write(row)
        if sync:
            self._jsonl.sync()
        for sink in list(self._sinks):
            self._hand(sink, row)

    def sync(self) -> None:
        """Bring metrics.jsonl to the disk, before a checkpoint that stands for its rows."""
        self._jsonl.sync()

    def close(self) -> None:
        """Close every sink, metrics.jsonl last; another that fails to close is announced."""
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                self._warn(f"{sink.name}: closing failed ({_reason(error)})")
        self._sinks = []
        self._jsonl.close()

    def _hand(self, sink: Sink, row: Row) -> None:
        try:
            sink.write(row)
        except Exception as error:
            self._sinks.remove(sink)
            self._announce(sink.name, error, row)

    def _open(self, name: str, build: Callable[[], Sink]) -> None:
        try:
            self._sinks.append(build())
        except Exception as error:  # a sink is third-party code: whatever it raises, training goes on
            self._announce(name, error, None)

    def _announce(self, name: str, error: Exception, row: Row | None) -> None:
        reopen, self._reopen_wandb = (
            (self._reopen_wandb, None) if name.startswith("wandb") else (None, self._reopen_wandb)
        )
        if reopen is None:
            self._warn(f"{name}: {_reason(error)}; this sink is dropped, training goes on")
            return
        self._warn(f"{name}: {_reason(error)}; trying wandb offline")
        self._open("wandb (offline)", reopen)
        if row is not None and self._sinks and self._sinks[-1].name == "wandb (offline)":
            self._hand(self._sinks[-1], row)


def flat(row: Row) -> dict[str, Any]:
    """The row with each list of telemetry as its numbers: fp8/layers.0.mlp.up_proj/x/amax, as charts want them."""
    from fp8train.telemetry.table import COLUMNS_KEY, WHAT_IF_KEY  # needs torch, which `fp8train prepare` does without

    columns = row.get(COLUMNS_KEY)
    found: dict[str, Any] = {}
    for key, value in row.items():
        if columns is not None and isinstance(value, list) and key.count("/") > 1:
            found |= {f"{key}/{column}": one for column, one in zip(columns, value, strict=True) if one is not None}
        elif key not in (COLUMNS_KEY, WHAT_IF_KEY):
            found[key] = value
    return found


def to_json_line(row: Row) -> str:
    """The row as strict JSON with a line end; NaN and infinities become null, and then `"nonfinite": true` is added."""
    clean, finite = _strict(dict(row))
    if not finite:
        clean["nonfinite"] = True
    return json.dumps(clean, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All of metrics_lines' rows."""
    return [row for _, row in metrics_lines(path)]


def metrics_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line of a metrics.jsonl with its row, one at a time: a long run has more of them than one wants in memory.

    A last line that a crash cut short is left out.

    Raises:
        CheckpointError: another line is damaged; names its number.
    """
    with path.open("rb") as lines:  # decoded line by line, so that an error is of its own line
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line.decode())
                if not isinstance(row, dict) or type(row.get("step")) is not int:
                    raise ValueError(f"got {type(row).__name__} without an integer step")
            except ValueError as error:
                raise CheckpointError(
                    f"{path}: line {number} is damaged ({error}); needs one JSON object with its step. Delete the line."
                ) from error
            yield line, row


def missing_rows(path: Path, step: int, every: int) -> tuple[int, int] | None:
    """First and last step of rows up to `step` that a metrics.jsonl lacks: a machine that goes down may lose some."""
    last = max((row["step"] for _, row in metrics_lines(path)), default=0) if path.is_file() else 0
    wanted = step // every * every
    return (last + 1, wanted) if last < wanted else None


def truncate_metrics(path: Path, step: int) -> None:
    """Keep the rows up to `step`, as if the run had never gone further; no file is no rows.

    Raises:
        CheckpointError: a line is damaged, or the file cannot be read or written; it is as it was.
    """
    if not path.exists():
        return
    try:
        with whole_file(path) as kept:
            kept.writelines(line for line, row in metrics_lines(path) if row["step"] <= step)
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be written ({error.strerror or error}); needs a writable run_dir with space. Make room, or "
        "give another run_dir."
    )


def _strict(value: Any) -> tuple[Any, bool]:
    """(value without non-finite numbers, whether there were none)."""
    if isinstance(value, float) and not math.isfinite(value):
        return None, False
    if isinstance(value, dict):
        items = {key: _strict(inner) for key, inner in value.items()}
        return {key: inner for key, (inner, _) in items.items()}, all(finite for _, finite in items.values())
    if isinstance(value, list | tuple):
        inners = [_strict(inner) for inner in value]
        return [inner for inner, _ in inners], all(finite for _, finite in inners)
    return value, True


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
