"""Failures of FP8 training systems, documented or of a documented class, each as a mutation, and what catches it.

`python -m tests.mutations.catalogue` writes the table of README.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8train.backends.cpu import CpuBackend
from tests.mutations import faults, quantisers

README = Path(__file__).with_name("README.md")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutation:
    """A failure and its catcher.

    name: what goes wrong
    seen_in: where it was documented
    inject: puts it into our code
    catcher: "doctor CHECK", "strict coverage" (a training run ends after its first step), or "MODULE::TEST"
    arguments: of the test, where it takes any
    """

    name: str
    seen_in: str
    inject: faults.Inject
    catcher: str
    arguments: tuple[Any, ...] = ()


CPU = CpuBackend()
MUTATIONS = (
    Mutation(
        name="weight codes are not made anew after a step of a fused optimizer",
        seen_in="Automodel#3606, Primus#983, Model-Optimizer#2443",
        inject=faults.stale_after_step,
        catcher="doctor cached",
    ),
    Mutation(
        name="weight codes are not made anew after loading",
        seen_in="stale caches: TE#1047, TE#1972",
        inject=faults.stale_after_load,
        catcher="doctor weights",
    ),
    Mutation(
        name="weight codes do not see an edit in place",
        seen_in="Model-Optimizer#2443",
        inject=faults.stale_after_edit,
        catcher="doctor weights",
    ),
    Mutation(
        name="quantised input is found again by its address",
        seen_in="flashinfer#4069",
        inject=faults.input_by_address,
        catcher="tests.nn.test_inputs::test_in_place_edit_between_two_readers_is_seen",
    ),
    Mutation(
        name="bias is dropped",
        seen_in="prime-rl Float8BlockwiseLinear, vllm#39663",
        inject=faults.gemm_without_bias,
        catcher="doctor definition",
    ),
    Mutation(
        name="bias is added in evaluation only",
        seen_in="COAT replacer.py",
        inject=faults.bias_in_eval_only,
        catcher="doctor evaluation",
    ),
    Mutation(
        name="weight gradient is rounded to BF16",
        seen_in="torchao blockwise prototype",
        inject=faults.bf16_weight_gradient,
        catcher="doctor definition",
    ),
    Mutation(
        name="gradients of micro-batches are accumulated in BF16",
        seen_in="ISEEKYAN Megatron#146",
        inject=faults.bf16_accumulation,
        catcher="doctor accumulation",
    ),
    Mutation(
        name="dy has blocks of 128x128",
        seen_in="DeepSeek-V3 B.2 (diverged at 300B tokens)",
        inject=faults.square_blocks_on_dy,
        catcher="doctor definition",
    ),
    Mutation(
        name="wgrad reads an input that was rounded before",
        seen_in="double quantisation; DeepSeek-V3 3.3",
        inject=faults.wgrad_of_rounded_input,
        catcher="doctor definition",
    ),
    Mutation(
        name="power-of-two scales are rounded down",
        seen_in="MXFP8 recipes (arXiv:2506.08027)",
        inject=faults.scales(quantisers.floor_rounded),
        catcher="doctor codes",
    ),
    Mutation(
        name="amax has a floor of 1e-4",
        seen_in="DeepSeek inference kernels, reused in training",
        inject=faults.scales(quantisers.floored_amax),
        catcher="doctor equivariance",
    ),
    Mutation(
        name="amax has a floor of 1e-4, seen from the loss",
        seen_in="as above; mean loss over 4M tokens",
        inject=faults.scales(quantisers.floored_amax),
        catcher="doctor loss_scale",
    ),
    Mutation(
        name="E4M3 is taken to end at 240",
        seen_in="unit-scaling",
        inject=faults.scales(quantisers.maximum_of_240),
        catcher="doctor codes",
    ),
    Mutation(
        name="scales are stored in FP16",
        seen_in="InfiR2 bf16_cast_fp8.py",
        inject=faults.scales(quantisers.fp16_scale),
        catcher="doctor codes",
    ),
    Mutation(
        name="scales are laid out transposed",
        seen_in="triton#11111 (transposed store miscompiled)",
        inject=faults.faulty(quantisers.transposed_scales),
        catcher="doctor codes",
    ),
    Mutation(
        name="padding enters amax",
        seen_in="TE#2892, TE#2911 (gradients off by 40 to 500 times)",
        inject=faults.faulty(quantisers.padded_with_garbage),
        catcher="doctor ragged",
    ),
    Mutation(
        name="NaN is laundered",
        seen_in="HF transformers' nan_to_num; tl.max drops NaN",
        inject=faults.faulty(quantisers.laundering),
        catcher="doctor nan",
    ),
    Mutation(
        name="partial sums are not promoted to FP32",
        seen_in="DeepSeek-V3 3.3.2, DeepGEMM#37",
        inject=faults.no_promotion,
        catcher="tests.backends.test_cpu::test_sum_of_positive_products_has_no_bias_however_long",
        arguments=(CPU, 4096, "pow2", 16),
    ),
    Mutation(
        name="a pattern misses gate_proj",
        seen_in="prime-rl#2442",
        inject=faults.pattern_with_a_hole,
        catcher="doctor siblings",
    ),
    Mutation(
        name="recomputation doubles the gradient",
        seen_in="Megatron#6660",
        inject=faults.gradient_doubled_by_recompute,
        catcher="doctor checkpointing",
    ),
    Mutation(
        name="recomputation is counted twice",
        seen_in="a known risk of statistics under recomputation",
        inject=faults.recompute_counted_twice,
        catcher="doctor checkpointing",
    ),
    Mutation(
        name="evaluation runs in another precision",
        seen_in="COAT (training and evaluation differ)",
        inject=faults.eval_in_bf16,
        catcher="doctor evaluation",
    ),
    Mutation(
        name="evaluation leaves training in BF16",
        seen_in="TE#1972 (evaluation, then training)",
        inject=faults.eval_leaves_bf16_behind,
        catcher="doctor evaluation",
    ),
    Mutation(
        name="gradients are lost under accumulation",
        seen_in="marin#7659, marin#8360",
        inject=faults.lost_micro_batches,
        catcher="doctor split",
    ),
    Mutation(
        name="every rank reads the data of rank 0",
        seen_in="the class of titan#811, titan#816 (data order)",
        inject=faults.same_data_on_all_ranks,
        catcher="doctor data_order",
    ),
    Mutation(
        name="a resumed run starts with empty moments",
        seen_in="the class of Megatron#1350, titan#291 (resume)",
        inject=faults.moments_not_restored,
        catcher="doctor resume",
    ),
    Mutation(
        name="the emulation drops the recipe",
        seen_in="titan float8.py emulate=True",
        inject=faults.emulation_without_recipe,
        catcher="strict coverage",
    ),
    Mutation(
        name="the emulation drops the recipe, seen by doctor",
        seen_in="nanochat --fp8 without CUDA",
        inject=faults.emulation_without_recipe,
        catcher="doctor recipe",
    ),
    Mutation(
        name="the last, short tile of a product is not written",
        seen_in="Primus-Turbo#397",
        inject=faults.unwritten_output,
        catcher="doctor definition",
    ),
    Mutation(
        name="a converted linear is replaced by a plain one",
        seen_in="titan#3123, Hyperloom#421",
        inject=faults.replaced_after_conversion,
        catcher="strict coverage",
    ),
    Mutation(
        name="later micro-batches run in BF16",
        seen_in="Primus#1046 (1 of 32 micro-batches)",
        inject=faults.first_micro_batch_only,
        catcher="strict coverage",
    ),
)


def table() -> str:
    """The content of README.md."""
    lines = [
        "# Mutations",
        "",
        "Failures of FP8 training systems, documented or of a documented class, each put into this code by",
        "`faults.py` or `quantisers.py`, and what catches it: `catalogue.py`.",
        "`test_mutations.py` proves each row, and that the catcher passes on sound code. Written by",
        "`python -m tests.mutations.catalogue`.",
        "",
        "| failure | documented in | caught by |",
        "| --- | --- | --- |",
        *(f"| {m.name} | {m.seen_in} | `{m.catcher}` |" for m in MUTATIONS),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    README.write_text(table(), encoding="ascii")
