"""The command `fp8train compare`: trains the same model in BF16 and in FP8, from the same weights on the same tokens.

    fp8train compare recipe=blockwise steps=300 run_dir=DIR       one seed: indicative
    fp8train compare recipe=blockwise compare.seeds=3             a test across seeds, with a placebo arm beside it
    fp8train compare compare.seeds=3 compare.parallel=2           two runs at a time, each with half of the threads
    fp8train compare runs=[DIR1,DIR2]                             compares runs that are there, the baseline first
    fp8train compare runs=DIR                                     writes the report of a comparison again

Each run is a folder, run_dir/arms/ARM/seed_N, and resumes by itself; verdict.json and report.html lie in run_dir.
A run that diverges is part of the verdict, and the others go on; the same command does not train it again: delete its
folder for that. The exit status is 0 whatever the verdict, but 1 where the baseline diverged in every seed.
Those of an earlier comparison there, of other arms or seeds, are kept as verdict-ARM.json and report-ARM.html.
"""

from __future__ import annotations

import functools
import gc
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fp8train.arguments import flattened, parse_arguments
from fp8train.comparison.arms import ARMS, ArmRun, ComparisonProgress, check_same_data, plan_arms
from fp8train.comparison.crossing import cross_evaluate
from fp8train.comparison.folders import CROSSED_FILE, VERDICT_FILE, FolderArguments, plan_folders, read_verdict
from fp8train.comparison.parallel import Job, train_in_processes
from fp8train.config import RunConfig, config_to_dict, load_config
from fp8train.config_sections import CompareConfig
from fp8train.distributed import World, rank_exit_code
from fp8train.distributed.agreement import on_main
from fp8train.errors import DivergedError, printable
from fp8train.metrics import Metrics
from fp8train.report import build_report
from fp8train.report.run_record import RunRecord, read_mapping, read_run
from fp8train.report.summary import summary
from fp8train.report.verdict import Crossed, make_verdict
from fp8train.trainer import Trainer
from fp8train.trainer.agreement import check_same_command, joined
from fp8train.trainer.console import Console
from fp8train.trainer.run_folder import RESULT_FILE, RunResult, write_file
from fp8train.trainer.shared_folder import check_shared

REPORT_FILE = "report.html"

TrainArm = Callable[[RunConfig, str], RunResult]


def main(argv: Sequence[str]) -> int:
    """Train and compare, or compare what is there.

    Returns:
        int: 0, also when a signal or the time limit ends it early (the same command goes on from there), and whatever
            the verdict; 1 where the baseline diverged in every seed, so that there is nothing to compare with.

    Raises:
        UserError: the configuration cannot be honoured, or the runs cannot be compared.
    """
    if any(argument.partition("=")[0] == "runs" for argument in argv):
        own = [re.sub(r"^runs=(?!\[)(.*)", r"runs=[\1]", argument.removeprefix("compare.")) for argument in argv]
        there = plan_folders(parse_arguments(own, FolderArguments))
        return _conclude(there.run_dir, there.folders, there.settings, there.crossed, None)
    if any(argument in ("-h", "--help") for argument in argv):
        print(__doc__)
    recipe_given = any(argument.partition("=")[0] == "recipe" for argument in argv)
    with joined(lambda: load_config(argv, "compare")) as (config, world):
        check_same_command(config, world)
        device, ranks = world.device.type, world.world_size
        plan = on_main(world, lambda: plan_arms(config, recipe_given=recipe_given, ranks=ranks, device_type=device))
        if on_main(world, Path(str(config.run_dir)).is_dir):  # else the first run that makes it does so
            check_shared(Path(str(config.run_dir)), world)
        on_main(world, lambda: _check_data(config, plan))
        return train_and_compare(config, plan, world, lambda run, label: _train(run, label, world))


def _check_data(config: RunConfig, plan: Sequence[ArmRun]) -> None:
    """Refuse to train on other text than the runs that have ended."""
    ended = {str(run.config.run_dir): facts for run in plan if (facts := _ended_facts(run)) is not None}
    if 0 < len(ended) < len(plan):
        check_same_data(config, ended)


