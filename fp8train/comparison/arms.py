"""The runs of a comparison: which arms and seeds there are, what must hold before and between them."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fp8train.config import RunConfig
from fp8train.convert import convert_model
from fp8train.data import build_dataset
from fp8train.errors import ConfigError
from fp8train.models import build_model
from fp8train.recipe import load_recipe
from fp8train.report.run_record import read_mapping
from fp8train.trainer.assembly import resolve_activations
from fp8train.trainer.console import Console
from fp8train.trainer.evaluation import held_out_hashes
from fp8train.trainer.same_run import changed_keys

BASELINE, PLACEBO = "bf16", "placebo"
ARMS = "arms"  # folder of the runs in that of a comparison
STARTS = {"init_hash": "initial weights", "stream_hash": "token stream"}  # key of result.json -> words for it


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


def plan_arms(
    config: RunConfig, *, recipe_given: bool = True, ranks: int = 1, device_type: str = "cpu"
) -> list[ArmRun]:
    """The runs of a comparison, seed by seed, the baseline first; writes nothing.

    Args:
        config: recipe, compare, run_dir and seed are read.
        recipe_given: the user named a recipe, so that leaving it out of compare.arms would not be what was asked for.
        ranks: that train together.
        device_type: where they train, "cpu" or "cuda".

    Raises:
        ConfigError: fewer than two arms, two that are the same, a way of running that is not there, or a run_dir that
            holds something else or arms of another configuration.
        RecipeError: no such recipe, or one that does not fit the model.
        BackendError: the backend cannot run here, or cannot serve a recipe.
    """
    recipes = config.compare.arms if config.compare.arms is not None else _default_arms(config)
    if recipe_given and config.recipe not in recipes:
        raise ConfigError(
            f"compare: recipe is {config.recipe}, but compare.arms are {', '.join(recipes)}; needs the recipe "
            "among them. Leave one out."
        )
    if config.compare.parallel > 1 and ranks > 1:
        raise ConfigError(
            f"compare.parallel: got {config.compare.parallel} under torchrun with {ranks} ranks; needs 1 there, since "
            "every rank takes part in every run. Leave it out, or start without torchrun."
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
            arm.eval.first = True  # what the baseline has learned is held against the margin
            arm.run_dir = str(Path(config.run_dir) / ARMS / name / f"seed_{seed}")
            runs.append(ArmRun(arm=name, seed=seed, config=arm))
    check_run_dir(Path(config.run_dir), config.resume)
    for run in runs:
        _check_begun(run)
    for run in {run.arm: run for run in runs}.values():  # now, and not after the arms before it have trained for hours
        check_fits(run.config, device_type, ranks)
    return runs


def check_fits(config: RunConfig, device_type: str, ranks: int) -> None:
    """Refuse settings that the ranks cannot share out, and a recipe or backend that the model cannot have.

    The model is laid out without memory for it.
    """
    config.check(ranks)
    recipe = load_recipe(config.recipe)
    model = build_model(resolve_activations(config.model, recipe), device="meta")
    convert_model(model, recipe, backend=config.backend, device_type=device_type, fused=config.fused)


def _default_arms(config: RunConfig) -> list[str]:
    """The baseline and the recipe; between them the placebo where several seeds give it an interval."""
    placebo = [PLACEBO] if config.compare.seeds > 1 and config.recipe != PLACEBO else []
    return [BASELINE, *placebo, config.recipe]


class ComparisonProgress:
    """Announces runs and checks that those of one seed have the same start.

    Args:
        plan: all runs. time_limit_seconds: of the whole comparison; None for none.
    """

    def __init__(self, plan: Sequence[ArmRun], console: Console, time_limit_seconds: float | None) -> None:
        self._plan = list(plan)
        self._console = console
        self._limit = time_limit_seconds
        self._started = time.monotonic()
        self._first: dict[tuple[int, str], tuple[ArmRun, str]] = {}
        self._done = 0

    def begin(self, run: ArmRun) -> None:
        """Before a run: what is left of the time limit is its own."""
        if self._limit is not None:
            left = self._limit - (time.monotonic() - self._started)
            run.config.time_limit_seconds = max(left, 1e-3)  # an arm without time left saves and stops at once
        number = self._plan.index(run) + 1
        self._console.info(f"\n{run.label}: run {number} of {len(self._plan)}, {run.config.run_dir}")

    def done(self, run: ArmRun, facts: Mapping[str, Any], *, earlier: bool = False) -> None:
        """After a run that has finished or diverged.

        Args:
            facts: of its result.json.
            earlier: it had before this comparison was begun, or begun again, and is not trained.
        """
        self._done += 1
        for key, words in STARTS.items():
            if key != "stream_hash" or not facts["diverged"]:  # a run that diverged has seen only part of its tokens
                _check_same_start(
                    run, words, str(facts[key]), *self._first.setdefault((run.seed, key), (run, str(facts[key])))
                )
        if facts["diverged"]:
            what = f"{run.label}: diverged at step {facts['diverged']['step']} ({facts['diverged']['reason']})"
            ended = "; the comparison goes on without it"
            if earlier:
                ended = f" and would again; not trained. To try it again, delete {run.config.run_dir}"
            self._console.info(what + ended)

    def stopped(self) -> None:
        """After one that has not."""
        self._console.info(
            f"comparison stopped: {self._done} of {len(self._plan)} runs are finished; the same command goes on from "
            "there"
        )


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
        if (twin := hashes.get(recipe.hash)) is not None:
            raise ConfigError(
                f"compare: recipe {source} is the same as the arm {twin}; needs arms that differ. Give another "
                "recipe, such as recipe=blockwise."
            )
        if recipe.name in names:
            raise ConfigError(
                f"compare: recipe {source} has the name of the arm {recipe.name}; needs one of its own. Rename the "
                "file."
            )
        names[recipe.name], hashes[recipe.hash] = source, recipe.name
    return names


def check_run_dir(path: Path, resume: str) -> None:
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


def check_same_data(config: RunConfig, ended: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse text that has changed since runs of this comparison were trained, before others are trained on it; and
    mixes that were scored by another mean.

    Args:
        ended: run folder -> its result.json.
    """
    dataset = build_dataset(config.data, config.seq_len, config.seed)
    windows, weighed = held_out_hashes(dataset.held_out()) if config.data.holdout_fraction > 0 else ("", "")
    for folder, facts in ended.items():
        if facts["data_hash"] != dataset.fingerprint:
            raise ConfigError(
                f"compare: text, tokenizer or split of {folder} ({facts['data_hash'][:12]}) are not those of now "
                f"({dataset.fingerprint[:12]}); needs the same for all arms. Restore what was changed since, or give "
                "another run_dir."
            )
        if windows != weighed and facts.get("eval_hash") == windows:
            raise ConfigError(
                f"compare: {folder} was scored by an earlier version, whose held-out loss of a mix is the mean over "
                "windows and not by the shares; needs one mean for all arms. Give another run_dir, or delete that run."
            )


def _check_begun(run: ArmRun) -> None:
    """Refuse to go on with an arm that was begun with other settings: its curve would belong to two configurations."""
    file = Path(str(run.config.run_dir)) / "config.yaml"
    if not file.is_file():
        return
    for key, (then, now) in changed_keys(read_mapping(file), run.config).items():
        raise ConfigError(
            f"compare: {run.config.run_dir} was begun with {key}={then}, this comparison has {key}={now}; "
            f"needs the same. Give another run_dir, or {key}={then}."
        )


def _check_same_start(run: ArmRun, words: str, own: str, first: ArmRun, other: str) -> None:
    """Initial weights or token stream, as a hash, must be those of the first arm with this seed."""
    if own != other:
        raise ConfigError(
            f"compare: {words} of {run.config.run_dir} ({own[:12]}) are not those of {first.config.run_dir} "
            f"({other[:12]}); needs the same for all arms. Restore what was changed since, or give another run_dir."
        )
