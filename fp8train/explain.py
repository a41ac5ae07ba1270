"""fp8train explain: what a recipe does to a model, linear by linear, before anything is trained.

The model is laid out on the meta device, so that a laptop can explain a recipe for a model that it could not hold.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from fp8train.arguments import describe, take_arguments
from fp8train.backends.coverage import GEMMS
from fp8train.backends.selection import PLANNED
from fp8train.config import RunConfig, load_config
from fp8train.config_sections import ParallelConfig
from fp8train.conversion_report import ConversionReport, ProducerRow, RopeRow, align, index_ranges
from fp8train.convert import convert_model
from fp8train.distributed.sharding import gathered_layers, shard_bytes
from fp8train.errors import ConfigError, exit_code
from fp8train.models import Decoder, build_model
from fp8train.nn.gathered import gather_weights
from fp8train.nn.gathered_operands import CODES, MASTER, element_bytes
from fp8train.nn.weights import named_linears
from fp8train.quant.formats import LinearPrecision
from fp8train.recipe import OPERANDS, Recipe, load_recipe
from fp8train.trainer.assembly import resolve_activations, shard_ranks
from fp8train.trainer.footprint import footprint, moments_of
from fp8train.trainer.step_memory import StepMemory, step_memory
from fp8train.units import bytes_text, count_text, percent_text, short_count_text

USAGE = """usage: fp8train explain [--all] [--json] [KEY=VALUE ...]

  --all   one line for each linear; without it, linears that differ only in their indices share one
  --json  the same as JSON, one entry for each linear

"""
KEYS_OF_A_RUN = "Every key of `fp8train train` may follow, such as model=NAME (default: quickstart) and recipe=NAME.\n"
FLAGS = ("--all", "--json")
DEVICES = ("auto", "cpu", "cuda", PLANNED)
INDEX = re.compile(r"(?<=\.)\d+(?=\.)")  # of a layer in a module path


@dataclass(kw_only=True, slots=True)
class ExplainArguments:
    """Print, for every linear of a model: shape, precision of each GEMM, the rule that decided, backend and bytes.

    hf: folder of a Hugging Face model, whose config.json is explained in place of model (needs transformers)
    device: where it is to run: auto (cuda where there is a GPU, else cpu), cpu, cuda, or sm_90: an H100 or H200, which
        this machine need not have
    ranks: processes that train it, for what each holds; parallel=fsdp shards the parameters over them
    """

    hf: Path | None = None
    device: str = DEVICES[0]
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ConfigError(f"explain: device is {self.device!r}; needs one of {', '.join(DEVICES)}.")
        if self.device == DEVICES[0]:
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.ranks < 1:
            raise ConfigError(f"explain: ranks is {self.ranks}; needs at least 1.")


def main(argv: Sequence[str]) -> int:
    """Print the plan.

    Raises:
        ConfigError: an argument, the recipe or the model does not fit; see load_config, load_recipe, convert_model.
    """
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(f"{USAGE}{describe(ExplainArguments)}\n{KEYS_OF_A_RUN}")
        return 0
    given = [argument for argument in argv if argument not in FLAGS]
    arguments, rest = take_arguments(given, ExplainArguments, RunConfig)
    clash = next((argument for argument in rest if argument.startswith("model")), None)
    if arguments.hf is not None and clash is not None:
        raise ConfigError(f"explain: {clash!r} and hf={arguments.hf} both name a model; needs one. Drop one of them.")
    config = load_config(rest, "explain")
    (config if arguments.hf is None else config.parallel).check(arguments.ranks)  # hf=DIR has no step to divide
    recipe = load_recipe(config.recipe)
    model: nn.Module
    if arguments.hf is None:
        name, model = config.model.name, build_model(resolve_activations(config.model, recipe), "meta")
    else:
        name, model = hf_layout(arguments.hf)
    report = convert_model(model, recipe, config.backend, arguments.device, config.fused, config.weight_copies)
    moments = moments_of(config, recipe)
    ranks = arguments.ranks, shard_ranks(config, arguments.ranks)
    every = "--all" in argv
    text = explanation(name, model, recipe, report, moments, every=every, ranks=ranks, parallel=config.parallel)
    _, there = _rank_holds(report, model, moments, ranks, config.parallel)
    step = _step(model, config, arguments) if isinstance(model, Decoder) else None
    if "--json" in argv:
        content = {"model": name, **report.to_dict(), "step_memory": None if step is None else asdict(step)}
        sys.stdout.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
    elif step is not None:
        sys.stdout.write(f"{text}\n{_step_line(step, config, arguments.ranks, there)}\n")
    else:
        sys.stdout.write(f"{text}\n")
    return 0


def explanation(
    name: str,
    model: nn.Module,
    recipe: Recipe,
    report: ConversionReport,
    moments: str,
    *,
    every: bool = False,
    ranks: tuple[int, int] = (1, 1),
    parallel: ParallelConfig | None = None,
) -> str:
    """The plan as text: what was asked for, the precisions in use, one line per linear or group of them, the totals.

    moments: of AdamW, "fp32" or "bf16"
    ranks: processes, and how many of them share out the rows of the parameters; 1 for replicated ones
    parallel: how sharded ranks gather; None: as is usual
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    used = dict.fromkeys(row.numbers for row in report.rows if row.numbers is not None)
    parts = [
        f"model {name}: {short_count_text(parameters)} parameters, {len(report.rows)} linears\n"
        f"recipe {recipe.name}: hash {recipe.hash[:12]}, AdamW moments {moments}\n"
        f"{report.backend_reason}",
        _precision_table(list(used)),
        report.table(every=every),
        _options(recipe),
        *_remarks(report),
        _totals(report, bool(recipe.schedule)),
        _rank_holds(report, model, moments, ranks, parallel or ParallelConfig())[0],
    ]
    return "\n\n".join(part for part in parts[:-2] if part) + "\n\n" + "\n".join(parts[-2:])


