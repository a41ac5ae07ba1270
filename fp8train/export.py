"""`fp8train export`: write a checkpoint as a Hugging Face folder that transformers loads."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fp8train.arguments import parse_arguments, with_key
from fp8train.checkpoint import Checkpoint, open_checkpoint
from fp8train.data.build import training_tokenizer
from fp8train.data.model_tokenizer import has_tokenizer
from fp8train.data.tokenizers import Tokenizer, build_tokenizer
from fp8train.distributed import check_single
from fp8train.errors import ConfigError, exit_code, nearest
from fp8train.hf_fp8 import BlockPacking, packed_specs
from fp8train.models import ModelConfig, build_model, count_parameters, hf_name, save_hf
from fp8train.nn.remedies import fold_channel_scale
from fp8train.nn.shared_inputs import input_groups
from fp8train.recipe import Recipe, load_recipe
from fp8train.trainer.restored import precisions

PACKED = "fp8"
DTYPES = ("bfloat16", "float32", PACKED)


@dataclass(kw_only=True, slots=True)
class ExportArguments:
    """Write a checkpoint as a Hugging Face folder: config.json, safetensors and the tokenizer's files.

    checkpoint: run folder (its newest checkpoint) or one checkpoint
    out: folder to write; new or empty
    dtype: bfloat16 (rounded to nearest), float32 (the master weights) or fp8 (the E4M3 codes and scales that fprop
        multiplied, 128x128, of the linears that ran in FP8 at this step; the rest in bfloat16)
    recipe: for dtype=fp8 another one, whose rules say what to round and how; null: that of the run
    tokenizer: tokenizer.json or folder to copy; null: that of the training; none: no tokenizer and no
        eos_token_id, which otherwise is what ends a document in training unless the tokenizer's folder has another
    """

    checkpoint: Path
    out: Path
    dtype: str = "bfloat16"
    recipe: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype: got {self.dtype!r}; {nearest(self.dtype, DTYPES)}.")
        if self.recipe is not None and self.dtype != PACKED:
            raise ConfigError(f"recipe: is given, and dtype is {self.dtype}; needs dtype={PACKED}. Leave recipe out.")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0."""
    argv = with_key(argv, "checkpoint")
    check_single("export")
    arguments = parse_arguments(argv, ExportArguments)
    checkpoint = open_checkpoint(arguments.checkpoint)
    for line in checkpoint.skipped:
        sys.stderr.write(f"{line}\n")
    model = checkpoint.config.model
    chosen = None
    if arguments.tokenizer != "none":
        chosen = training_tokenizer(checkpoint.config.data, arguments.tokenizer, model.vocab_size)
    files, separator = (None, None) if chosen is None else (chosen.path, chosen.separator)  # bytes have no files
    packing = _packing(checkpoint, arguments.recipe) if arguments.dtype == PACKED else None
    state, notes = fold_remedies(checkpoint.load_model_state(), checkpoint.recipe)
    for line in [*notes, *_joined_notes(packing)]:
        sys.stderr.write(f"{line}\n")
    dtype = arguments.dtype if packing is None else "bfloat16"
    origin = None if chosen is None else _origin(model, chosen)
    save_hf(state, model, arguments.out, dtype, files, eos_token_id=separator, packing=packing, origin=origin)
    parameters = count_parameters(dataclasses.replace(model, vocab_multiple=1))
    copied = "with its tokenizer" if files else "without tokenizer files"
    what = f"{model.name} of step {checkpoint.step}, {parameters:,} parameters in {arguments.dtype}, {copied}"
    sys.stdout.write(f"{arguments.out}: {what}\n{_padding_line(model, parameters)}{_packing_line(packing)}")
    return 0


