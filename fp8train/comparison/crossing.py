"""The weights of one run in the arithmetic of another: whether a gap lies in the weights or in how they are used."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fp8train.checkpoint import open_checkpoint
from fp8train.data import Batcher, build_dataset
from fp8train.distributed import World
from fp8train.distributed.agreement import on_every_rank, on_main
from fp8train.recipe import load_recipe
from fp8train.report.run_record import NUMBER, odd_part, read_mapping
from fp8train.trainer.evaluation import EvalSet
from fp8train.trainer.restored import crossed
from fp8train.trainer.run_folder import RESULT_FILE, write_file


def crossed_losses(weights: Path, arithmetics: Mapping[str, Path], world: World) -> dict[str, float]:
    """Held-out loss of a run's newest weights, computed as each of the other runs computed at its newest checkpoint.

    The windows and the way they are cut into batches are those of the run's own evaluation.

    Args:
        weights: run folder with a checkpoint.
        arithmetics: name -> run folder with a checkpoint.

    Returns:
        dict[str, float]: nats per token by name.

    Raises:
        UserError: a checkpoint is missing or damaged, or data, recipe or backend do not serve here.
    """
    checkpoint = on_every_rank(world, lambda: open_checkpoint(weights))
    config = checkpoint.config
    size = config.micro_batch(world.world_size)
    dataset = build_dataset(config.data, config.seq_len, config.seed)
    eval_set = EvalSet(Batcher(dataset, config.global_batch_samples, size, world.rank, world.world_size), world)
    found = {}
    for name, folder in arithmetics.items():
        other = on_every_rank(world, functools.partial(open_checkpoint, folder))
        assembly = crossed(checkpoint, other, world.device)
        found[name] = eval_set.score(assembly.model).nats
    return found


def cross_evaluate(
    file: Path, folders: Mapping[str, Mapping[int, Path]], world: World, info: Callable[[str], None]
) -> dict[str, dict[int, dict[str, float]]]:
    """Held-out losses of the baseline's weights in each arm's arithmetic; where the baseline is not BF16, also of the
    arm's weights in the baseline's (every run evaluates itself in BF16).

    Args:
        file: what was evaluated before and is not again; grows.
        folders: arm -> seed -> run folder, the baseline first; without the runs that diverged.
        info: takes a line before each evaluation.

    Returns:
        arm -> seed -> {"baseline_weights": nats, "arm_weights": nats}; empty where a run kept no checkpoint.
    """
    baseline, *others = folders
    paths = [path / "checkpoints" for runs in folders.values() for path in runs.values()]
    if not on_main(world, lambda: all(path.is_dir() for path in paths)):
        return {}
    known: dict[str, dict[str, Any]] = on_main(world, lambda: _read(file))
    result: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in others}
    for seed, path in folders[baseline].items():
        step, all_bf16 = on_main(world, functools.partial(_state, path))
        arms = [arm for arm in others if seed in folders[arm]]
        missing = {arm: folders[arm][seed] for arm in arms if known.get(f"{arm} seed {seed}", {}).get("step") != step}
        if missing:
            info(f"evaluating the weights of {path} in the arithmetic of {', '.join(missing)}")
            for arm, nats in crossed_losses(path, missing, world).items():
                known[f"{arm} seed {seed}"] = {"step": step, "baseline_weights": nats}
        for arm in missing if not all_bf16 else ():
            nats = crossed_losses(missing[arm], {baseline: path}, world)[baseline]
            known[f"{arm} seed {seed}"]["arm_weights"] = nats
        if missing:
            on_main(world, lambda: write_file(file, json.dumps(known, indent=1) + "\n"))
        for arm in arms:
            result[arm][seed] = {key: value for key, value in known[f"{arm} seed {seed}"].items() if key != "step"}
    return result


def stored(file: Path, folders: Mapping[str, Mapping[int, Path]]) -> dict[str, dict[int, dict[str, float]]]:
    """What cross_evaluate has written for these runs as they are, without evaluating any."""
    known, (baseline, *others) = _read(file), folders
    result: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in others}
    for seed, path in folders[baseline].items():
        step = read_mapping(path / RESULT_FILE).get("steps")
        for arm in others:
            entry = known.get(f"{arm} seed {seed}", {})
            if entry.get("step") == step:
                result[arm][seed] = {key: value for key, value in entry.items() if key != "step"}
    return result


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """What is in the file; nothing if it is not there or not whole, since it can be made again."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return {} if odd_part(content, {...: {...: NUMBER}}, file.name) else content


def _state(path: Path) -> tuple[int, bool]:
    """Step of the newest checkpoint, and whether its recipe is BF16 throughout."""
    checkpoint = open_checkpoint(path, check_content=False)
    return checkpoint.step, checkpoint.recipe_hash == load_recipe("bf16").hash