def _options(recipe: Recipe) -> str:
    """What the recipe does beside its rules, which the plan above does not show."""
    lines = [
        f"schedule: from {part.at:.0%} of the steps on, linears whose rule quantises are in {part.use}"
        for part in recipe.schedule
    ]
    if recipe.swiglu is not None:
        clamp = [] if recipe.swiglu.clamp is None else [f"clamped to {recipe.swiglu.clamp:g}"]
        smooth = ["its channels scaled to alike size"] if recipe.swiglu.smooth else []
        lines.append(f"swiglu: the input of {recipe.swiglu.match} is {' and '.join(clamp + smooth)}")
    if recipe.alarm is not None:
        what, most = " or ".join(recipe.alarm.on), recipe.alarm.at_most
        lines.append(f"alarm: on {what} the worst linear goes to BF16, at most {most} times")
    return "\n".join(lines)


def _step(model: Decoder, config: RunConfig, arguments: ExplainArguments) -> StepMemory:
    """What a step of a rank takes besides what it holds from step to step; the linears of a sharded model keep none."""
    ranks, sharded = arguments.ranks, shard_ranks(config, arguments.ranks) > 1
    model.checkpointing = config.activation_checkpointing
    if sharded:
        gather_weights(model, model.layers)
    together = config.micro_batch(ranks)
    step = step_memory(
        model,
        (together, config.seq_len),
        config.global_batch_samples // ranks // together,
        device_type="cpu" if arguments.device == "cpu" else "cuda",
        document_mask=config.data.document_mask,
        keep_gradients=ranks == 1,
    )
    if sharded or ranks == 1:
        return step
    return replace(step, peak=step.peak + footprint(model, moments="fp32").weights)  # DDP keeps room for all gradients


def _step_line(step: StepMemory, config: RunConfig, ranks: int, there: int) -> str:
    """What a micro-batch keeps, and what a step takes with what is there besides, in bytes."""
    shape = f"{count_text(config.micro_batch(ranks))} x {count_text(config.seq_len)} tokens"
    most = f"{bytes_text(there + step.peak)} in all{' if it is not compiled' if config.compile else ''}"
    return f"a micro-batch of {shape} keeps {bytes_text(step.kept)} for backward, and a step takes at most {most}"


