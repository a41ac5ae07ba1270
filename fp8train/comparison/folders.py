"""Runs that are there already, as a comparison: `fp8train compare runs=...`, which trains nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8train.comparison.arms import ARMS, BASELINE, check_run_dir
from fp8train.comparison.crossing import stored
from fp8train.config_sections import CompareConfig
from fp8train.errors import ConfigError, DataError
from fp8train.metrics import METRICS_FILE
from fp8train.report.run_record import NULL, NUMBER, odd_part, read_mapping, read_run
from fp8train.report.statistics import ALPHA

CROSSED_FILE, VERDICT_FILE = "crossed.json", "verdict.json"
# what is read of a verdict.json again; see odd_part
VERDICT = {
    "arms": {...: {"runs": [{"seed": int, "run_dir": str}]}},
    "baseline": str,
    "looks": ([{"seeds": int, "steps": int, "margin_percent": NUMBER, "alpha": NUMBER}], NULL),
}


@dataclass(kw_only=True, slots=True)
class FolderArguments:
    """Compare runs that are there: they must share model, data order, token count, tokenizer, eval set, first weights.

    runs: two or more run folders, those of the baseline first; a folder of seed_* folders stands for all of them, and
        the folder of a comparison, alone, for all of its runs: its report is written again
    run_dir: folder for verdict.json and report.html; null: that of the comparison, or runs/compare-BASELINE-ARM...
    margin_percent: largest gap of the mean held-out loss that counts as equal; null: as in run_dir before, or 0.25
    looks: verdicts planned in this run_dir as seeds are added; they share the 5 % of the tests; null: as before, or 1
    skip_damaged: leave damaged lines of metrics out, in place of refusing the file
    """

    runs: list[str]
    run_dir: str | None = None
    margin_percent: float | None = None
    looks: int | None = None
    skip_damaged: bool = False

    def __post_init__(self) -> None:
        if self.run_dir == "":  # as from run_dir=$UNSET
            raise ConfigError("run_dir: got an empty text; needs a folder. Give run_dir=DIR, or leave it out.")


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderPlan:
    """What to compare. folders: arm -> seed -> run folder, the baseline first. crossed: as stored by the comparison."""

    run_dir: Path
    folders: dict[str, dict[int, Path]]
    settings: CompareConfig
    crossed: dict[str, dict[int, dict[str, float]]]


def plan_folders(arguments: FolderArguments) -> FolderPlan:
    """Find the runs that are to be compared, and how.

    Raises:
        ConfigError: fewer than two arms, a folder twice, or other seeds in one arm than in another.
        DataError: a folder is not of a run, or holds a damaged file.
    """
    whole = Path(arguments.runs[0]) if len(arguments.runs) == 1 and (Path(arguments.runs[0]) / ARMS).is_dir() else None
    if arguments.run_dir is not None or whole is not None:
        check_run_dir(Path(arguments.run_dir or str(whole)), "auto")
    if whole is not None:
        folders = _runs_of_comparison(whole)
    else:
        paths = [path for folder in arguments.runs for path in _expanded(Path(folder))]
        _check_runs(paths)
        folders = _grouped(paths, skip_damaged=arguments.skip_damaged)
    _check_seeds(folders)
    run_dir = Path(arguments.run_dir or whole or f"runs/compare-{'-'.join(folders)}")
    check_run_dir(run_dir, "auto")
    before, standard = read_verdict(run_dir / VERDICT_FILE), CompareConfig()
    margin, looks = arguments.margin_percent, arguments.looks
    settings = CompareConfig(
        margin_percent=before.get("margin_percent", standard.margin_percent) if margin is None else margin,
        looks=round(ALPHA / before.get("alpha", ALPHA)) if looks is None else looks,
        parallel=before.get("parallel", standard.parallel),
        skip_damaged=arguments.skip_damaged,
    )
    every = [path.resolve() for runs in folders.values() for path in runs.values()]
    inside = all((run_dir / ARMS).resolve() in path.parents for path in every)
    crossed = stored(run_dir / CROSSED_FILE, folders) if inside else {}
    return FolderPlan(run_dir=run_dir, folders=folders, settings=settings, crossed=crossed)


def read_verdict(path: Path) -> dict[str, Any]:
    """A verdict.json; {} where there is none.

    Raises:
        DataError: it is damaged, or what it says of arms, runs and numbers is not of the kind that a verdict says: the
            names of arms become names of files, which must not be wherever a stranger wants them.
    """
    verdict = read_mapping(path)
    numbers = [verdict.get(key, 1) for key in ("margin_percent", "alpha", "parallel")]
    whole = (
        odd_part(verdict, VERDICT, path.name) is None
        and verdict["baseline"] in verdict["arms"]
        and all(Path(arm).name == arm for arm in verdict["arms"])
        and all(type(number) in NUMBER and 0 < number < math.inf for number in numbers)
    )
    if verdict and not whole:
        raise DataError(f"{path}: is not as fp8train writes it; needs the verdict of a comparison. Delete it.")
    return verdict


def _runs_of_comparison(folder: Path) -> dict[str, dict[int, Path]]:
    """arm -> seed -> folder: the runs that the comparison's verdict.json is of; without one all that are there, the
    baseline first.
    """
    arms = read_verdict(folder / VERDICT_FILE).get("arms", {})
    if arms:
        return {
            arm: {run["seed"]: folder / ARMS / arm / f"seed_{run['seed']}" for run in entry["runs"]}
            for arm, entry in arms.items()
        }
    there = sorted((folder / ARMS).iterdir(), key=lambda path: (path.name != BASELINE, path.name))
    found = {path.name: {int(seed.name.removeprefix("seed_")): seed for seed in _seeds(path)} for path in there}
    return {arm: seeds for arm, seeds in found.items() if seeds}


def _check_runs(paths: Sequence[Path]) -> None:
    if len(paths) < 2:
        raise ConfigError(f"compare: runs names {len(paths)} run; needs at least two, the baseline first. Add one.")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError(
            f"compare: runs names a folder twice: {', '.join(map(str, paths))}; needs different ones. Correct runs."
        )


def _expanded(path: Path) -> list[Path]:
    """The run folders that a folder stands for: itself, or those of its seeds."""
    seeds = _seeds(path)
    return seeds if seeds and not (path / METRICS_FILE).exists() else [path]


def _seeds(path: Path) -> list[Path]:
    """Folders seed_N in a folder, by N."""
    found = (seed for seed in path.glob("seed_*") if seed.name.removeprefix("seed_").isdecimal() and seed.is_dir())
    return sorted(found, key=lambda seed: int(seed.name.removeprefix("seed_")))


def _grouped(paths: Sequence[Path], *, skip_damaged: bool) -> dict[str, dict[int, Path]]:
    """arm -> seed -> folder: runs of one recipe and different seeds are one arm, named after the recipe."""
    folders: dict[str, dict[int, Path]] = {}
    recipes: dict[str, str] = {}
    for path in paths:
        run = read_run(path, skip_damaged=skip_damaged)
        stem, seed = Path(str(run.config.get("recipe") or path.name)).stem, int(run.config.get("seed", 1))
        name, number = stem, 1
        while name in folders and (seed in folders[name] or recipes[name] != run.recipe):
            number += 1
            name = f"{stem}_{number}"
        folders.setdefault(name, {})[seed] = path
        recipes[name] = run.recipe
    return folders


def _check_seeds(folders: Mapping[str, Mapping[int, Path]]) -> None:
    """Raise ConfigError unless there are two arms and all have the same seeds."""
    baseline, *others = folders
    for arm in others:
        if set(folders[arm]) != set(folders[baseline]):
            seeds = [", ".join(map(str, sorted(folders[name]))) for name in (baseline, arm)]
            raise ConfigError(
                f"compare: {baseline} has seeds {seeds[0]}, {arm} has {seeds[1]}; needs a run of every arm for every "
                "seed, since only runs of one seed share weights and data. Add or leave out runs."
            )
    if not others:
        raise ConfigError(f"compare: all runs are of {baseline}; needs at least two arms, the baseline first. Add one.")
