"""Examine a model and its configuration: `fp8train doctor key=value ...` with the keys of `fp8train train`."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence

import torch

from fp8train.checkup import arithmetic, machine, ranks, training, weights
from fp8train.checkup.outcome import Outcome
from fp8train.checkup.subject import Subject
from fp8train.config import load_config
from fp8train.distributed import check_single, init
from fp8train.errors import ConfigError, UserError, exit_code, nearest

CHECKS: dict[str, Callable[[Subject], Outcome]] = {
    "coverage": training.coverage,
    "siblings": training.siblings,
    "recipe": training.fp8_matters,
    "codes": arithmetic.quantiser_codes,
    "equivariance": arithmetic.scale_equivariance,
    "definition": arithmetic.definition,
    "ragged": arithmetic.ragged,
    "nan": arithmetic.nonfinite,
    "accumulation": arithmetic.fp32_accumulation,
    "weights": weights.weight_codes,
    "cached": training.cached,
    "evaluation": training.evaluation,
    "split": training.split,
    "loss_scale": training.loss_scale,
    "checkpointing": training.checkpointing,
    "resume": training.resume,
    "data_order": training.data_order,
    "ranks": ranks.ranks,
    "compiled": training.compiled,
}
NAMES = (*machine.CHECKS, *CHECKS)

USAGE = """Examine a model, recipe and data before a long run: what must not change is changed, and compared.

usage: fp8train doctor [--json] [--compile] [--only NAMES] [--skip NAMES] [GROUP=CHOICE ...] [KEY=VALUE ...]

  --json        print one JSON object in place of the lines
  --compile     also compare torch.compile with eager
  --only NAMES  these checks alone, separated by commas
  --skip NAMES  all but these
  checks of the machine: {machine}
  checks of the model: {names}

Groups and keys are those of `fp8train train`. Exit status: 0 all passed, 1 something failed, 2 bad configuration.
"""


def main(argv: Sequence[str]) -> int:
    """Run the checks and print what they found; 0 if all passed, 1 if one failed."""
    if any(argument in ("-h", "--help") for argument in argv):
        sys.stdout.write(USAGE.format(machine=", ".join(machine.CHECKS), names=", ".join(CHECKS)))
        return 0
    names, as_json, overrides = _split(argv)
    config = load_config(overrides, "doctor")
    check_single("doctor")  # it starts others itself
    with init(config.parallel.timeout_seconds) as world:
        subject = Subject(config, world.device)
        show: Callable[[str], object] = (lambda line: None) if as_json else sys.stdout.write
        show(f"model {config.model.name}, recipe {config.recipe}, backend {config.backend}, device {world.device}\n")
        outcomes = examine(subject, names, show)
    if not outcomes:
        raise ConfigError(
            f"doctor: got {', '.join(names) or 'no checks'}; needs one that has something to check here. torch "
            f"{'sees a GPU' if torch.cuda.is_available() else 'sees no GPU'}. Leave --only and --skip."
        )
    failed = sum(not outcome.passed for outcome in outcomes)
    if as_json:
        found = [dataclasses.asdict(outcome) for outcome in outcomes]
        sys.stdout.write(json.dumps({"passed": not failed, "checks": found}, indent=1) + "\n")
    show(f"{len(outcomes) - failed} of {len(outcomes)} passed\n")
    return 1 if failed else 0


def examine(subject: Subject, names: Sequence[str], show: Callable[[str], object]) -> list[Outcome]:
    """The named checks that have something to check here, in order; each is shown as it is done."""
    outcomes = []
    for name in names:
        begin = time.perf_counter()
        outcome = attempt(name, subject)
        if outcome is None:
            continue
        show(f"{outcome.lines()}   ({time.perf_counter() - begin:.1f} s)\n")
        outcomes.append(outcome)
    return outcomes


def attempt(name: str, subject: Subject) -> Outcome | None:
    """Run one check; what it raises is a finding too, unless the user's configuration is at fault.

    Returns:
        Outcome: with the name by which --only and --skip know it; None where there is nothing to check.

    Raises:
        UserError: from the configuration.
    """
    try:
        outcome = machine.CHECKS[name]() if name in machine.CHECKS else CHECKS[name](subject)
    except UserError:
        raise
    except Exception as error:  # a crash of one check is its finding, and the others still have to run
        reason = (str(error).splitlines() or [""])[0]
        outcome = Outcome(
            passed=False,
            first="the check was to run",
            second=f"{type(error).__name__}: {reason}",
            meaning="an operation that fails on this machine or with this model.",
        )
    return None if outcome is None else dataclasses.replace(outcome, name=name)


def _split(argv: Sequence[str]) -> tuple[list[str], bool, list[str]]:
    """(checks to run, whether as JSON, arguments of the run)."""
    rest, overrides = list(argv), []
    only, skip, as_json = list(NAMES), {"compiled"}, False  # compiling takes minutes
    while rest:
        argument = rest.pop(0)
        flag, equals, value = argument.partition("=")
        if flag == "--json":
            as_json = True
        elif flag == "--compile":
            skip.discard("compiled")
        elif flag in ("--only", "--skip"):
            names = _names(flag, value if equals else (rest.pop(0) if rest else ""))
            only, skip = (names, skip - set(names)) if flag == "--only" else (only, skip | set(names))
        else:
            overrides.append(argument)
    return [name for name in only if name not in skip], as_json, overrides


def _names(flag: str, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in NAMES:
            raise ConfigError(f"doctor: {flag} got {name!r}; {nearest(name, list(NAMES))}.")
    if not names:
        raise ConfigError(f"doctor: {flag} got no names; needs some of {', '.join(NAMES)}.")
    return names


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