def train_and_compare(config: RunConfig, plan: Sequence[ArmRun], world: World, train: TrainArm) -> int:
    """Train every run of the plan, then write verdict and report and print the summary.

    Args:
        train: trains one run, given its configuration and its label on the console; on every rank. Not used where
            compare.parallel runs are trained at a time, each in a process of its own.
    """
    run_dir = Path(str(config.run_dir))
    on_main(world, lambda: len(_earlier_verdicts(run_dir)))  # a damaged one is to be known before the training
    progress = ComparisonProgress(plan, Console(enabled=world.main), config.time_limit_seconds)
    todo = []
    for run in plan:
        facts = on_main(world, functools.partial(_ended_facts, run))
        if facts is None:
            todo.append(run)
        else:
            progress.done(run, facts, earlier=True)
    if todo and config.compare.parallel > 1:
        jobs = [Job(config=run.config, label=run.label) for run in todo]
        processes = min(config.compare.parallel, len(jobs))
        finished = train_in_processes(
            jobs,
            processes,
            lambda number: progress.begin(todo[number]),
            lambda number, facts: progress.done(todo[number], facts),
        )
    else:
        finished = all(_train_one(run, train, progress, world) for run in todo)
    if not finished:
        progress.stopped()
        return 0
    folders: dict[str, dict[int, Path]] = {}
    for run in plan:
        folders.setdefault(run.arm, {})[run.seed] = Path(str(run.config.run_dir))
    whole = on_main(world, lambda: _without_diverged(folders, config.compare))
    crossed = cross_evaluate(run_dir / CROSSED_FILE, whole, world, Console(enabled=world.main).info)
    return on_main(world, lambda: _conclude(run_dir, folders, config.compare, crossed, config))


def _train_one(run: ArmRun, train: TrainArm, progress: ComparisonProgress, world: World) -> bool:
    """Whether the run finished or diverged, so that the next one is due."""
    progress.begin(run)
    facts: dict[str, Any] | None
    try:
        result = train(run.config, run.label)
        if not result.finished:
            return False
        facts = {"diverged": None, "init_hash": result.init_hash, "stream_hash": result.stream_hash}
    except DivergedError:
        facts = on_main(world, functools.partial(_ended_facts, run))
    assert facts is not None, "the trainer writes the result of a run that diverged"
    progress.done(run, facts)
    gc.collect()  # the model of this arm must not count as memory of the next
    return True


def _ended_facts(run: ArmRun) -> dict[str, Any] | None:
    """result.json of a run that has done all its steps, or diverged; None where it is to be trained."""
    facts = {"diverged": None} | read_mapping(Path(str(run.config.run_dir)) / RESULT_FILE)
    done = facts.get("finished") and facts.get("steps", 0) >= run.config.steps
    return facts if done or facts["diverged"] else None


def _without_diverged(folders: Mapping[str, Mapping[int, Path]], settings: CompareConfig) -> dict[str, dict[int, Path]]:
    """The folders of the runs that have a loss at their end."""
    return {
        arm: {
            seed: path
            for seed, path in runs.items()
            if read_run(path, skip_damaged=settings.skip_damaged).diverged is None
        }
        for arm, runs in folders.items()
    }


def _train(config: RunConfig, label: str, world: World) -> RunResult:
    console = Console(config.steps, enabled=world.main, print_every=config.log.print_every, label=label)
    return Trainer(config, world, console).run()


