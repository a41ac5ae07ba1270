"""What `sensitivity` and `search` begin with: their arguments, a converted model with its weights, and its windows."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fp8train.arguments import describe, take_arguments, with_key
from fp8train.calibration import METRICS, Calibration
from fp8train.checkpoint import open_checkpoint
from fp8train.config import RunConfig, load_config
from fp8train.data import Batcher, build_dataset, check_model_tokenizer, check_vocabulary
from fp8train.data.dataset import PackedDataset
from fp8train.distributed import World, check_single
from fp8train.errors import ConfigError, DataError, nearest
from fp8train.recipe import load_recipe
from fp8train.trainer.assembly import Assembly, assemble
from fp8train.trainer.changed_run import evaluation_config, help_on_run
from fp8train.trainer.restored import restored

T = TypeVar("T", bound="CalibrationArguments")


@dataclass(kw_only=True, slots=True)
class CalibrationArguments:
    """What judges precisions on a few windows takes.

    checkpoint: run folder or checkpoint whose weights are judged; null: fresh weights of the seed
    windows: training windows of seq_len tokens that are read
    metric: loss (rms change of a token's loss), gradient, sqnr, range_parm, kurtosis or row_error; see the table
    out: file that is written; null: see the command
    """

    checkpoint: Path | None = None
    windows: int = 4
    metric: str = "loss"
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise ConfigError(f"windows: got {self.windows}; needs at least 1.")
        if self.metric not in METRICS:
            raise ConfigError(f"metric: got {self.metric!r}; {nearest(self.metric, list(METRICS))}.")


def check_out(path: Path, command: str) -> None:
    """Refuse, before anything is measured, a file that is there or that cannot be written.

    Raises:
        ConfigError: names the file.
    """
    if path.exists():
        raise ConfigError(f"{command}: {path} exists; needs a new file. Give another out=FILE, or delete it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"{command}: {path} cannot be written ({error.strerror or error}); needs a folder that can. Give another "
            "out=FILE."
        ) from error


def set_up(
    argv: Sequence[str], kind: type[T], command: str, about: str = ""
) -> tuple[T, RunConfig, Assembly, Calibration]:
    """Arguments, run configuration, converted model with its weights, and the calibration windows.

    Args:
        argv: keys of `kind` and of a run, the checkpoint also bare; -h or --help prints them, after `about`, and exits.

    Raises:
        UserError: an argument, recipe, checkpoint or text does not serve, or there are several ranks.
    """
    argv = with_key(argv, "checkpoint")
    if any(argument in ("-h", "--help") for argument in argv):
        sys.stdout.write(f"{about}{describe(kind)}\n{help_on_run(argv)}")
        raise SystemExit(0)
    check_single(command)
    arguments, rest = take_arguments(argv, kind, RunConfig)
    checkpoint = None if arguments.checkpoint is None else open_checkpoint(arguments.checkpoint)
    config = load_config(rest, command) if checkpoint is None else evaluation_config(checkpoint, rest, command)
    named = checkpoint is None or any(argument.startswith("recipe=") for argument in rest)
    recipe = load_recipe(config.recipe) if named else None
    world = World()
    dataset = build_dataset(config.data, config.seq_len, config.seed)
    check_model_tokenizer(dataset.tokenizer, config.data, config.model.init_from)
    check_vocabulary(dataset, config.model.vocab_size, config.model.init_from)
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
    return arguments, config, assembly, Calibration(assembly.model, batches)


def headline(arguments: CalibrationArguments, config: RunConfig, assembly: Assembly, calibration: Calibration) -> str:
    """What was judged, and on what."""
    weights = "fresh weights" if arguments.checkpoint is None else arguments.checkpoint
    return (
        f"model {config.model.name}, {weights}; recipe {assembly.recipe.name}; {calibration.tokens:,} tokens in "
        f"{arguments.windows} training windows\n{assembly.report.backend_reason}\n"
    )


def show_progress(done: int, total: int) -> None:
    """A counter on a terminal's standard error; nothing elsewhere."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done}/{total} linears{' ' * 8 if done < total else chr(10)}")
        sys.stderr.flush()
