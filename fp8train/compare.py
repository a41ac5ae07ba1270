"""The command `fp8train compare`: trains the same model in BF16 and in FP8, from the same weights on the same tokens.

    fp8train compare recipe=blockwise steps=300 run_dir=DIR       trains the arms, one after the other
    fp8train compare runs=[DIR1,DIR2] run_dir=OUT                 compares runs that are there, the baseline first

Each arm is a run folder, run_dir/arms/ARM/seed_N, and resumes by itself; verdict.json and report.html lie in run_dir.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fp8train.arguments import parse_arguments
from fp8train.config import RunConfig, config_to_dict, load_config
from fp8train.distributed import World, init, rank_exit_code
from fp8train.errors import ConfigError
from fp8train.metrics import Metrics
from fp8train.recipe import load_recipe
from fp8train.report import write_report
from fp8train.report.coverage_summary import exceptions, gemm_shares, group_linears, layer_numbers
from fp8train.report.run_record import Arms, RunRecord, read_run
from fp8train.report.verdict import make_verdict
from fp8train.trainer import Trainer
from fp8train.trainer.console import Console
from fp8train.trainer.run_folder import RunResult, on_main, write_file
from fp8train.units import bytes_text, count_text, loss_text, percent_text, ratio_text, seconds_text, signed_text

BASELINE = "bf16"
# What may differ between an arm that was begun and the same arm when the comparison goes on: it does not reach the
# numbers.
FREE_KEYS = ("run_dir", "resume", "time_limit_seconds", "log", "checkpoint", "profile", "compare", "parallel")
SHOWN_EXCEPTIONS = 6

TrainArm = Callable[[RunConfig, str], RunResult]


@dataclasses.dataclass(kw_only=True, slots=True)
class FolderArguments:
    """Compare runs that are there: they must share model, data order, token count, tokenizer, eval set, first weights.

    runs: two or more run folders, the baseline first
    run_dir: folder for verdict.json and report.html
    """

    runs: list[str]
    run_dir: str


@dataclasses.dataclass(kw_only=True, slots=True)
class ArmRun:
    """One run of a comparison that is to be trained: its arm, seed and whole configuration."""

    arm: str
    seed: int
    config: RunConfig

    @property
    def label(self) -> str:
        """Precedes its lines on the console."""
        return self.arm if self.config.compare.seeds == 1 else f"{self.arm} seed {self.seed}"


def main(argv: Sequence[str]) -> int:
    """Train and compare, or compare what is there.

    Returns:
        int: 0, also when a signal or the time limit ends it early: the same command goes on from there.

    Raises:
        UserError: the configuration cannot be honoured, or the runs cannot be compared.
    """
    if any(argument.partition("=")[0] == "runs" for argument in argv):
        return compare_folders(parse_arguments(argv, FolderArguments))
    if any(argument in ("-h", "--help") for argument in argv):
        print(__doc__)
    config = load_config(argv, "compare")
    recipe_given = any(argument.partition("=")[0] == "recipe" for argument in argv)
    with init(config.parallel.timeout_seconds) as world:
        plan = on_main(world, lambda: plan_arms(config, recipe_given=recipe_given))
        return train_and_compare(config, plan, world, lambda run, label: _train(run, label, world))


def plan_arms(config: RunConfig, *, recipe_given: bool = True) -> list[ArmRun]:
    """The runs of a comparison, seed by seed, the baseline first; writes nothing.

    Args:
        config: recipe, compare, run_dir and seed are read.
        recipe_given: the user named a recipe, so that leaving it out of compare.arms would not be what was asked for.

    Raises:
        ConfigError: fewer than two arms, two that are the same, a way of running that is not there, or a run_dir that
            holds something else or arms of another configuration.
        RecipeError: no such recipe.
    """
    recipes = config.compare.arms if config.compare.arms is not None else [BASELINE, config.recipe]
    if recipe_given and config.recipe not in recipes:
        raise ConfigError(
            f"compare: recipe is {config.recipe}, but compare.arms are {', '.join(recipes)}; needs the recipe "
            "among them. Leave one out."
        )
    if config.compare.parallel != 1:
        raise ConfigError(
            f"compare.parallel: got {config.compare.parallel}; needs 1: arms run one after the other. Leave it out."
        )
    if config.resume not in ("auto", "never"):
        raise ConfigError(
            f"resume: got {config.resume}; needs auto or never: each arm resumes from its own checkpoint. Leave it out."
        )
    names = _arm_names(recipes)
    assert config.run_dir is not None, "load_config gives every run a folder"
    runs = []
    for seed in range(config.seed, config.seed + config.compare.seeds):
        for name, recipe in names.items():
            arm = copy.deepcopy(config)
            arm.recipe, arm.seed, arm.resume = recipe, seed, "auto"
            arm.run_dir = str(Path(config.run_dir) / "arms" / name / f"seed_{seed}")
            runs.append(ArmRun(arm=name, seed=seed, config=arm))
    _check_run_dir(Path(config.run_dir), config.resume)
    for run in runs:
        _check_begun(run)
    return runs


def train_and_compare(config: RunConfig, plan: Sequence[ArmRun], world: World, train: TrainArm) -> int:
    """Train every run of the plan, then write verdict and report and print the summary.

    Args:
        train: trains one run, given its configuration and its label on the console; on every rank.
    """
    console = Console(enabled=world.main)
    first: dict[int, tuple[ArmRun, RunResult]] = {}
    started = time.monotonic()
    for number, run in enumerate(plan, start=1):
        if config.time_limit_seconds is not None:
            left = config.time_limit_seconds - (time.monotonic() - started)
            run.config.time_limit_seconds = max(left, 1e-3)  # an arm without time left saves and stops at once
        console.info(f"\n{run.label}: run {number} of {len(plan)}, {run.config.run_dir}")
        result = train(run.config, run.label)
        if not result.finished:
            console.info(f"comparison stopped in run {number} of {len(plan)}; the same command goes on from there")
            return 0
        _check_same_start(run, result, *first.setdefault(run.seed, (run, result)))
        gc.collect()  # the model of this arm must not count as memory of the next
    folders: dict[str, dict[int, Path]] = {}
    for run in plan:
        folders.setdefault(run.arm, {})[run.seed] = Path(str(run.config.run_dir))
    on_main(world, lambda: _conclude(Path(str(config.run_dir)), folders, config))
    return 0


def compare_folders(arguments: FolderArguments) -> int:
    """Compare run folders that are there, without training.

    Raises:
        ConfigError: fewer than two, the same twice, or runs that are not comparable.
        DataError: a folder is not of a run, or holds a damaged file.
    """
    paths = [Path(folder) for folder in arguments.runs]
    if len(paths) < 2:
        raise ConfigError(f"compare: runs names {len(paths)} folder; needs at least two, the baseline first. Add one.")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError(
            f"compare: runs names a folder twice: {', '.join(map(str, paths))}; needs different ones. Correct runs."
        )
    _check_run_dir(Path(arguments.run_dir), "auto")
    folders: dict[str, dict[int, Path]] = {}
    for path in paths:
        name = Path(str(read_run(path).config.get("recipe") or path.name)).stem
        number = 2
        while name in folders:
            name, number = f"{name.rpartition('_')[0] if number > 2 else name}_{number}", number + 1
        folders[name] = {1: path}
    _conclude(Path(arguments.run_dir), folders, None)
    return 0


def _train(config: RunConfig, label: str, world: World) -> RunResult:
    console = Console(config.steps, enabled=world.main, print_every=config.log.print_every, label=label)
    return Trainer(config, world, console).run()


def _arm_names(recipes: Sequence[str]) -> dict[str, str]:
    """Arm -> recipe, the baseline first."""
    if len(recipes) < 2:
        raise ConfigError(
            f"compare.arms: got {list(recipes)}; needs at least two recipes, the baseline first. Add one."
        )
    names: dict[str, str] = {}
    hashes: dict[str, str] = {}
    for source in recipes:
        recipe = load_recipe(source)
        twin = hashes.get(recipe.hash) or (recipe.name if recipe.name in names else None)
        if twin is not None:
            raise ConfigError(
                f"compare: recipe {source} is the same as the arm {twin}; needs arms that differ. Give another "
                "recipe, such as recipe=blockwise."
            )
        names[recipe.name], hashes[recipe.hash] = source, recipe.name
    return names


def _check_run_dir(path: Path, resume: str) -> None:
    """Refuse a folder that a comparison must not write to."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run_dir: {path} is a file; needs a folder, new or of a comparison. Give another run_dir.")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if (path / "checkpoints").exists() or (path / "config.yaml").exists():
        raise ConfigError(
            f"run_dir: {path} is the folder of a run; needs a new one or that of a comparison. Give another run_dir."
        )
    if resume == "never":
        raise ConfigError(
            f"run_dir: {path} is not empty and resume=never; needs an empty one. Give another run_dir or resume=auto."
        )


