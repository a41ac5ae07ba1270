"""What a kernel is compared with before its first use: right ones pass, each planted fault is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.backends.admission_checks import (  # noqa: E402
    HEADS,
    MATRICES,
    QUANTISERS,
    STANDBY,
    SUMS,
    check,
    check_codes,
    check_crowd,
    check_norm_gradients,
    check_product,
    check_rotation,
    check_sums,
)
from fp8train.backends.kernel_codes import kernel  # noqa: E402
from tests.hardware import devices  # noqa: E402

CPU = torch.device("cpu")
SMALL = ((1, 128, 128), (130, 140, 272))
operations = pytest.mark.parametrize("operation", ["gemm", "gemm_wgrad"])


@operations
@pytest.mark.parametrize("device", devices())
def test_the_kernels_pass_their_own_check(operation: str, device: str) -> None:
    assert check_product(operation, "ws_128x128_s4", torch.device(device), SMALL) is None


def wrong_scale(y: Tensor) -> Tensor:
    return y.mul_(1.001)


def one_bad_row(y: Tensor) -> Tensor:
    y[-1, -1] += 2 * y[-1].abs().max()
    return y


def unwritten(y: Tensor) -> Tensor:
    y[0, 0] = float("nan")
    return y


@operations
@pytest.mark.parametrize("spoil", [wrong_scale, one_bad_row, unwritten])
def test_a_wrong_product_is_refused(
    operation: str, spoil: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = kernel(operation)
    launch = getattr(module, operation)
    monkeypatch.setattr(module, operation, lambda *args, **kwargs: spoil(launch(*args, **kwargs)))
    assert "calc_diff" in str(check_product(operation, "tma_128x128_s4", CPU, SMALL[1:]))


@operations
def test_an_entry_that_loads_by_pointers_is_checked_on_unaligned_rows_too(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp8train.backends.admission_checks.SHAPES", ((1, 128, 128),))
    monkeypatch.setattr("fp8train.backends.admission_checks.check_crowd", lambda *arguments: None)
    module = kernel(operation)
    launch = getattr(module, operation)

    def launched(a: Tensor, b: Tensor, *scales: Tensor, **options: Any) -> Tensor:
        y = launch(a, b, *scales, **options)
        return y.mul_(1.001) if a.shape[1] % 16 else y

    assert check(operation, "pointer_64x64_s3", CPU) is None
    monkeypatch.setattr(module, operation, launched)
    assert "for M, N, K = 77, 131, 303" in str(check(operation, "pointer_64x64_s3", CPU))
    assert check(operation, "tma_128x128_s4", CPU) is None


def one_bad_column(y: Tensor) -> Tensor:
    y[16:32, 6] *= 0.5
    return y


@operations
@pytest.mark.parametrize("spoil", [None, one_bad_column, unwritten])
@pytest.mark.parametrize("entry", ["ws_128x128_s4", "pointer_64x64_s3"])
def test_sums_that_differ_from_torchs_are_refused(
    operation: str, entry: str, spoil: Callable[[Tensor], Tensor] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = kernel(operation)
    launch = getattr(module, operation)

    def launched(*arguments: Any, **options: Any) -> Tensor:
        y = launch(*arguments, **options)
        return y if spoil is None else spoil(y)

    monkeypatch.setattr(module, operation, launched)
    reason = check_crowd(operation, entry, CPU, (140, 132, 272), tries=1)
    assert reason is None if spoil is None else reason and "of its sums differ from torch's" in reason


def test_an_entry_that_cannot_read_its_operands_is_refused() -> None:
    assert "reads by TMA" in str(check_product("gemm", "ws_128x128_s4", CPU, ((5, 5, 33),)))


@pytest.mark.parametrize(("operation", "variant"), (*QUANTISERS, *STANDBY), ids=lambda text: text)
@pytest.mark.parametrize("device", devices())
def test_the_quantisers_pass_their_own_check(operation: str, variant: str, device: str) -> None:
    assert check_codes(operation, variant, torch.device(device), ((128, 256), (77, 131))) is None


@pytest.mark.parametrize(("operation", "variant"), (*QUANTISERS, *STANDBY), ids=lambda text: text)
def test_a_wrong_byte_in_any_copy_is_refused(operation: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an assembler made them: one byte in four of a copy is lost."""
    module = kernel(operation)
    name = f"quantize_{variant.removesuffix('_plain')}" if operation == "quantize" else operation
    dtype, run = "float32" if variant.startswith("fp32") else "bfloat16", getattr(module, name)
    copies = {"rows": 1, "columns": 1}.get(variant, 5 if operation == "swiglu_backward_quantize" else 2)
    for spoilt in range(copies):

        def spoil(*args: Any, spoilt: int = spoilt, **kwargs: Any) -> Any:
            made = run(*args, **kwargs)
            halves = made if operation == "swiglu_backward_quantize" else [made]
            flat = [tensor for half in halves for tensor in half if tensor is not None and tensor.element_size() == 1]
            for tensor in flat[spoilt : spoilt + 1]:
                tensor.view(torch.uint8)[1::4] = 0
            return made

        monkeypatch.setattr(module, name, spoil)
        assert f"differs from the definition for [128, 128] {dtype}" in str(
            check_codes(operation, variant, CPU, ((128, 128),))
        )


