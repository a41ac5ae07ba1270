"""Which linears suffer from FP8: `fp8train sensitivity [checkpoint=DIR] [recipe=NAME] [KEY=VALUE ...]`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from fp8train.arguments import describe, nearest, parse_arguments
from fp8train.backends.coverage import GEMMS
from fp8train.calibration import METRICS, Calibration, LinearSensitivity, ranked
from fp8train.checkpoint import open_checkpoint
from fp8train.config import RunConfig, load_config
from fp8train.conversion_report import align
from fp8train.data import Batcher, build_dataset, check_vocabulary
from fp8train.data.dataset import PackedDataset
from fp8train.distributed import World
from fp8train.errors import ConfigError, DataError, exit_code
from fp8train.eval import evaluation_config
from fp8train.recipe import load_recipe
from fp8train.trainer.assembly import Assembly, assemble
from fp8train.trainer.restored import restored
from fp8train.trainer.run_folder import write_file

T = TypeVar("T", bound="CalibrationArguments")

LEGEND = """\
loss: nats, with fprop alone in FP8: change of the mean, rms change of a token's; dB: SQNR; 1-cos: of all gradients
of the input x: range_parm, largest |x| over the spread in channels (outliers); kurtosis, normal is 3; row error, p99
"""


@dataclass(kw_only=True, slots=True)
class CalibrationArguments:
    """What judges precisions on a few windows takes.

    checkpoint: run folder or checkpoint whose weights are judged; null: fresh weights of the seed
    windows: training windows of seq_len tokens that are read
    metric: loss (rms change of a token's loss), gradient, sqnr, range_parm, kurtosis or row_error; see the table
    out: file that is written; null: see the command
    """

    checkpoint: str | None = None
    windows: int = 4
    metric: str = "loss"
    out: str | None = None

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise ConfigError(f"windows: got {self.windows}; needs at least 1.")
        if self.metric not in METRICS:
            raise ConfigError(f"metric: got {self.metric!r}; {nearest(self.metric, list(METRICS))}.")


@dataclass(kw_only=True, slots=True)
class SensitivityArguments(CalibrationArguments):
    """Loss change, output SQNR and gradient cosine of each GEMM of each linear, quantised alone; out gets JSON."""


def main(argv: Sequence[str]) -> int:
    """Measure and print a table, the most sensitive linear first; returns 0.

    Keys of a run are taken too: recipe, model, data, seq_len, seed and the like.
    """
    if any(argument in ("-h", "--help") for argument in argv):
        sys.stdout.write(f"{describe(SensitivityArguments)}\n{describe(RunConfig)}")
        return 0
    arguments, config, assembly, calibration = prepare(argv, SensitivityArguments, "sensitivity")
    rows = calibration.measure(progress=show_progress)
    order = ranked(rows, arguments.metric)
    sys.stdout.write(headline(arguments, config, assembly, calibration) + table(order, arguments.metric))
    if arguments.out is not None:
        content = {
            "model": config.model.name,
            "checkpoint": arguments.checkpoint,
            "recipe": assembly.recipe.name,
            "recipe_hash": assembly.recipe.hash,
            "backend": assembly.report.backend,
            "windows": arguments.windows,
            "tokens": calibration.tokens,
            "metric": arguments.metric,
            "linears": [asdict(linear) | {"score": _finite(score)} for linear, score in order],
        }
        write_file(Path(arguments.out), json.dumps(content, indent=1, allow_nan=False) + "\n")
    return 0


def prepare(argv: Sequence[str], kind: type[T], command: str) -> tuple[T, RunConfig, Assembly, Calibration]:
    """Arguments, run configuration, converted model with its weights, and the calibration windows.

    Raises:
        UserError: an argument, recipe, checkpoint or text does not serve.
    """
    own_keys = kind.__dataclass_fields__
    own = [argument for argument in argv if argument.partition("=")[0] in own_keys or "=" not in argument]
    rest = [argument for argument in argv if argument not in own]
    arguments = parse_arguments(own, kind)
    checkpoint = None if arguments.checkpoint is None else open_checkpoint(arguments.checkpoint)
    config = load_config(rest, command) if checkpoint is None else evaluation_config(checkpoint, rest)
    named = checkpoint is None or any(argument.startswith("recipe=") for argument in rest)
    recipe = load_recipe(config.recipe) if named else None
    world = World()
    dataset = build_dataset(config.data, config.seq_len, config.seed)
    check_vocabulary(dataset, config.model.vocab_size)
    if isinstance(dataset, PackedDataset) and dataset.samples_per_epoch < arguments.windows:
        raise DataError(
            f"{command}: the calibration text has {dataset.samples_per_epoch} windows of {config.seq_len} tokens; "
            f"needs windows={arguments.windows}. Give more text, or lower windows or seq_len."
        )
    batches = Batcher(dataset, arguments.windows, 1).micro_batches(0)
    if checkpoint is None:
        assembly = assemble(config, world.device, recipe=recipe)
    else:
        assembly = restored(checkpoint, world.device, config=config, recipe=recipe)
    return arguments, config, assembly, Calibration(assembly.model, batches, world.device)


def headline(arguments: CalibrationArguments, config: RunConfig, assembly: Assembly, calibration: Calibration) -> str:
    """What was judged, and on what."""
    weights = "fresh weights" if arguments.checkpoint is None else arguments.checkpoint
    return (
        f"model {config.model.name}, {weights}; recipe {assembly.recipe.name}; {calibration.tokens:,} tokens in "
        f"{arguments.windows} training windows\n{assembly.report.backend_reason}\n"
    )


def table(order: Sequence[tuple[LinearSensitivity, float]], metric: str) -> str:
    """A line for each linear, in the order given, and what the columns are."""
    head = ["linear", "loss change", "loss rms", *(f"{gemm} dB" for gemm in GEMMS),
            *(f"1-cos {gemm}" for gemm in GEMMS), "range_parm", "kurtosis", "row error %"]  # fmt: skip
    lines = [head]
    for linear, _ in order:
        fprop = linear.gemms["fprop"]
        cosines = [linear.gemms[gemm].gradient_cosine for gemm in GEMMS]
        lines.append(
            [
                linear.fqn,
                _text(fprop.loss_change, "+.2e"),
                _text(fprop.loss_rms, ".2e"),
                *(_text(linear.gemms[gemm].sqnr_db, ".1f") for gemm in GEMMS),
                *(_text(None if cosine is None else 1 - cosine, ".1e") for cosine in cosines),
                _text(linear.range_parm, ".1f"),
                _text(linear.kurtosis, ".1f"),
                _text(None if linear.row_error_p99 is None else 100 * linear.row_error_p99, ".2f"),
            ]
        )
    return f"{align(lines, right=head[1:])}\nby {metric}; {LEGEND}"


def show_progress(done: int, total: int) -> None:
    """A counter on a terminal's standard error; nothing elsewhere."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done}/{total} linears{' ' * 8 if done < total else chr(10)}")
        sys.stderr.flush()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _text(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