def _check_begun(run: ArmRun) -> None:
    """Refuse to go on with an arm that was begun with other settings: its curve would belong to two configurations."""
    file = Path(str(run.config.run_dir)) / "config.yaml"
    if not file.is_file():
        return
    begun = dict(_flat(yaml.safe_load(file.read_text(encoding="utf-8")) or {}))
    for key, value in _flat(config_to_dict(run.config)):
        if key.partition(".")[0] not in FREE_KEYS and key in begun and begun[key] != value:
            raise ConfigError(
                f"compare: {run.config.run_dir} was begun with {key}={begun[key]}, this comparison has "
                f"{key}={value}; needs the same. "
                f"Give another run_dir, or {key}={begun[key]}."
            )


def _check_same_start(run: ArmRun, result: RunResult, first: ArmRun, first_result: RunResult) -> None:
    """Initial weights and token stream must be those of the first arm with this seed."""
    for key, words in (("init_hash", "initial weights"), ("stream_hash", "token stream")):
        own, other = getattr(result, key), getattr(first_result, key)
        if own != other:
            raise ConfigError(
                f"compare: {words} of {run.config.run_dir} ({own[:12]}) are not those of {first.config.run_dir} "
                f"({other[:12]}); needs the same for all arms. Delete both folders and start again."
            )


