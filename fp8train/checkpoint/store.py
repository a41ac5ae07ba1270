"""Checkpoints: everything that a run needs to go on bit for bit, and nothing in FP8.

checkpoints/step_%08d/ holds model.safetensors (FP32 master weights by state-dict name, tied ones once),
optimizer.safetensors (moments as KEY/PARAMETER), state.json (TrainingState) and COMPLETE (sizes and checksums). Where
several ranks have written it, model-00001-of-00008.safetensors and so on: each tensor is in one of them, whole.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fp8train.checkpoint.content import optimizer_names, shapes
from fp8train.checkpoint.files import (
    MARKER,
    Marker,
    read_json,
    read_marker,
    read_tensors,
    take_back,
    verify,
)
from fp8train.checkpoint.random_state import restore_random_state
from fp8train.config import RunConfig, config_from_dict
from fp8train.distributed import unwrap
from fp8train.errors import CheckpointError
from fp8train.recipe import Recipe, load_recipe
from fp8train.shards import sharded_like

FOLDER = "checkpoints"
MODEL, OPTIMIZER = "model", "optimizer"
STATE_FILE = "state.json"
STEP_NAME = re.compile(r"step_\d{8,}")


def tensor_file(stem: str, part: int, parts: int) -> str:
    """Name of the file that holds a part of the tensors of MODEL or OPTIMIZER."""
    return f"{stem}.safetensors" if parts == 1 else f"{stem}-{part + 1:05d}-of-{parts:05d}.safetensors"


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__}


@dataclass(kw_only=True, slots=True)
class TrainingState:
    """What a checkpoint holds beside tensors; plain values that JSON can carry.

    config: resolved configuration, as config_to_dict gives it.
    recipe_document, recipe_text, recipe_hash: the recipe as parsed, as written, and the hash of its meaning.
    progress: counters of the trainer, such as steps skipped; the learning rate is a function of the step.
    data_position: where the data stream stands.
    random_states: random_state() of every rank, in rank order; empty leaves the generators alone at a resume.
    versions: of the software that wrote the checkpoint.
    """

    config: dict[str, Any]
    recipe_document: dict[str, Any]
    recipe_text: str
    recipe_hash: str
    progress: dict[str, Any] = field(default_factory=dict)
    data_position: dict[str, Any] = field(default_factory=dict)
    random_states: list[dict[str, str]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=_versions)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint that was found whole.

    path: its folder. step: optimizer steps that it has behind it. state: what it holds beside tensors.
    files: names of what it consists of.
    skipped: one line for each newer checkpoint of the run that is damaged; for the user to see.
    """

    path: Path
    step: int
    state: TrainingState
    files: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    @property
    def config(self) -> RunConfig:
        """Configuration of the run that wrote it.

        Raises:
            ConfigError: it has a key that this version does not know.
        """
        return config_from_dict(self.state.config, who=str(self.path / STATE_FILE))

    @property
    def recipe(self) -> Recipe:
        """The recipe that it was trained under, by the name that the run gave it."""
        return load_recipe(self.state.recipe_document, name=Path(self.config.recipe).stem)

    @property
    def recipe_hash(self) -> str:
        """Hash of the recipe's meaning."""
        return self.state.recipe_hash

    def check_recipe(self, recipe: Recipe, *, allow_change: bool) -> None:
        """Refuse to go on under a recipe that means something else.

        Raises:
            CheckpointError: the hashes differ and allow_change is false.
        """
        if recipe.hash != self.recipe_hash and not allow_change:
            then = f"{Path(str(self.state.config.get('recipe'))).stem} ({self.recipe_hash[:12]})"
            raise CheckpointError(
                f"resume: {self.path} was trained under the recipe {then}, this run has {recipe.name} "
                f"({recipe.hash[:12]}); needs the same. Take that recipe, give another run_dir, or set "
                "checkpoint.allow_recipe_change=true."
            )

    def load_model_state(self) -> dict[str, Tensor]:
        """Weights by state-dict name, on the CPU, tied ones under each of their names; private memory maps of the file.

        Raises:
            CheckpointError: the file is damaged.
        """
        tensors, tied = self._read(MODEL, "tied")
        return tensors | {name: tensors[first] for name, first in tied.items() if first in tensors}

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, rank: int = 0) -> None:
        """Put weights, moments and this rank's random generators back as they were. Hyper-parameters stay as they are.

        Args:
            model: in wrap_ddp's wrapper, sharded, or neither; load_state_dict's hooks run, so that FP8 codes follow.
            optimizer: over parameters of model; None leaves moments and generators alone.
            rank: whose generators; a rank that the saved run did not have keeps its own.

        Raises:
            CheckpointError: a name or shape differs, or a file is damaged.
        """
        model = unwrap(model)
        state, own = self.load_model_state(), model.state_dict()
        self._check_fit("model", shapes(state), shapes(own))
        for name, tensor in state.items():
            if tensor.dtype != own[name].dtype:  # copying would convert in secret
                raise CheckpointError(
                    f"{self.path}: weight {name} is {tensor.dtype}; needs {own[name].dtype}, as fp8train wrote it. "
                    "Take another checkpoint."
                )
        model.load_state_dict({name: sharded_like(tensor, own[name]) for name, tensor in state.items()})
        if optimizer is None:
            return
        self._restore_optimizer(model, optimizer)
        if rank < len(self.state.random_states):
            restore_random_state(self.state.random_states[rank])

    def _restore_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        tensors, parameters = self._read(OPTIMIZER, "parameters")
        names = optimizer_names(model, optimizer)
        self._check_fit("optimizer", parameters, shapes(names))
        like = {name: names.get(name.partition("/")[2]) for name in tensors}
        moments = {name: list(p.shape) if tensors[name].dim() else [] for name, p in like.items() if p is not None}
        self._check_fit("optimizer", shapes(tensors), moments)
        indices = {name: index for index, name in enumerate(names)}
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            key, _, parameter = name.partition("/")
            p = names[parameter]  # a moment is cut as its parameter is; a counter of steps has no dimension
            placed = sharded_like(tensor, p) if tensor.shape == p.shape else tensor
            state.setdefault(indices[parameter], {})[key] = placed.clone()  # the optimizer must not write to a file map
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    def _read(self, stem: str, key: str) -> tuple[dict[str, Tensor], Any]:
        """Tensors of MODEL or OPTIMIZER, and what the header of each of its files says under `key`."""
        parts = [name for name in self.files if re.fullmatch(rf"{stem}(-\d+-of-\d+)?\.safetensors", name)]
        tensors, said = dict[str, Tensor](), None
        for name in parts or [tensor_file(stem, 0, 1)]:
            own, metadata = read_tensors(self.path / name)
            tensors |= own
            try:
                said = dict(json.loads(metadata[key]))
            except (KeyError, ValueError, TypeError) as error:
                raise CheckpointError(
                    f"{self.path / name}: its header does not say what is {key} ({error!r}); needs the file as "
                    "fp8train wrote it. Take another checkpoint."
                ) from error
        return tensors, said

    def _check_fit(self, what: str, saved: Mapping[str, list[int]], own: Mapping[str, list[int]]) -> None:
        """Raise unless both have the same names with the same shapes."""
        problems = [
            *(f"{name} is missing" for name in own if name not in saved),
            *(f"{name} is unknown to the {what}" for name in saved if name not in own),
            *(f"{n} has shape {saved[n]}, the {what} {own[n]}" for n in own if n in saved and saved[n] != own[n]),
        ]
        if problems:
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise CheckpointError(
                f"{self.path}: does not fit the {what}: {problems[0]}{more}; needs the model that it was saved from. "
                "Take the checkpoint's own configuration or another checkpoint."
            )