def hf_layout(folder: Path) -> tuple[str, nn.Module]:
    """(name, causal language model on the meta device with FP32 parameters) from the config.json of a folder.

    Raises:
        ConfigError: there is no config.json, transformers does not know it, or transformers is not installed.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"explain: {folder} has no config.json; needs a Hugging Face model folder. Correct hf=DIR.")
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError(
            "explain: hf=DIR needs transformers, which is not installed. pip install 'fp8train[hf]'."
        ) from error
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"explain: {folder / 'config.json'}: {reason}; needs a causal language model.") from error
    return folder.resolve().name, model


def _precision_table(precisions: Sequence[LinearPrecision]) -> str:
    """The operands of each GEMM of the precisions in use."""
    lines = [["precision", *GEMMS]]
    for precision in precisions:
        cells = [_operands(precision, gemm) for gemm in GEMMS]
        if precision.wgrad.right is not None:
            cells[-1] += f", x {precision.wgrad_source}"
        lines.append([precision.name, *cells])
    return align(lines)


def _operands(precision: LinearPrecision, gemm: str) -> str:
    """One GEMM as the recipe words it: "x e4m3 1x128 pow2, w e4m3 128x128 pow2", or "bf16"."""
    operands = precision.gemms[gemm]
    if operands.left is None and operands.right is None:
        return precision.describe(gemm)
    high = "fp32" if precision.high is torch.float32 else "bf16"
    left, right = OPERANDS[gemm]
    return f"{left} {operands.left or high}, {right} {operands.right or high}"


def _remarks(report: ConversionReport) -> list[str]:
    """Why linears stay out of FP8, which are one module, and what was fused."""
    reasons = Counter(row.reason for row in report.rows if row.numbers is None or not row.numbers.any_fp8)
    lines = []
    if any(row.numbers is not None and row.numbers.any_fp8 for row in report.rows) and reasons:
        lines = [
            "not in FP8:",
            *(f"  {count} linear{'s' if count > 1 else ''}: {why}" for why, count in reasons.items()),
        ]
    shared = [row for row in report.rows if row.other_names]
    lines += [f"one module: {row.fqn} = {' = '.join(row.other_names)}" for row in shared]
    lines += _swap_lines(
        report.producers,
        "fused with the casts of their linears",
        "norms and MLPs that are not fused with the casts of their linears",
    )
    lines += _swap_lines(
        report.ropes,
        "queries and keys rotated by a kernel in eager runs, by the formula in compiled ones",
        "queries and keys rotated by the formula",
    )
    return ["\n".join(lines)] if lines else []


def _swap_lines(rows: Sequence[ProducerRow | RopeRow], swapped: str, kept: str) -> list[str]:
    """Which modules were swapped, under the heading `swapped`, and why others were not, under `kept`."""
    fused: dict[str, list[int]] = {}
    for row in rows:
        if row.refusal is None:
            pattern, indices = INDEX.sub("{}", row.text(), count=1), INDEX.findall(row.text())
            fused.setdefault(pattern, []).extend(map(int, indices[:1]))
    lines = [f"{swapped}:"] if fused else []
    lines += [f"  {pattern.replace('{}', index_ranges(indices), 1)}" for pattern, indices in fused.items()]
    plain = Counter(row.refusal for row in rows if row.refusal is not None)
    first = {row.refusal: row for row in reversed(rows)}
    lines += [f"{kept}:"] if plain else []
    return lines + [f"  {count}, e.g. {first[why].text()}: {why}" for why, count in plain.items()]


def _totals(report: ConversionReport, scheduled: bool) -> str:
    """Share of the arithmetic, and bytes of the linears; scheduled: the recipe changes precisions during a run."""
    master = sum(row.master_bytes for row in report.rows)
    copies = sum(row.code_bytes for row in report.rows)
    scales = sum(row.scale_bytes for row in report.rows)
    share = percent_text(100 * report.planned_fp8_share(), digits=1)
    return (
        f"planned in FP8: {share} of the linears' FLOPs, if each sees every token"
        f"{', until the schedule changes it' if scheduled else ''}\n"
        f"bytes of linears: {bytes_text(master)} FP32 master, {bytes_text(copies)} copies that the GEMMs read, "
        f"{bytes_text(scales)} scales"
    )


def _rank_holds(
    report: ConversionReport, model: nn.Module, moments: str, ranks: tuple[int, int], parallel: ParallelConfig
) -> tuple[str, int]:
    """What a rank holds between two steps, and what a sharded one gathers besides while it computes.

    Also in bytes, those of gradients only where a rank has its rows of them: a step of others counts them itself.
    """
    every, over = ranks
    if over == 1:
        held = footprint(model, moments, copies=report.copy_bytes())
        text = f"each rank holds {bytes_text(held.total)} besides activations: {held.text()}, and these copies"
        return text, held.total - held.weights
    sizes = element_bytes(model) if parallel.gather == "operands" else {}
    path, weights, gradients = gathered_layers(model, sizes, parallel.reshard_after_forward)
    rounded = [parameter.shape for parameter in model.parameters() if sizes.get(id(parameter)) == CODES.itemsize]
    without = [
        fqn
        for fqn, linear in named_linears(model).items()
        if fqn.startswith(f"{path}.") or sizes.get(id(linear.weight), 4) < MASTER.dtype.itemsize
    ]
    held = footprint(model, moments, over, copies=report.copy_bytes(without) + shard_bytes(rounded, over, 1))
    groups = f", sharded over {over}," if over < every else ""
    text = (
        f"each of {every} ranks{groups} holds {bytes_text(held.total)} besides activations: {held.text()},\n"
        f"{bytes_text(held.copies)} of copies and codes; while it computes also {bytes_text(weights)} of gathered "
        f"weights, {'two layers and what is in none' if parallel.reshard_after_forward else 'all of them'},\n"
        f"and in backward {bytes_text(gradients)} of FP32 gradients"
    )
    return text, held.total + weights + gradients


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
