"""What a kernel is compared with before its first use: right ones pass, each planted fault is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.backends.admission import Admission  # noqa: E402
from fp8train.backends.admission_checks import (  # noqa: E402
    HEADS,
    QUANTISERS,
    ROTATIONS,
    STANDBY,
    STREAM,
    SUMS,
    asked_of,
    check,
    check_norm_gradients,
    check_rotation,
    check_sums,
)
from fp8train.backends.code_checks import MATRICES, PLAIN, check_codes, variant_in_form  # noqa: E402
from fp8train.backends.kernel_codes import kernel  # noqa: E402
from fp8train.backends.product_checks import check_crowd, check_product, entry_for  # noqa: E402
from fp8train.backends.selection import get_backend  # noqa: E402
from fp8train.backends.triton import TritonBackend  # noqa: E402
from fp8train.convert import convert_model  # noqa: E402
from fp8train.quant.formats import LinearPrecision, QuantSpec  # noqa: E402
from fp8train.recipe import available_recipes, load_recipe  # noqa: E402
from tests.hardware import devices  # noqa: E402
from tests.kernels.products import DEVICE  # noqa: E402
from tests.nn.precisions import tiny_model  # noqa: E402
from tests.recipe_documents import FP8, REST, document  # noqa: E402

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_a_product_that_is_wrong_in_one_form_is_refused(
    dtype: torch.dtype, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = kernel("gemm").gemm

    def launched(*operands: Tensor, out: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        y = launch(*operands, out=out, bias=bias, **options)
        return y.mul_(1.01) if y.dtype is dtype and (bias is not None) == with_bias else y

    monkeypatch.setattr(kernel("gemm"), "gemm", launched)
    assert "calc_diff" in str(check_product("gemm", "tma_128x128_s4", CPU, SMALL[1:]))


@operations
def test_an_entry_that_loads_by_pointers_is_checked_on_unaligned_rows_too(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp8train.backends.product_checks.SHAPES", ((1, 128, 128),))
    monkeypatch.setattr("fp8train.backends.product_checks.check_crowd", lambda *arguments, **more: None)
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


OTHER_FORMS = (
    ("quantize", "rows e5m2 1x128 pow2"), ("quantize", "dual e5m2 1x128 fp32, e5m2 1x128 pow2"),
    ("quantize", "dual_plain e4m3 1x128 pow2, e4m3 1x128 fp32"), ("quantize_weight", "one_read e5m2 128x128 pow2"),
    ("rmsnorm_quantize", "fp32 e5m2 1x128 pow2, None"), ("swiglu_quantize", "bf16 e4m3 1x128 fp32, e4m3 1x128 pow2"),
    ("swiglu_backward_quantize", "bf16 e4m3 1x128 pow2, None, None"),
    ("swiglu_backward_quantize", "bf16_plain e4m3 1x128 pow2, e4m3 1x128 pow2, None"),
    ("swiglu_backward_quantize", "fp32 e5m2 1x128 pow2, None, e4m3 1x128 fp32"),
)  # fmt: skip


@pytest.mark.parametrize(("operation", "variant"), (*QUANTISERS, *STANDBY, *OTHER_FORMS), ids=lambda text: text)
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


@pytest.mark.parametrize("operation", ["rmsnorm_quantize", "swiglu_quantize", "swiglu_backward_quantize"])
def test_a_wrong_byte_of_one_form_is_refused_in_that_form(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row copy made alone: usual of what a forward pass reads, not of gradients."""
    run = getattr(kernel(operation), operation)

    def spoil(*args: Any, **more: Any) -> Any:
        made = run(*args, **more)
        if not more["columns"]:
            copies = made[1] if operation == "swiglu_backward_quantize" else made
            copies[0].view(torch.uint8)[5, 7] += 1
        return made

    monkeypatch.setattr(kernel(operation), operation, spoil)
    alone = POW2, *[None] * (1 + operation.endswith("backward_quantize"))
    in_form = variant_in_form(operation, "bf16", alone)
    assert (in_form == "bf16") == (operation != "swiglu_backward_quantize")
    assert "its row copy" in str(check_codes(operation, in_form, CPU, ((128, 256),)))
    if in_form != "bf16":
        assert check_codes(operation, "bf16", CPU, ((128, 256),)) is None