def checkpoint_path(run_dir: str | Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return Path(run_dir) / FOLDER / f"step_{step:08d}"


def saved_steps(run_dir: str | Path) -> list[int]:
    """Steps of the checkpoints of a run folder, in the order in which they were written."""
    markers = _survey(Path(run_dir) / FOLDER)[0].values()
    return [marker.step for marker in sorted(markers, key=lambda marker: marker.sequence)]


def next_sequence(run_dir: str | Path) -> int:
    """Marker.sequence of the checkpoint that is written next."""
    return 1 + max((marker.sequence for marker in _survey(Path(run_dir) / FOLDER)[0].values()), default=0)


def open_checkpoint(path: str | Path, *, check_content: bool = True) -> Checkpoint:
    """Open a checkpoint folder, or the newest whole checkpoint of a run folder.

    Args:
        check_content: compare every byte with its checksum; False is for a rank after rank 0 has done so.

    Raises:
        CheckpointError: there is none, it is damaged or not fp8train's; for a run folder, all of them are damaged.
    """
    path = Path(path)
    if (path / FOLDER).is_dir():
        found = _newest(path, check_content)
        if found is not None:
            return found
    if not path.is_dir():
        raise CheckpointError(
            f"checkpoint {path}: is not a folder; needs a checkpoint or a run folder. Correct the path."
        )
    if (path / FOLDER).is_dir():
        raise CheckpointError(f"checkpoint {path}: is a run folder without a checkpoint; needs one. Train it first.")
    if not (path / MARKER).exists() and not STEP_NAME.fullmatch(path.name):
        raise CheckpointError(
            f"checkpoint {path}: is neither a run folder (no {FOLDER}/) nor a checkpoint (no {MARKER} file); needs one "
            "of them. Correct the path."
        )
    return _open(path, read_marker(path), check_content)


def find_resume(run_dir: str | Path, mode: str, *, recover: bool = False) -> Checkpoint | None:
    """The checkpoint to go on from, checked byte for byte; None to start from the beginning.

    Args:
        mode: "auto" takes the newest whole one of run_dir, if it has any checkpoint; "never" takes none; anything else
            is the path of a checkpoint or run folder.
        recover: give what a killed save left whole in run_dir under a temporary name its own again, and remove what it
            left half-written; for the run that holds the folder.

    Raises:
        CheckpointError: the named one is no good, or run_dir has checkpoints and all of them are damaged.
    """
    if recover:
        take_back(Path(run_dir) / FOLDER)
    if mode == "never":
        return None
    if mode != "auto":
        return open_checkpoint(mode)
    return _newest(Path(run_dir), check_content=True)


def _newest(run_dir: Path, check_content: bool) -> Checkpoint | None:
    """Newest whole checkpoint of a run folder; None if there is not even a damaged one."""
    markers, problems = _survey(run_dir / FOLDER)
    # newest is what was saved last: after going back to an earlier step, the later steps belong to another past
    for path in sorted(markers, key=lambda path: markers[path].sequence, reverse=True):
        try:
            found = _open(path, markers[path], check_content)
        except CheckpointError as error:
            problems[path] = str(error)
            continue
        newer = [path for path in problems if path in markers or path.name > found.path.name]
        skipped = tuple(f"skipped a damaged checkpoint: {_fault(problems[path])}" for path in newer)
        return dataclasses.replace(found, skipped=skipped)
    if problems:
        faults = "; ".join(_fault(problem) for problem in problems.values())
        raise CheckpointError(
            f"{run_dir}: none of its {len(problems)} checkpoints is whole; needs one. {faults}. "
            "Train again in another run_dir."
        )
    return None


def _fault(problem: str) -> str:
    """What an error says is wrong, without what to do about it."""
    return problem.partition(";")[0]


def _open(path: Path, marker: Marker, check_content: bool) -> Checkpoint:
    if check_content:
        verify(path, marker)
    content = read_json(path / STATE_FILE)
    kinds = {name: typing.get_origin(hint) or hint for name, hint in typing.get_type_hints(TrainingState).items()}
    whole = isinstance(content, dict) and set(content) == set(kinds)
    if not whole or not all(isinstance(content[name], kind) for name, kind in kinds.items()):
        wanted = ", ".join(f"{name} ({kind.__name__})" for name, kind in sorted(kinds.items()))
        raise CheckpointError(
            f"{path / STATE_FILE}: lacks keys or has others; needs {wanted}. Take another checkpoint."
        )
    return Checkpoint(path=path, step=marker.step, state=TrainingState(**content), files=tuple(marker.files))


def _survey(folder: Path) -> tuple[dict[Path, Marker], dict[Path, str]]:
    """Markers of the checkpoints in a folder, and what is wrong with those that have no good one."""
    markers: dict[Path, Marker] = {}
    problems: dict[Path, str] = {}
    for path in sorted(folder.glob("step_*")) if folder.is_dir() else ():
        if path.is_dir() and STEP_NAME.fullmatch(path.name):
            try:
                markers[path] = read_marker(path)
            except CheckpointError as error:
                problems[path] = str(error)
    return markers, problems
