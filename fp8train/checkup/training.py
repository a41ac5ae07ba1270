"""Checks of whole steps: what must not change when the same tokens are trained in another way."""

from __future__ import annotations

import tempfile

import torch

from fp8train.backends.coverage import COUNTS
from fp8train.checkpoint import TrainingState, content_of, open_checkpoint, write_checkpoint
from fp8train.checkpoint.random_state import random_state
from fp8train.checkup.outcome import Outcome, distance
from fp8train.checkup.subject import BLOCK, PARTS, Subject, precisions
from fp8train.config import config_to_dict
from fp8train.data import MASKED_TARGET
from fp8train.distributed import World
from fp8train.nn.linear import Float8Linear
from fp8train.nn.weights import converted_linears, weights_changed
from fp8train.trainer.assembly import Assembly, parameter_hash
from fp8train.trainer.determinism import deterministic_algorithms
from fp8train.trainer.evaluation import EvalSet, evaluate
from fp8train.trainer.measuring import StreamHash
from fp8train.trainer.step import inputs
from fp8train.trainer.strict_coverage import StepAudit, swapped_precisions

# The same codes, FP32 sums in another order; where that turns one BF16 rounding of an activation, its code moves by
# 2^-4. 1 code in 4000 would give 1e-3. A micro-batch that is lost gives 0.3 or more.
ORDER_LIMIT = 1e-3
# Blocks that end elsewhere: two roundings of E4M3 (2.6 % each) or E5M2 (5 %) on two operands.
NOISE_LIMIT = 0.15
LOSS_SHIFT = -16


def split(subject: Subject) -> Outcome:
    """One micro-batch or several: the gradient of a step is the same."""
    assembly = subject.fresh()
    whole, one = subject.gradients(assembly, subject.batches(subject.size * PARTS))
    parts, other = subject.gradients(assembly, subject.batches())
    apart, where = distance(one, other)
    limit = split_limit(subject, assembly)
    return Outcome(
        passed=apart <= limit and abs(whole.loss - parts.loss) <= limit * abs(whole.loss),
        first=f"1 micro-batch: loss {whole.loss:.6f}",
        second=f"{PARTS}: {parts.loss:.6f}",
        detail=f"gradients apart {apart:.1e} ({where}), limit {limit:g}"
        f"{'' if limit == ORDER_LIMIT else ' (scales span tokens)'}",
        meaning="gradients of some micro-batches are lost, averaged or rounded to BF16, the loss is not divided by "
        "the tokens of the whole step, or state (amax history) leaks between micro-batches.",
    )


def split_limit(subject: Subject, assembly: Assembly) -> float:
    """How far gradients and losses may part where a step is split otherwise: whether that changes blocks of tokens."""
    blocks = [s.block for p in precisions(assembly) for g in p.gemms.values() for s in (g.left,) if s is not None]
    blocks += [p.wgrad.right.block for p in precisions(assembly) if p.wgrad.right is not None]
    same = subject.size * subject.config.seq_len % BLOCK == 0 and all(block == (1, BLOCK) for block in blocks)
    return ORDER_LIMIT if same else NOISE_LIMIT


def data_order(subject: Subject) -> Outcome:
    """1, 2 and 4 ranks see the same sequences in a step, each once."""

    def seen(ranks: int) -> str:
        stream = StreamHash()
        for step in range(2):
            for rank in range(ranks):
                stream.add(subject.batcher(rank, ranks).micro_batches(step))
        return f"{stream.total(World()):016x}"

    one, *others = (seen(ranks) for ranks in (1, 2, 4))
    return Outcome(
        passed=all(other == one for other in others),
        first=f"1 rank: {one}",
        second=f"2 and 4 ranks: {', '.join(others)}",
        meaning="ranks read the same sequences twice or skip some, so that a run cannot go on with another number.",
    )


@deterministic_algorithms(True)
def resume(subject: Subject) -> Outcome:
    """Two steps, a checkpoint and a third step give the bits of three steps."""
    assembly = subject.fresh()
    optimizer = subject.optimizer(assembly)
    for step in (0, 1):
        subject.train(assembly, optimizer, step)
    with tempfile.TemporaryDirectory(prefix="fp8train-doctor-") as folder:
        recipe = assembly.recipe
        state = TrainingState(
            config=config_to_dict(subject.config),
            recipe_document=recipe.document,
            recipe_text=recipe.text,
            recipe_hash=recipe.hash,
            random_states=[random_state()],
        )
        write_checkpoint(folder, 2, content_of(assembly.model, optimizer), state)
        straight_loss = subject.train(assembly, optimizer, 2).loss
        straight = parameter_hash(assembly.model)
        del assembly, optimizer
        assembly = subject.fresh(seed=subject.config.seed + 1)
        optimizer = subject.optimizer(assembly)
        open_checkpoint(folder).restore(assembly.model, optimizer)
        resumed_loss = subject.train(assembly, optimizer, 2).loss
    resumed = parameter_hash(assembly.model)
    return Outcome(
        passed=resumed == straight,
        first=f"straight on: loss {straight_loss:.6f}, weights {straight[:12]}",
        second=f"resumed: {resumed_loss:.6f}, {resumed[:12]}",
        meaning="something is not in the checkpoint (moments, generators, step), FP8 weight codes are not made anew "
        "after loading, or an operation has no deterministic algorithm.",
    )


