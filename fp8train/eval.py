"""Score a checkpoint on held-out text, in its own precision and in BF16: `fp8train eval checkpoint=DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8train.arguments import describe, take_arguments, with_key
from fp8train.checkpoint import Checkpoint, open_checkpoint
from fp8train.config import RunConfig
from fp8train.data import Batcher, build_dataset, check_vocabulary
from fp8train.distributed import World, init, rank_exit_code
from fp8train.distributed.agreement import on_main
from fp8train.metrics import to_json_line
from fp8train.recipe import load_recipe
from fp8train.trainer.changed_run import check_split, evaluation_config, help_on_run
from fp8train.trainer.evaluation import EvalSet, evaluate, source_losses
from fp8train.trainer.restored import restored
from fp8train.trainer.run_folder import write_file


@dataclass(kw_only=True, slots=True)
class EvalArguments:
    """Score a checkpoint on held-out text: nats per token, bits per byte, perplexity; keys of the run may be changed.

    checkpoint: run folder (its newest checkpoint) or one checkpoint
    out: file that gets the scores as one JSON object; null: none
    """

    checkpoint: Path
    out: Path | None = None


def main(argv: Sequence[str]) -> int:
    """Score as asked and print a table; returns 0.

    Other text: data=text data.path=FILE data.holdout_fraction=0.9, in the tokenizer of the run. Further keys are
    taken too: data.eval_windows, seq_len, backend, micro_batch_samples, model.activations and the like; recipe=NAME
    scores the same weights in another arithmetic.
    """
    argv = with_key(argv, "checkpoint")
    if any(argument in ("-h", "--help") for argument in argv):
        sys.stdout.write(f"{describe(EvalArguments)}\n{help_on_run(argv)}")
        return 0
    arguments, changes = take_arguments(argv, EvalArguments, RunConfig)
    checkpoint = open_checkpoint(arguments.checkpoint)
    config = evaluation_config(checkpoint, changes, "eval")
    with init(config.parallel.timeout_seconds) as world:
        row = score_checkpoint(checkpoint, config, world)
        if world.main:
            sys.stdout.write(table(checkpoint, row))
        out = arguments.out
        if out is not None:
            on_main(world, lambda: write_file(out, to_json_line(row)))
    return 0


def score_checkpoint(checkpoint: Checkpoint, config: RunConfig, world: World) -> dict[str, Any]:
    """Scores as one row: those of evaluation.evaluate, with step, checkpoint, recipe and the hash of the windows.

    Raises:
        UserError: data, backend or checkpoint do not serve.
    """
    dataset = build_dataset(config.data, config.seq_len, config.seed)
    check_vocabulary(dataset, config.model.vocab_size)
    check_split(checkpoint, config, dataset, "eval")
    size = config.micro_batch_samples or 8
    eval_set = EvalSet(Batcher(dataset, size * world.world_size, size, world.rank, world.world_size), world)
    another = None if config.recipe == checkpoint.config.recipe else load_recipe(config.recipe)
    assembly = restored(checkpoint, world.device, config=config, recipe=another)
    scores = evaluate(assembly.model, eval_set, bf16=True, all_bf16=assembly.all_bf16)
    return {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "recipe": assembly.recipe.name,
        "backend": assembly.report.backend,
        "text": dataset.describe(),
        **scores,
        "eval_hash": eval_set.hash,
    }


def table(checkpoint: Checkpoint, row: dict[str, Any]) -> str:
    """The scores as text."""
    lines = [
        *checkpoint.skipped,
        f"checkpoint {row['checkpoint']}, step {row['step']}, recipe {row['recipe']}, backend {row['backend']}",
        f"text: {row['text']}",
        f"held out: {row['eval_tokens']:,} tokens, {row['eval_bytes']:,} bytes",
        f"{'precision':17s} {'nats/token':>10s} {'bits/byte':>10s} {'perplexity':>11s}",
    ]
    for name, suffix in ((row["recipe"], ""), ("evaluated in BF16", "_bf16")):
        loss, bits, perplexity = (row[key + suffix] for key in ("eval_loss", "bits_per_byte", "perplexity"))
        lines.append(f"{name:17s} {loss:10.4f} {bits:10.4f} {perplexity:11.4f}")
        lines += [f"  {source:15s} {nats:10.4f}" for source, nats in source_losses(row, suffix).items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(rank_exit_code(main))