def _origin(model: ModelConfig, tokenizer: Tokenizer) -> str | None:
    """The folder that the model began as, if the model still has its tokenizer and the same end of documents.

    Says on stderr what is left out where it is gone.
    """
    if model.init_from is None:
        return None
    if (Path(model.init_from) / "config.json").is_file():
        same = has_tokenizer(model.init_from) and build_tokenizer(model.init_from).hash == tokenizer.hash
        return model.init_from if same else None
    sys.stderr.write(
        f"{model.init_from} is gone: its bos, pad and further eos token ids and generation_config.json are left out\n"
    )
    return None


def _packing(checkpoint: Checkpoint, name: str | None) -> BlockPacking:
    """How the linears of a checkpoint are written in FP8.

    Raises:
        ConfigError: the folder cannot hold what the recipe rounds.
    """
    recipe = None if name is None else load_recipe(name)
    numbers = precisions(checkpoint, recipe)
    model = dataclasses.replace(checkpoint.config.model, vocab_multiple=1)
    shapes = {
        path.removesuffix(".weight"): tensor.shape for path, tensor in build_model(model, "meta").named_parameters()
    }
    specs = packed_specs(numbers, shapes, (recipe or checkpoint.recipe).name)
    left = [hf_name(f"{fqn}.weight").removesuffix(".weight") for fqn in numbers if fqn not in specs]
    return BlockPacking(specs={f"{fqn}.weight": spec for fqn, spec in specs.items()}, left=left)


def _packing_line(packing: BlockPacking | None) -> str:
    """How many linears are in FP8; '' where none is."""
    if packing is None:
        return ""
    count = len(packing.specs)
    kinds = ", ".join(sorted({str(spec) for spec in packing.specs.values()}))
    return f"in FP8: {count} of {count + len(packing.left)} linears, {kinds}; the rest in bfloat16\n"


def _joined_notes(packing: BlockPacking | None) -> list[str]:
    """Lines on linears that read one input and are in FP8 in part: servers multiply them as one."""
    if packing is None:
        return []
    inside = {hf_name(name).removesuffix(".weight") for name in packing.specs}
    groups = [
        group for group in input_groups([*inside, *packing.left]) if 0 < len(inside.intersection(group)) < len(group)
    ]
    return [
        f"{', '.join(sorted(group))}: some are in FP8 and some are not; servers that join them may refuse the folder"
        for group in groups
    ]


def _padding_line(model: ModelConfig, parameters: int) -> str:
    """What the export has fewer than the training counted; '' where that is nothing."""
    left_out = count_parameters(model) - parameters
    if not left_out:
        return ""
    rows = f"rows {model.vocab_size:,} to {model.padded_vocab_size - 1:,} of the embedding and lm_head"
    return (
        f"left out: {left_out:,} of the {parameters + left_out:,} parameters trained, {rows}, which no token id uses\n"
    )


def fold_remedies(state: dict[str, Tensor], recipe: Recipe) -> tuple[dict[str, Tensor], list[str]]:
    """(weights with the recipe's remedies for SwiGLU in them, lines for the user).

    Channel scales go into up_proj and down_proj: the same function by powers of two. A clamp is no weight: it is lost.
    """
    if recipe.swiglu is None:
        return state, []
    state, notes = dict(state), []
    if recipe.swiglu.clamp is not None:
        notes.append(
            f"swiglu.clamp={recipe.swiglu.clamp:g} of the training is not part of a Hugging Face model: left out"
        )
    downs = [name for name in state if name.endswith(".weight") and recipe.swiglu.covers(name.removesuffix(".weight"))]
    if recipe.swiglu.smooth:
        for down in downs:
            gate, up = (
                f"{down.removesuffix('.weight').rpartition('.')[0]}.{name}_proj.weight" for name in ("gate", "up")
            )
            state[up], state[down] = fold_channel_scale(state[gate], state[up], state[down])
        notes.append(
            f"swiglu.smooth: channel scales folded into {len(downs)} pairs of up_proj and down_proj; in FP8 they are "
            "rounded after that"
        )
    return state, notes


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