POW2 = QuantSpec.parse("e4m3 1x128 pow2")


@operations
def test_other_formats_of_an_entrys_operands_are_checked_as_such(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, entry = QuantSpec.parse("e5m2 1x128"), "pointer_64x64_s3"
    assert entry_for(entry, POW2, POW2) == entry
    entry = entry_for(entry, wide, POW2)
    module, wrong = kernel(operation), torch.float8_e5m2
    launch = getattr(module, operation)

    def launched(a: Tensor, b: Tensor, *scales: Tensor, **options: Any) -> Tensor:
        y = launch(a, b, *scales, **options)
        return y.mul_(1.001) if a.dtype is wrong and b.dtype is torch.float8_e4m3fn else y

    monkeypatch.setattr("fp8train.backends.product_checks.SHAPES", ((1, 128, 128),))
    monkeypatch.setattr("fp8train.backends.product_checks.CROWD", (140, 132, 272))
    assert check(operation, entry, CPU) is None
    monkeypatch.setattr(module, operation, launched)
    assert "calc_diff" in str(check(operation, entry, CPU))
    assert check(operation, "pointer_64x64_s3", CPU) is None


def blockwise(recipe: str) -> bool:
    lefts = [precision.fprop.left for precision in load_recipe(recipe).precisions.values()]
    return any(left is not None and left.block == POW2.block for left in lefts)


ALL_E5M2 = {name: {key: text.replace("e4m3", "e5m2") for key, text in gemm.items()} for name, gemm in FP8.items()}
MIXED = {**FP8, "wgrad": {"dy": "e5m2 1x128", "x": "e4m3 1x128 fp32"}}
LAYERS = {"match": "*layers.*", "use": "fp8"}
OTHER_RECIPES = {
    name: document(LAYERS, REST) | {"precisions": {"fp8": precision}}
    for name, precision in {"e5m2": ALL_E5M2, "mixed": MIXED}.items()
}
OTHER_RECIPES["scheduled"] = document(LAYERS, REST, schedule=[{"at": 0.5, "use": "later"}])
OTHER_RECIPES["scheduled"]["precisions"] = {"fp8": FP8, "later": ALL_E5M2}
RECIPES = {**{name: name for name in available_recipes() if blockwise(name)}, **OTHER_RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_what_the_recipes_ask_for_is_checked_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step in training and one in evaluation: no form is asked for that would be checked by itself, and later."""
    recipe, asked, expected = RECIPES[name], set[tuple[str, str]](), list[LinearPrecision]()
    monkeypatch.setattr(Admission, "expect", lambda self, precisions: expected.extend(precisions))
    monkeypatch.setattr(Admission, "admits", lambda self, *kernel: asked.add(kernel[:2]))  # refused: torch computes
    monkeypatch.setattr(TritonBackend, "unavailable", lambda self, device_type: None)
    for kept in ("_served", "_entries"):
        monkeypatch.setattr(get_backend("triton"), kept, {})
    model = tiny_model().to(DEVICE)
    for layer in model.layers:  # as in the models for GPUs
        layer.self_attn.dtype = torch.bfloat16
    convert_model(model, recipe, backend="triton")
    tokens = torch.arange(16, device=DEVICE).view(2, 8)
    model(tokens, targets=tokens).backward()
    with torch.no_grad():
        model(tokens)
    gemms = [(operation, entry) for operation in ("gemm", "gemm_wgrad") for entry in kernel(operation).PLAIN]
    usual = {*QUANTISERS, *STREAM, *ROTATIONS, *gemms}
    forms = {(op, form) for op, variant in usual for each in expected for form in asked_of(op, variant, each)}
    assert (forms <= usual) == (name not in OTHER_RECIPES)
    assert {(operation, variant.replace(PLAIN, "")) for operation, variant in asked} <= usual | forms
    assert "swiglu_backward_quantize" in dict(asked) or name in ("wgrad_bf16", "mixed")


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