@deterministic_algorithms(True)
def checkpointing(subject: Subject) -> Outcome:
    """Activation checkpointing changes no bit of the gradient and runs no backward GEMM twice."""
    found = {}
    for choice in ("none", "selective", "full"):
        assembly = subject.fresh(activation_checkpointing=choice)
        COUNTS.reset()
        result, gradients = subject.gradients(assembly, subject.batches())
        rows = _rows_of_backward(assembly)
        found[choice] = (result.loss, gradients, rows)
    loss, gradients, rows = found.pop("none")
    apart, where = max((distance(gradients, other[1]) for other in found.values()), key=lambda pair: pair[0])
    again = [other[2] for other in found.values()]
    return Outcome(
        passed=apart == 0 and all(value == rows for value in again),
        first=f"none: loss {loss:.6f}, rows in backward {rows}",
        second=f"selective, full: {', '.join(f'{v[0]:.6f}, {v[2]}' for v in found.values())}",
        detail=f"gradients apart {apart:.1e} ({where})",
        meaning="recomputation takes other scales or statistics than the first forward, counts them twice, or adds "
        "a gradient twice.",
    )


def _rows_of_backward(assembly: Assembly) -> int:
    gemms = [gemm for row in assembly.report.coverage()["linears"] for gemm in row["gemms"].items()]
    return sum(count["fp8_rows"] + count["other_rows"] for name, count in gemms if name != "fprop")


def compiled(subject: Subject) -> Outcome:
    """torch.compile changes no more than the order of sums."""
    eager, gradients = subject.gradients(subject.fresh(), subject.batches())
    other, compiled_gradients = subject.gradients(subject.fresh(compile=True), subject.batches())
    apart, where = distance(gradients, {k.removeprefix("_orig_mod."): v for k, v in compiled_gradients.items()})
    # Inductor keeps BF16 intermediates in FP32 between fused operations: the codes of some activations move
    limit = 0.05
    return Outcome(
        passed=apart <= limit,
        first=f"eager: loss {eager.loss:.6f}",
        second=f"compiled: {other.loss:.6f}",
        detail=f"gradients apart {apart:.1e} ({where}), limit {limit:g}",
        meaning="a graph that froze the weight codes of its first step, or a miscompiled operation. compile=false.",
    )


def cached(subject: Subject) -> Outcome:
    """After an optimizer step, the weight codes at hand give the loss that fresh ones give."""
    assembly = subject.fresh()
    optimizer = subject.optimizer(assembly)
    subject.train(assembly, optimizer, 0)
    kept = _loss(subject, assembly)
    weights_changed(assembly.model)
    fresh = _loss(subject, assembly)
    tokens = int((subject.batches()[0].targets != MASKED_TARGET).sum())
    return Outcome(
        passed=kept == fresh,
        first=f"loss after a step with the weight codes at hand {kept / tokens:.9f}",
        second=f"with fresh ones {fresh / tokens:.9f}",
        detail="nats per token; the same bits are wanted",
        meaning="FP8 weight codes that did not follow the optimizer: a fused or foreign optimizer moves no version "
        "counter, so an edit must be announced with fp8train.weights_changed(model).",
    )


def _loss(subject: Subject, assembly: Assembly) -> float:
    """Sum over the tokens of a micro-batch."""
    batch = subject.batches()[0]
    with torch.no_grad():
        return float(assembly.model(*inputs(batch, subject.device)))


def evaluation(subject: Subject) -> Outcome:
    """Evaluation computes the loss that training's forward computes, and leaves every precision as it was."""
    assembly = subject.fresh()
    eval_set = EvalSet(subject.batcher(), subject.world)
    trained = eval_set.average(lambda batch: assembly.model(*inputs(batch, subject.device)).detach()).nats
    scores = evaluate(assembly.model, eval_set, bf16=True, all_bf16=assembly.all_bf16)
    swapped = swapped_precisions(assembly)
    return Outcome(
        passed=scores["eval_loss"] == trained and not swapped,
        first=f"training's forward {trained:.9f}",
        second=f"evaluation {scores['eval_loss']:.9f}",
        detail=swapped[0] if swapped else f"in BF16 {scores['eval_loss_bf16']:.9f}",
        meaning="evaluation runs in another precision than training, keeps codes of its own, or leaves the model in "
        "its precision; a bias or dropout may differ between the two modes.",
    )


