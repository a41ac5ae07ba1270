"""Which linears suffer from FP8: `fp8train sensitivity [checkpoint=DIR] [recipe=NAME] [KEY=VALUE ...]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from fp8train.backends.coverage import GEMMS
from fp8train.calibration import LinearSensitivity, ranked
from fp8train.calibration_setup import CalibrationArguments, check_out, headline, set_up, show_progress
from fp8train.conversion_report import align
from fp8train.errors import exit_code
from fp8train.trainer.run_folder import write_file
from fp8train.units import finite

LEGEND = """\
loss: nats, with fprop alone in FP8: change of the mean, rms change of a token's; dB: SQNR; 1-cos: of all gradients
of the input x: range_parm, largest |x| over the spread in channels (outliers); kurtosis, normal is 3; row error, p99
"""


@dataclass(kw_only=True, slots=True)
class SensitivityArguments(CalibrationArguments):
    """Loss change, output SQNR and gradient cosine of each GEMM of each linear, quantised alone; out gets JSON."""


def main(argv: Sequence[str]) -> int:
    """Measure and print a table, the most sensitive linear first; returns 0.

    Keys of a run are taken too: recipe, model, data, seq_len, seed and the like.
    """
    arguments, config, assembly, calibration = set_up(argv, SensitivityArguments, "sensitivity")
    if arguments.out is not None:
        check_out(arguments.out, "sensitivity")
    rows = calibration.measure(progress=show_progress)
    order = ranked(rows, arguments.metric)
    sys.stdout.write(headline(arguments, config, assembly, calibration) + table(order, arguments.metric))
    if arguments.out is not None:
        content = {
            "model": config.model.name,
            "checkpoint": None if arguments.checkpoint is None else str(arguments.checkpoint),
            "recipe": assembly.recipe.name,
            "recipe_hash": assembly.recipe.hash,
            "backend": assembly.report.backend,
            "windows": arguments.windows,
            "tokens": calibration.tokens,
            "metric": arguments.metric,
            "linears": [asdict(linear) | {"score": finite(score)} for linear, score in order],
        }
        write_file(arguments.out, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return 0


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


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