def test_a_wrong_byte_in_a_row_copy_made_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = kernel("swiglu_quantize").swiglu_quantize

    def spoil(*args: Any, **more: Any) -> Any:
        made = run(*args, **more)
        if not more.get("columns", True):
            made[0].view(torch.uint8)[5, 7] += 1
        return made

    monkeypatch.setattr(kernel("swiglu_quantize"), "swiglu_quantize", spoil)
    assert "its row copy alone differs" in str(check_codes("swiglu_quantize", "bf16", CPU, ((128, 256),)))


@pytest.mark.parametrize("variant", ["bf16", "fp32"])
@pytest.mark.parametrize("device", devices())
def test_gradients_of_the_norm_pass_their_own_check(variant: str, device: str) -> None:
    sizes = MATRICES if device == "cuda" else ((77, 131),)
    assert check_norm_gradients(variant, torch.device(device), sizes) is None


@pytest.mark.parametrize("summed", [False, True], ids=["alone", "summed"])
@pytest.mark.parametrize("spoilt", [0, 1], ids=["dx", "dweight"])
def test_a_wrong_gradient_of_the_norm_is_refused(spoilt: int, summed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = kernel("rmsnorm_backward")
    run = module.rmsnorm_backward

    def spoil(*args: Any, **more: Any) -> Any:
        made = run(*args, **more)
        if bool(more) is summed:
            made[spoilt].view(-1)[70] *= 1.01
        return made

    monkeypatch.setattr(module, "rmsnorm_backward", spoil)
    name = "dweight" if spoilt else "sum with dtotal" if summed else "dx"
    reason = str(check_norm_gradients("fp32", CPU, ((77, 131),)))
    assert f"its {name} differs from the formula for [77, 131], dy" in reason


def test_a_wrong_gradient_of_the_branch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = kernel("rmsnorm_backward")
    run = module.rmsnorm_backward

    def spoil(*args: Any, **more: Any) -> Any:
        dx, dweight, dbranch = run(*args, **more)
        return dx, dweight, None if dbranch is None else dbranch.roll(1)

    monkeypatch.setattr(module, "rmsnorm_backward", spoil)
    assert "rounded to the branch's dtype is another" in str(check_norm_gradients("fp32", CPU, ((77, 131),)))


@pytest.mark.parametrize("variant", ["bf16", "fp32"])
@pytest.mark.parametrize("device", devices())
def test_sums_of_the_stream_pass_their_own_check(variant: str, device: str) -> None:
    sizes = SUMS if device == "cuda" else ((77, 131),)
    assert check_sums(variant, torch.device(device), sizes) is None


@pytest.mark.parametrize(
    ("function", "spoilt", "says"),
    [("add_rstd", 0, "its sum differs"), ("add_rstd", 1, "its rstd differs"), ("rstd", None, "its rstd differs")],
    ids=["sum", "rstd of the sum", "rstd"],
)
def test_a_wrong_sum_of_the_stream_is_refused(
    function: str, spoilt: int | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = kernel("rmsnorm_rstd")
    run = getattr(module, function)

    def spoil(*args: Any, **more: Any) -> Any:
        made = run(*args, **more)
        x = made if spoilt is None else made[spoilt]
        x.view(-1)[70] *= 1 + 2.0**-8
        return made

    monkeypatch.setattr(module, function, spoil)
    assert f"{says} from" in str(check_sums("fp32", CPU, ((77, 131),)))


@pytest.mark.parametrize("variant", ["bf16", "fp32"])
@pytest.mark.parametrize("device", devices())
def test_rotations_pass_their_own_check(variant: str, device: str) -> None:
    assert check_rotation(variant, torch.device(device), HEADS if device == "cuda" else FEW_HEADS) is None


FEW_HEADS = ((2, 3, 20, 16), (1, 2, 7, 6))


def one_rounding_off(y: Tensor) -> None:
    """As an FMA makes it: one number, of a rotation back, moves by its last place."""
    y[-1, -1, -1, -1] = torch.nextafter(y[-1, -1, -1, -1], y.new_tensor(torch.inf))


def another_zero(y: Tensor) -> None:
    y[y == 0] = -y[y == 0]


def one_head_unwritten(y: Tensor) -> None:
    y[0, 0] = float("nan")


@pytest.mark.parametrize("spoil", [one_rounding_off, another_zero, one_head_unwritten])
def test_a_wrong_rotation_is_refused(spoil: Callable[[Tensor], None], monkeypatch: pytest.MonkeyPatch) -> None:
    module = kernel("rope")
    run = module.rope

    def spoilt(*args: Any, inverse: bool, **options: Any) -> Tensor:
        made = run(*args, inverse=inverse, **options)
        if inverse:
            spoil(made)
        return made

    monkeypatch.setattr(module, "rope", spoilt)
    reason = str(check_rotation("bf16", CPU, FEW_HEADS))
    assert "its result differs from the definition for [2, 3, 20, 16], strides" in reason and "inverse=True" in reason
