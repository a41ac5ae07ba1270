"""What fused norms and MLPs write and keep for backward."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.products import DEVICE
from tests.nn.precisions import PRECISIONS, normal
from tests.nn.test_fused import INNER, K, Part, inputs
from tests.nn.test_memory import saved_bytes


def test_what_is_quantised_is_never_written() -> None:
    x, _ = inputs()
    fused = Part().fuse()
    handed = fused.norm(x.requires_grad_(), torch.bfloat16)
    assert (handed.shape, handed.dtype, handed.device) == (x.shape, torch.bfloat16, x.device)
    assert handed.x.untyped_storage().nbytes() == 2 and bool(handed.x.isnan().all()) and handed.x.requires_grad


@pytest.mark.parametrize("name", ["blockwise", "requant"])
def test_only_copies_and_what_backward_needs_are_kept(name: str) -> None:
    M = 384
    x = normal(M, K, dtype=torch.float32).to(DEVICE).requires_grad_()
    part = Part(PRECISIONS[name]).fuse()
    norm_weight = part.norm.weight.numel() * 4
    held = saved_bytes(part.linears(), lambda: part(x)) - norm_weight
    codes = {  # of x the column copy [K, M], or with source "requant" row copies [M, K] of x and h; h.T is made later
        "blockwise": M * K + 4 * K * (M // 128),
        "requant": M * (K + INNER) + 4 * M * (-(-K // 128) + -(-INNER // 128)),
    }[name]
    assert held == 4 * M * K + 4 * M + codes + 2 * 2 * M * INNER  # x, rstd, codes, gate and up
    plain = Part(PRECISIONS[name])
    assert held + 2 * M * INNER <= saved_bytes(plain.linears(), lambda: plain(x)) - norm_weight  # silu(gate) at least


def test_linears_keep_half_of_their_inputs_in_bf16() -> None:
    M = 384
    x = normal(M, K, dtype=torch.float32).to(DEVICE).requires_grad_()
    part = Part().fuse()
    of_others = 4 * M * K + 4 * M + 2 * 2 * M * INNER + 4 * K  # x, rstd, gate and up, the norm's weight
    # one byte a number and 4 bytes per 128 of them: 1.03125 / 2 = 0.516
    assert saved_bytes(part.linears(), lambda: part(x)) - of_others <= 0.52 * 2 * M * K  # none of h


def test_where_backward_does_not_come_to_gate_and_up_the_column_copy_of_h_is_kept_in_their_place() -> None:
    M = 384
    part = Part().fuse()
    for parameter in (part.norm.weight, *(linear.weight for linear in part.linears()[:2])):
        parameter.requires_grad_(False)
    x = normal(M, K, dtype=torch.float32).to(DEVICE)
    assert saved_bytes(part.linears(), lambda: part(x)) == M * INNER + 4 * INNER * (M // 128)
    part.mlp.down_proj.weight.requires_grad_(False)
    assert saved_bytes(part.linears(), lambda: part(x)) == 0
    assert saved_bytes(part.linears(), lambda: part.mlp(x.requires_grad_())) == 2 * 4 * M * INNER  # gate and up, as x


def test_weights_are_kept_for_the_gradient_of_the_input_only() -> None:
    part = Part().fuse()
    part.norm.weight.requires_grad_(False)
    saved: list[int] = []
    for needed in (True, False):
        saved.clear()
        x = inputs()[0].requires_grad_(needed)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.data_ptr()), lambda _: None):
            part(x)
        for linear in part.linears()[:2]:
            assert (linear.wt_qdata.data_ptr() in saved) == needed
