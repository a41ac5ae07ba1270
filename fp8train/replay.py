"""Run the step of a black box again in FP8, BF16 and FP32 and name the cause: `fp8train replay RUN_OR_DUMP`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fp8train.arguments import parse_arguments, with_key
from fp8train.calibration_setup import check_out
from fp8train.checkup.rerun import OWN, Measured, Rerun, find_dump
from fp8train.distributed import check_single, init
from fp8train.errors import UserError, exit_code
from fp8train.trainer.run_folder import write_file
from fp8train.units import finite

SAME = 1e-3  # relative: ranks in another order and a GPU's sums move a loss by less, another cause by more
SHOWN = 3


@dataclass(kw_only=True, slots=True)
class ReplayArguments:
    """Run the step of a black box again in its own precision, in BF16 and in FP32, and name the cause.

    path: run folder (its newest black box) or one black box, run_dir/blackbox/step_N; may be given without `path=`
    backend: null takes the run's
    out: file that gets the result as JSON; null: none
    """

    path: Path
    backend: str | None = None
    out: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The cause of a bad step.

    cause: "data", "FP8 numerics", "BF16 numerics", "weights" or "non-reproducible"
    because: what shows it, in words
    where: sequences, linears or parameters that it comes down to
    """

    cause: str
    because: str
    where: list[str]


def main(argv: Sequence[str]) -> int:
    """Replay and print what was found; 0."""
    check_single("replay")  # which takes all ranks' micro-batches
    arguments = parse_arguments(with_key(argv, "path"), ReplayArguments)
    if arguments.out is not None:
        check_out(arguments.out, "replay")
    with init() as world:
        rerun = Rerun(find_dump(arguments.path), world, arguments.backend)
        runs, verdict, notes = diagnose(rerun)
    sys.stdout.write(text(rerun, runs, verdict, notes))
    if arguments.out is not None:
        content = {"dump": str(rerun.path), "step": rerun.dump.step, **asdict(verdict), "notes": notes}
        content["runs"] = {
            name: asdict(run) | {"loss": finite(run.loss), "grad_norm": finite(run.grad_norm)}
            for name, run in runs.items()
        }
        write_file(arguments.out, json.dumps(content, indent=1, allow_nan=False))
    return 0


def diagnose(rerun: Rerun) -> tuple[dict[str, Measured], Verdict, list[str]]:
    """(what each run of the step gave, the cause, remarks)."""
    runs = {"own precision": rerun.measure(OWN), "again": rerun.measure(OWN)}
    runs |= {"BF16": rerun.measure("bf16"), "FP32": rerun.measure("fp32")}
    notes = [f"weights from {rerun.weights_from}"]
    neighbour = _read_again(rerun, notes)
    return runs, judge(rerun, runs, neighbour), notes


def judge(rerun: Rerun, runs: dict[str, Measured], neighbour: Measured | None) -> Verdict:
    """The cause, from the runs of the step and the next step's data on the same weights in FP32."""
    own, again, bf16, fp32 = runs.values()
    limit, recorded = rerun.limit, rerun.dump.loss
    if not own.bad(limit) or not _alike(own.loss, again.loss):
        shown = f"loss {own.loss:.4g} and {again.loss:.4g} now, {_number(recorded)} then"
        return Verdict(
            cause="non-reproducible",
            because=f"the same weights and tokens give {shown}: a race, memory that nobody wrote, a "
            "faulty device, or software that has changed since",
            where=[],
        )
    if recorded is not None and not _alike(own.loss, recorded):
        return Verdict(
            cause="non-reproducible",
            because=f"the replay is bad too, but loss {own.loss:.6g} is not the {recorded:.6g} of then",
            where=[],
        )
    if not bf16.bad(limit):
        return Verdict(
            cause="FP8 numerics",
            because=f"bad in its own precision, loss {bf16.loss:.4g} in BF16",
            where=_culprits(rerun, own, limit),
        )
    if not fp32.bad(limit):
        return Verdict(
            cause="BF16 numerics",
            because=f"bad in its own precision and in BF16, loss {fp32.loss:.4g} in FP32",
            where=[bf16.first_nonfinite] if bf16.first_nonfinite else [],
        )
    broken = rerun.nonfinite_weights()
    if broken:
        return Verdict(cause="weights", because=f"{len(broken)} parameters are not finite", where=broken[:SHOWN])
    if neighbour is not None and neighbour.bad(limit):
        return Verdict(
            cause="weights",
            because=f"bad in FP32, and other sequences are as bad (loss {neighbour.loss:.4g}): training had diverged "
            "before this step. Lower optim.lr, or go back to an earlier checkpoint",
            where=[],
        )
    losses = rerun.sequence_losses()
    worst = sorted(losses, key=lambda number: (math.isfinite(losses[number]), -losses[number]))[:SHOWN]
    return Verdict(
        cause="data",
        because="bad in every precision, FP32 too, and other sequences are not",
        where=[f"sequence {number} (loss {losses[number]:.4g})" for number in worst],
    )


def _culprits(rerun: Rerun, own: Measured, limit: float | None) -> list[str]:
    """Linears that the fault of FP8 comes down to."""
    if own.first_nonfinite is not None:
        return [f"{own.first_nonfinite} is the first whose output is not finite"]
    if limit is None:
        return ["every forward is finite: a gradient GEMM"]
    losses = rerun.losses_without()
    best = sorted(losses, key=lambda name: (losses[name], name))[:SHOWN]
    return [f"{name} (loss {losses[name]:.4g} with it in BF16)" for name in best]


def _read_again(rerun: Rerun, notes: list[str]) -> Measured | None:
    """The next step's data in FP32 on the same weights; also notes whether the step's data is what it was."""
    try:
        same = rerun.step_batches(rerun.dump.step - 1)
        following = rerun.step_batches(rerun.dump.step)
    except UserError as error:
        notes.append(f"the data cannot be read again: {error}")
        return None
    pairs = list(zip(rerun.batches, same, strict=True))
    changed = [old.sample_ids for old, new in pairs if not torch.equal(old.tokens, new.tokens)]
    if changed:
        notes.append(f"the data reads otherwise now than it did then: sequences {changed[0]}")
    return rerun.measure("fp32", following)


def _alike(one: float, other: float) -> bool:
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.isfinite(one) == math.isfinite(other)
    return abs(one - other) <= SAME * max(abs(one), abs(other))


def text(rerun: Rerun, runs: dict[str, Measured], verdict: Verdict, notes: Sequence[str]) -> str:
    """For the console."""
    dump = rerun.dump
    limit = "" if rerun.limit is None else f", a spike above {rerun.limit:.4g}"
    lines = [
        f"step {dump.step} of {rerun.path.parents[1]}: {dump.kind}{limit}",
        *notes,
        f"{'':15s} {'loss':>12s} {'grad norm':>12s}",
        f"{'as recorded':15s} {_number(dump.loss):>12s} {_number(dump.grad_norm):>12s}",
        *(f"{name:15s} {run.loss:12.6g} {run.grad_norm:12.6g}" for name, run in runs.items()),
        f"cause: {verdict.cause}. {verdict.because}.",
        *(f"  {place}" for place in verdict.where),
    ]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