def _conclude(run_dir: Path, folders: Mapping[str, Mapping[int, Path]], config: RunConfig | None) -> None:
    """Write verdict.json and report.html, print the summary."""
    arms: dict[str, dict[int, RunRecord]] = {
        arm: {seed: read_run(path) for seed, path in runs.items()} for arm, runs in folders.items()
    }
    verdict = make_verdict(arms, baseline=next(iter(arms)))
    write_file(run_dir / "verdict.json", json.dumps(verdict, indent=1, allow_nan=False) + "\n")
    report = run_dir / "report.html"
    write_report(report, verdict, arms)
    if config is not None and config.log.wandb != "off":
        _send_to_wandb(run_dir, verdict, config)
    print(summary(verdict, arms))
    print(f"\nrun folder: {run_dir.resolve()}")
    print(f"report: {report.resolve()}", flush=True)


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
    """The numbers of a verdict as one flat row: `compare/ARM/heldout_gap.percent`, mean over the seeds."""
    first = verdict["arms"][verdict["baseline"]]["runs"][0]
    row: dict[str, Any] = {"step": first["steps"], "compare/status": verdict["status"]}
    for arm, comparison in verdict["comparisons"].items():
        row |= {f"compare/{arm}/{key}": value for key, value in _flat(comparison["mean"]) if value is not None}
    return row