def fp8_matters(subject: Subject) -> Outcome:
    """The recipe changes numbers against BF16: what claims to be FP8 is not BF16 in disguise."""
    assembly = subject.fresh()
    scores = evaluate(assembly.model, EvalSet(subject.batcher(), subject.world), bf16=True, all_bf16=False)
    own, high = scores["eval_loss"], scores["eval_loss_bf16"]
    planned = any(precision.fprop.fp8 for precision in precisions(assembly))
    return Outcome(
        passed=(own != high or not planned) and abs(own - high) <= 0.05 * abs(high),
        first=f"own precision {own:.9f}",
        second=f"BF16 {high:.9f}",
        detail="FP8 planned in fprop: they must differ" if planned else "no FP8 planned in fprop: they may be equal",
        meaning="equal: an emulation or a fall-back that drops the recipe; more than 5 % apart: a recipe that ruins "
        "this model.",
    )


@deterministic_algorithms(True)  # attention on a GPU sums in any order otherwise
def loss_scale(subject: Subject) -> Outcome:
    """A loss 2^-16 times as large gives gradients 2^-16 times as large, bit for bit: the codes of dy are the same."""
    assembly = subject.fresh()
    if any(precision.noise for precision in precisions(assembly)):
        return Outcome(
            passed=True,
            first="the recipe puts noise on operands, drawn from all their bits",
            second="not compared: other magnitudes get other noise",
            meaning="nothing.",
        )
    batch = inputs(subject.batches()[0], subject.device)
    found = []
    for shift in (0, LOSS_SHIFT):
        assembly.model.zero_grad(set_to_none=True)
        (assembly.model(*batch) * 2.0**shift).backward()
        named = assembly.model.named_parameters()
        found.append({name: p.grad * 2.0**-shift for name, p in named if p.grad is not None})
    apart, where = distance(*found)
    norms = [float(torch.stack([g.norm() for g in gradients.values()]).norm()) for gradients in found]
    return Outcome(
        passed=apart == 0,
        first=f"gradient norm {norms[0]:.6e}",
        second=f"with loss x 2^{LOSS_SHIFT}, scaled back {norms[1]:.6e}",
        detail=f"apart {apart:.1e} ({where})",
        meaning="an absolute floor under amax or a scale that is not per block: with many tokens in a step dy is tiny, "
        "and its small elements vanish.",
    )


def coverage(subject: Subject) -> Outcome:
    """Every GEMM that the recipe puts in FP8 runs in FP8 in a step."""
    assembly = subject.fresh()
    COUNTS.reset()
    audit = StepAudit(assembly, compiled=False)
    audit.begin()
    subject.gradients(assembly, subject.batches())
    problems, _ = audit.end()
    problems = swapped_precisions(assembly) + problems
    share = assembly.report.coverage()["fp8_flops_share"]
    return Outcome(
        passed=not problems,
        first=f"planned {assembly.report.planned_fp8_share():.1%} of FLOPs in FP8",
        second=f"ran {share:.1%}",
        detail=problems[0] if problems else "",
        meaning="a module that was replaced or bypassed after the conversion, or a fall-back that says nothing.",
    )


def siblings(subject: Subject) -> Outcome:
    """No linear is left out of FP8 by the catch-all rule while those that read the same input, or its like, are in."""
    assembly = subject.fresh()
    groups = _readers(subject, assembly)
    rows = {row.site: row for row in assembly.report.rows}
    strays = []
    for sites in groups:
        inside = [rows[site].fqn for site in sites if rows[site].planned("fprop") == "fp8"]
        outside = [rows[site] for site in sites if rows[site].planned("fprop") != "fp8"]
        strays += [f"{row.fqn} (not {inside[0]})" for row in outside if inside and row.rule.endswith(": *")]
    return Outcome(
        passed=not strays,
        first=f"{len(rows)} linears",
        second=f"{len(strays)} fell to the catch-all rule beside readers of the same input in FP8",
        detail=", ".join(strays[:2]),
        meaning="a pattern that misses layers it was meant for (an unescaped dot, a prefix). `fp8train explain`.",
    )


def _readers(subject: Subject, assembly: Assembly) -> list[list[int]]:
    """Sites of the linears that read one and the same tensor."""
    groups: dict[int, list[int]] = {}
    alive = []

    def note(linear: Float8Linear, args: tuple) -> None:
        alive.append(args[0])  # or its id would be given to another tensor
        groups.setdefault(id(args[0]), []).append(linear.site)

    hooks = [linear.register_forward_pre_hook(note) for linear in converted_linears(assembly.model)]
    _loss(subject, assembly)
    for hook in hooks:
        hook.remove()
    return list(groups.values())
