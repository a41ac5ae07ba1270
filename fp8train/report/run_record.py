"""What a run left in its folder, read back: metrics, result, configuration, environment, coverage."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import yaml

from fp8train.arguments import flattened
from fp8train.backends import get_backend
from fp8train.config import config_from_dict
from fp8train.config_sections import LogConfig
from fp8train.errors import BackendError, ConfigError, DataError
from fp8train.telemetry.statistics import STATS
from fp8train.telemetry.table import COLUMNS_KEY, WHAT_IF_KEY
from fp8train.units import finite

TRAIN_KEYS = ("loss", "lr", "grad_norm", "tokens_seen", "tokens_per_second", "process_step")
# configuration and environment of a run's first steps, where it went on with another
EARLIER, EARLIER_PLACE = "config.until_step_*.yaml", "environment.until_step_*.json"
TELEMETRY = "fp8/"  # what the keys of telemetry begin with
# what sharded runs have a choice of, and what earlier versions, which had none, did
SHARDING = {"parallel.gather": "fp32", "parallel.reshard_after_forward": True}
EVAL_KEYS = ("eval_loss", "eval_loss_bf16", "bits_per_byte", "bits_per_byte_bf16")
NUMBER, NULL = (int, float), type(None)
NUMBER_OR_NULL = (*NUMBER, NULL)  # null stands for what is not finite, or not known
OF_ROWS = frozenset(NUMBER_OR_NULL)  # types of the values in metrics.jsonl; without bool
COUNTS = {"fp8_rows": NUMBER, "other_rows": NUMBER, "unplanned_rows": NUMBER_OR_NULL}
# what a file must say of these where it says anything, for what is made of them; see odd_part
KINDS: dict[str, dict[str, Any]] = {
    "result.json": {
        **dict.fromkeys(("tokens_seen", "skipped_steps", "train_seconds", "peak_memory_bytes"), NUMBER_OR_NULL),
        "parameters": NUMBER_OR_NULL, "memory_bytes": {...: NUMBER}, "steps": NUMBER,
        "diverged": ({"step": int, "reason": str}, NULL),
    },
    "config.yaml": {"seed": int, "model": {}, "data": {}, "optim": {}, "log": {"skip_steps": (int, NULL)}},
    "environment.json": {"world_size": int, "runs_on_device": int, "device": {}},
    "coverage.json": {
        "fp8_flops_share": NUMBER_OR_NULL, "refused_kernels": [str], "decoded": [str],
        "linears": [{"fqn": str, "shape": [int, int, int], "gemms": {...: COUNTS}}],
    },
    "recipe.yaml": {"rules": [{"use": str}], "precisions": {...: {"noise": NUMBER_OR_NULL}}},
}  # fmt: skip
WORDS = {int: "a number", float: "a number", str: "text"}
OF_SOURCE = ("eval_loss/", "eval_loss_bf16/")  # what keys with the loss of one source of a mix begin with


Arms: TypeAlias = "Mapping[str, Mapping[int, RunRecord]]"  # arm -> seed -> run; the baseline comes first


@dataclasses.dataclass(kw_only=True, slots=True)
class Table:
    """Rows of metrics.jsonl as columns: `steps` int64 [rows], ascending and unique; `columns` name -> float64
    [rows], NaN where absent or not finite.
    """

    steps: np.ndarray
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.steps)

    def last(self, name: str) -> float | None:
        """The value of the last row; None where it is absent or not finite."""
        return finite(self.columns[name][-1]) if len(self) else None

    def first(self, name: str) -> float | None:
        """The value of the first row; None where it is absent or not finite."""
        return finite(self.columns[name][0]) if len(self) else None

    def last_of_sources(self) -> dict[str, float | None]:
        """Source of a mix -> its held-out loss in the last row; empty for one source."""
        keys = (key for key in self.columns if key.startswith(OF_SOURCE[0]))
        return {key.removeprefix(OF_SOURCE[0]): self.last(key) for key in keys}

    def empty(self) -> Table:
        """The same columns without a row."""
        return Table(steps=self.steps[:0], columns={name: values[:0] for name, values in self.columns.items()})


@dataclasses.dataclass(kw_only=True, slots=True)
class RunRecord:
    """One run folder.

    path: the folder. train, evals: rows of metrics.jsonl. result: result.json, facts that hold for the whole run.
    config, environment, coverage, recipe: the files of those names; recipe is text. missing ones are empty.
    telemetry, damaged: as in MetricsFile.
    """

    path: Path
    train: Table
    evals: Table
    result: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    coverage: dict[str, Any] = dataclasses.field(default_factory=dict)
    recipe: str = ""
    telemetry: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    damaged: list[str] = dataclasses.field(default_factory=list)

    @property
    def diverged(self) -> dict[str, Any] | None:
        """{"step", "reason"} of a run that has no loss at its end: training recorded that it ended for that, or the
        last held-out loss (the last training loss where nothing is held out) is not finite. None for any other.
        """
        what, table, column = (
            ("held-out loss", self.evals, "eval_loss") if len(self.evals) else ("loss", self.train, "loss")
        )
        if self.result.get("diverged") is None and table.last(column) is None:
            return {"step": int(table.steps[-1]), "reason": f"{what} is not finite"}
        return self.result.get("diverged")

    @property
    def speeds(self) -> np.ndarray:
        """Tokens per second of the logged steps, without the first log.skip_steps of every process."""
        speed, number = (self.train.columns[key] for key in ("tokens_per_second", "process_step"))
        number = np.where(np.isnan(number), self.train.steps, number)  # an earlier version did not record it
        return speed[(number > self.skip_steps) & np.isfinite(speed)]

    @property
    def skip_steps(self) -> int:
        """First steps that no speed is taken from; a run that does not say has the default."""
        given = self.config.get("log", {}).get("skip_steps")
        return LogConfig().skip_steps if given is None else int(given)

    @property
    def optimizers(self) -> dict[float, dict[str, Any]]:
        """Settings of the optimizer by the last step that they hold for; infinity for those at the end."""
        found = {float(file.stem.rpartition("_")[2]): read_mapping(file) for file in self.path.glob(EARLIER)}
        parts = [*sorted(found.items()), (math.inf, self.config)]
        return {step: flattened(config.get("optim") or {}) for step, config in parts}

    @property
    def way(self) -> dict[str, Any]:
        """How and on what it ran: keys of config.yaml and environment.json; a derived micro-batch by its size, and
        what is sharded over all ranks by their number.

        What an earlier version did not record is absent, or None.
        """
        way = flattened(self.config) | flattened(self.environment)
        ranks = int(way.get("world_size") or self.result.get("world_size") or 1)
        if way.get("parallel.strategy") == "fsdp" and ranks > 1:
            way = SHARDING | way
            way["parallel.shard_ranks"] = way.get("parallel.shard_ranks") or ranks
        else:
            way = {key: value for key, value in way.items() if key not in SHARDING}
        if "micro_batch_samples" in way and way["micro_batch_samples"] is None:
            with contextlib.suppress(ConfigError):  # the configuration of another version
                way["micro_batch_samples"] = config_from_dict(self.config).micro_batch(ranks)
        return way

    @property
    def places(self) -> list[dict[str, Any]]:
        """environment.json of each part of the run, with dotted keys, in the order of the steps."""
        files = sorted(self.path.glob(EARLIER_PLACE), key=lambda file: int(file.stem.rpartition("_")[2]))
        return [flattened(part) for part in (*map(read_mapping, files), self.environment)]

    @property
    def noise(self) -> float:
        """Largest noise that a rule of the recipe puts on operands: 0 but for a placebo."""
        document = yaml.safe_load(self.recipe) if self.recipe else {}
        used = {rule.get("use") for rule in document.get("rules", ())}
        precisions = document.get("precisions", {})
        return max((float(precisions[name].get("noise") or 0) for name in used & set(precisions)), default=0.0)

    @property
    def emulates(self) -> bool:
        """Whether its backend emulates FP8; where the run did not record that, as the backend of that name does."""
        if "emulates" in self.coverage:
            return bool(self.coverage["emulates"])
        try:
            return get_backend(str(self.coverage.get("backend"))).emulates
        except BackendError:  # a name that this version does not know says nothing
            return False


@dataclasses.dataclass(kw_only=True, slots=True)
class MetricsFile:
    """Content of a metrics.jsonl.

    train, evals: rows with a loss, rows with an eval_loss. telemetry: step and fp8/ keys of the rows that have them.
    damaged: what is wrong with each line that was left out, because that was asked for.
    """

    train: Table
    evals: Table
    telemetry: list[dict[str, Any]]
    damaged: list[str]


def read_run(folder: str | Path, *, skip_damaged: bool = False) -> RunRecord:
    """Read a run folder.

    Args:
        skip_damaged: leave damaged lines of metrics.jsonl out and note them, in place of refusing the file.

    Raises:
        DataError: no such folder, no metrics, or a damaged file (the message names file and line).
    """
    path = Path(folder)
    if not path.is_dir():
        raise DataError(f"compare: {path} is not a folder; needs a run folder. Give the run_dir of a finished run.")
    metrics = read_metrics(path / "metrics.jsonl", skip_damaged=skip_damaged)
    recipe = path / "recipe.yaml"
    read_mapping(recipe)  # refuses what is no document
    return RunRecord(
        path=path,
        train=metrics.train,
        evals=metrics.evals,
        telemetry=metrics.telemetry,
        damaged=metrics.damaged,
        result=read_mapping(path / "result.json"),
        config=read_mapping(path / "config.yaml"),
        environment=read_mapping(path / "environment.json"),
        coverage=read_mapping(path / "coverage.json"),
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
    )


def first_run(arms: Arms) -> RunRecord:
    """The first seed of the first arm."""
    return next(iter(next(iter(arms.values())).values()))


def read_metrics(path: Path, *, skip_damaged: bool = False) -> MetricsFile:
    """Read metrics.jsonl.

    A step that was logged twice (a resumed run repeats those after its checkpoint) counts once, as logged last.

    Args:
        skip_damaged: leave damaged lines out and note them.

    Raises:
        DataError: the file is missing or empty, or a line is not one strict-JSON object with an integer step.
    """
    if not path.is_file():
        raise DataError(
            f"compare: {path} does not exist; needs the metrics of a run. Give the run_dir of a run that trained."
        )
    train: dict[int, list[Any]] = {}
    evals: dict[int, list[Any]] = {}
    sources: dict[str, None] = {}  # keys of the sources of a mix, each once
    telemetry: dict[int, dict[str, Any]] = {}
    damaged = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):  # cut short by a crash, as fp8train.metrics.read_metrics has it
                break
            try:
                row = _parse_line(line, path, number)
                kept = _telemetry(row, path, number) if TELEMETRY.encode() in line else {}
                if TRAIN_KEYS[0] in row:
                    train[row["step"]] = _numbers(row, TRAIN_KEYS, path, number)
                if EVAL_KEYS[0] in row:
                    sources |= dict.fromkeys(key for key in row if key.startswith(OF_SOURCE))
                    evals[row["step"]] = _numbers(row, (*EVAL_KEYS, *sources), path, number)
            except DataError as error:
                if not skip_damaged:
                    raise
                damaged.append(str(error))
                continue
            if kept:
                telemetry.setdefault(row["step"], {"step": row["step"]}).update(kept)
    if not train:
        raise DataError(f"{path}: has no training step; needs at least one row with a loss. Let the run train first.")
    tables = {"train": _table(train, TRAIN_KEYS), "evals": _table(evals, (*EVAL_KEYS, *sources))}
    return MetricsFile(**tables, telemetry=[telemetry[step] for step in sorted(telemetry)], damaged=damaged)


def _parse_line(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = DECODER.decode(line.decode())
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8
        detail = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise _damaged(path, number, detail) from error
    if not isinstance(row, dict) or type(row.get("step")) is not int or abs(row["step"]) >= 2**63:
        raise _damaged(path, number, "not an object with an integer step")
    return row


def _numbers(row: Mapping[str, Any], keys: Sequence[str], path: Path, number: int) -> list[Any]:
    """The values of those keys; what is absent is None."""
    values = [row.get(key) for key in keys]
    if not OF_ROWS.issuperset(map(type, values)):
        odd = next(key for key in keys if type(row.get(key)) not in OF_ROWS)
        raise _damaged(path, number, f"{odd} is {row[odd]!r}")
    return values


def _telemetry(row: Mapping[str, Any], path: Path, number: int) -> dict[str, Any]:
    """The keys of telemetry in a row, of which `samples` can be made; to make them takes as long as to read the row."""
    kept = {key: value for key, value in row.items() if key.startswith(TELEMETRY)}
    try:
        columns = len(dict.fromkeys(kept.get(COLUMNS_KEY, STATS)))
        set(kept.get(WHAT_IF_KEY, ()))
        odd = [key for key, numbers in kept.items() if key.count("/") > 1 and len(numbers) != columns]
    except TypeError as error:
        raise _damaged(path, number, f"telemetry: {error}") from error
    if odd:
        raise _damaged(path, number, f"telemetry: {odd[0]} has not one number for each of {columns} columns")
    return kept


def _damaged(path: Path, number: int, detail: str) -> DataError:
    return DataError(
        f"{path}:{number}: damaged line ({detail}); needs one JSON object with an integer step and finite "
        "numbers. Repeat the run, or leave damaged lines out with compare.skip_damaged=true."
    )


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _integer(text: str) -> int:
    if len(text) > 300:  # no float is as large
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


# json.loads would build one for every line
DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=_integer)


def _table(rows: Mapping[int, list[Any]], keys: tuple[str, ...]) -> Table:
    """Rows in the order of their steps; one that ends before the last keys has none of them."""
    steps = np.array(sorted(rows), dtype=np.int64)
    filled = [rows[step] + [None] * (len(keys) - len(rows[step])) for step in steps.tolist()]
    values = np.array(filled, dtype=np.float64)  # None becomes NaN
    values = values.reshape(len(steps), len(keys))
    return Table(steps=steps, columns={key: values[:, index] for index, key in enumerate(keys)})


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON or YAML file that holds a mapping; {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        content = DECODER.decode(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(
            f"{path}: cannot be read ({' '.join(str(error).split())}); needs {path.suffix[1:].upper()}. Repeat the run."
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}; needs a mapping. Repeat the run.")
    for key, kind in KINDS.get(path.name, {}).items():
        if key in content and (odd := odd_part(content[key], kind, key)):
            raise DataError(f"{path}: {odd}. Repeat the run.")
    return content


def odd_part(value: Any, kind: Any, name: str) -> str | None:
    """The first part of a value that is not of its kind, and what it needs: `linears[0].fqn is '3'; needs text`.

    Args:
        value: as JSON or YAML gives it. name: what it is called.
        kind: a type; a tuple of kinds, one of which will do; a list of kinds, the last of any number of entries, those
            before it of as many that there must be; a mapping, of the kind of each key, and of any other under `...`.
            None is what is absent.
    """
    if isinstance(kind, tuple):
        found = [odd_part(value, one, name) for one in kind]
        return None if None in found else found[0]
    wanted: Any = kind if isinstance(kind, type) else type(kind)
    least = len(kind) - 1 if isinstance(kind, list) else 0
    if not isinstance(value, wanted) or (least and len(value) < least):
        needs = WORDS.get(wanted, f"a {wanted.__name__}") + f" of at least {least}" * bool(least)
        return f"{name} is {str(value)[:80]!r}; needs {needs}"
    parts: list[tuple[str, Any, Any]] = []
    if isinstance(kind, list):
        parts = [(f"{name}[{n}]", one, kind[min(n, len(kind) - 1)]) for n, one in enumerate(value)]
    elif isinstance(kind, dict):
        parts = [(f"{name}.{key}", value.get(key), one) for key, one in kind.items() if key is not ...]
        parts += [(f"{name}.{key}", one, kind[...]) for key, one in value.items() if ... in kind and key not in kind]
    return next((odd for part, one, own in parts if (odd := odd_part(one, own, part)) is not None), None)