def summary(verdict: Mapping[str, Any], arms: Arms) -> str:
    """The comparison as text: a table with one column an arm, what ran in FP8, the verdict in one sentence."""
    entries = [(verdict["arms"][arm], verdict["comparisons"].get(arm, {}).get("seeds")) for arm in arms]
    blocks = []
    for index, seed in enumerate(verdict["seeds"]):
        columns = [_column(entry["runs"][index], pairs[index] if pairs else None) for entry, pairs in entries]
        heading = f"seed {seed}" if len(verdict["seeds"]) > 1 else ""
        blocks.append(_table([heading, *(entry["label"] for entry, _ in entries)], columns))
    blocks += [text for arm, runs in arms.items() if (text := _coverage_lines(verdict["arms"][arm]["label"], runs))]
    blocks.append(f"{verdict['sentence']}\n{verdict['status'].capitalize()}: {verdict['reason']}.")
    return "\n" + "\n\n".join(blocks)


def _column(run: Mapping[str, Any], pair: Mapping[str, Any] | None) -> dict[str, str]:
    """One arm's numbers in words, by the name of their row; what is a difference stays empty for the baseline."""
    error, gap = (pair[key] if pair else {} for key in ("relative_loss_error", "heldout_gap"))
    share = run["fp8_flops_share"]
    gap_words = f"{signed_text(gap.get('nats'))} ({percent_text(gap.get('percent'), signed=True)})"
    at = f" at step {count_text(error.get('ema_max_step'))}"
    ratio = f" ({ratio_text(pair['tokens_per_second_ratio'])})" if pair else ""
    memory_ratio = f" ({ratio_text(pair['peak_memory_ratio'])})" if pair else ""
    return {
        "held-out loss, nats/token": loss_text(run["eval_loss"]),
        "  gap": gap_words if pair else "",
        "  evaluated in BF16": loss_text(run["eval_loss_bf16"]),
        "  bits per byte": loss_text(run["bits_per_byte"]),
        "training loss, EMA 0.9": loss_text(run["train_loss_ema"]),
        "  relative loss error, final": percent_text(error.get("ema_final_percent"), signed=True) if pair else "",
        "  relative loss error, max": percent_text(error.get("ema_max_percent")) + at if pair else "",
        "FLOPs of linears in FP8": percent_text(None if share is None else 100 * share, digits=1),
        "tokens per second": count_text(run["tokens_per_second"]) + ratio,
        "training time": seconds_text(run["train_seconds"]),
        "peak memory": bytes_text(run["peak_memory_bytes"]) + memory_ratio,
    }


def _table(header: Sequence[str], columns: Sequence[Mapping[str, str]]) -> str:
    rows = [list(header), *([name, *(column[name] for column in columns)] for name in columns[0])]
    widths = [max(len(row[index]) for row in rows) for index in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def _coverage_lines(label: str, runs: Mapping[int, RunRecord]) -> str:
    """Which GEMMs ran in FP8 and which did not, with the reason; '' for an arm without FP8."""
    coverage = next(iter(runs.values())).coverage
    shares = gemm_shares(coverage)
    if not any(share.fp8_flops for share in shares):
        return ""
    text = ", ".join(f"{share.gemm} {percent_text(100 * share.fp8_flops / share.flops, digits=1)}" for share in shares)
    lines = [f"{label}: in FP8 ran {text} of the FLOPs of all linears"]
    groups = exceptions(group_linears(coverage))
    for group in groups[:SHOWN_EXCEPTIONS]:
        outside = ", ".join(gemm for gemm, fp8 in group.fp8.items() if not fp8)
        layers = f" (layers {layer_numbers(group.fqns)})" if len(group.fqns) > 1 and layer_numbers(group.fqns) else ""
        lines.append(f"  not in FP8: {group.pattern}{layers}, {outside}: {group.reason or group.rule}")
    if len(groups) > SHOWN_EXCEPTIONS:
        lines.append(f"  and {len(groups) - SHOWN_EXCEPTIONS} further kinds of linears, in the report")
    return "\n".join(lines)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as (dotted key, value)."""
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        flat += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else [(f"{prefix}{key}", value)]
    return flat


if __name__ == "__main__":
    sys.exit(rank_exit_code(main))