def _conclude(
    run_dir: Path,
    folders: Mapping[str, Mapping[int, Path]],
    settings: CompareConfig,
    crossed: Crossed,
    config: RunConfig | None,
) -> int:
    """Write verdict.json and report.html, print the summary; returns the exit status."""
    arms: dict[str, dict[int, RunRecord]] = {
        arm: {seed: read_run(path, skip_damaged=settings.skip_damaged) for seed, path in sorted(runs.items())}
        for arm, runs in folders.items()
    }
    verdict = make_verdict(
        arms,
        baseline=next(iter(arms)),
        margin_percent=settings.margin_percent,
        crossed=crossed,
        parallel=settings.parallel,
        looks=settings.looks,
        earlier=_earlier_verdicts(run_dir),
    )
    kept = keep_earlier(run_dir, verdict)
    write_file(run_dir / VERDICT_FILE, json.dumps(verdict, indent=1, allow_nan=False) + "\n")
    report = run_dir / REPORT_FILE
    write_file(report, build_report(verdict, arms))
    if config is not None and config.log.wandb != "off":
        _send_to_wandb(run_dir, verdict, config)
    print(printable(summary(verdict, arms)))
    if kept is not None:
        print(f"\nearlier comparison: kept as {kept.resolve()}, since this one is not of all its runs", end="")
    print(f"\nrun folder: {run_dir.resolve()}")
    print(f"report: {report.resolve()}", flush=True)
    baseline = verdict["arms"][verdict["baseline"]]
    return int(all(run["diverged"] for run in baseline["runs"]))


def _earlier_verdicts(run_dir: Path) -> list[dict[str, Any]]:
    """Those that are in the folder, of other arms too."""
    return [read_verdict(file) for file in sorted(run_dir.glob("verdict*.json"))]


def keep_earlier(run_dir: Path, verdict: Mapping[str, Any]) -> Path | None:
    """Rename the report and verdict that are there, unless all runs that they are of are in this verdict as well.

    Returns:
        The report under its new name, report-ARM.html after the arms that were held against the baseline, with a number
        if another comparison has that name; None where nothing had to be kept.
    """
    earlier = read_verdict(run_dir / VERDICT_FILE)
    if runs_of(earlier) <= runs_of(verdict):
        return None
    stem, number = "-".join(arm for arm in earlier["arms"] if arm != earlier["baseline"]), 1
    name = stem
    while not runs_of(read_verdict(run_dir / f"verdict-{name}.json")) <= runs_of(earlier):
        number += 1
        name = f"{stem}-{number}"
    report = run_dir / f"report-{name}.html"
    for old, new in ((run_dir / REPORT_FILE, report), (run_dir / VERDICT_FILE, run_dir / f"verdict-{name}.json")):
        if old.is_file():
            old.replace(new)
    return report


def runs_of(verdict: Mapping[str, Any]) -> set[str]:
    """Folders of the runs that a verdict is of; those of the comparison itself as arms/ARM/seed_N, wherever it lies."""
    folders = (Path(run["run_dir"]) for entry in verdict.get("arms", {}).values() for run in entry["runs"])
    return {str(Path(*path.parts[-3:]) if path.parts[-3:-2] == (ARMS,) else path.resolve()) for path in folders}


def _send_to_wandb(run_dir: Path, verdict: Mapping[str, Any], config: RunConfig) -> None:
    metrics = Metrics(
        run_dir,
        wandb=config.log.wandb,
        wandb_project=config.log.wandb_project,
        config=config_to_dict(config),
        warn=lambda text: print(f"warning: {text}"),
    )
    metrics.write(wandb_row(verdict))
    metrics.close()


def wandb_row(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """A verdict as one flat row: its words, then numbers, `compare/ARM/heldout_gap.percent`, mean over the seeds, with
    the test, the difference from the placebo and the speed ratios of each arm.
    """
    first = verdict["arms"][verdict["baseline"]]["runs"][0]
    row: dict[str, Any] = {"step": first["steps"]}
    row |= {f"compare/{key}": verdict[key] for key in ("status", "sentence", "reason")}
    row |= {f"compare/{key}": "\n".join(verdict[key]) for key in ("numbers", "caveats")}
    for arm, comparison in verdict["comparisons"].items():
        mean = flattened(comparison["mean"])
        row |= {f"compare/{arm}/{key}": value for key, value in mean.items() if value is not None}
        for part in ("test", "against_placebo", "speed", "memory"):
            values = flattened({f"compare/{arm}/{part}": comparison[part]}) if comparison[part] else {}
            row |= {key: value for key, value in values.items() if isinstance(value, str | int | float)}
    return row


if __name__ == "__main__":
    sys.exit(rank_exit_code(main))
