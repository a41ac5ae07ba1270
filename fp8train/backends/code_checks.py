"""What a quantiser must get right on a GPU before it may be used there: the definition's codes and scales, bit for bit.

A compiler makes other code for other formats and scales, and where a copy is not wanted. Those of USUAL are checked
together, as a variant of a kernel; any other form has its specifications behind the variant's name, and a verdict of
its own. Those that a recipe will ask for (`forms_of`) are checked beside the usual ones, others when they are wanted.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fp8train.backends.kernel_codes import DTYPES, ROW, SQUARE, as_copies, both_formats, format_of
from fp8train.backends.producer_checks import EPS, PRODUCERS, check_producer
from fp8train.backends.producers import row_rstd
from fp8train.quant.formats import LinearPrecision, QuantSpec
from fp8train.quant.qtensor import QTensor
from fp8train.quant.reference import quantize

Form = tuple[QuantSpec | None, ...]  # of a row copy; of a column copy; of the column copy of h
PLAIN = "_plain"
MATRICES = ((256, 384), (300, 200))  # whole blocks in rows that start at 16 bytes; neither
_KINDS = tuple(QuantSpec.parse("e4m3 1x128", scale) for scale in ("pow2", "fp32"))
_SQUARES = tuple(QuantSpec.parse("e4m3 128x128", scale) for scale in ("pow2", "fp32"))
_ALONE: tuple[Form, ...] = tuple((kind, None) for kind in _KINDS)
_BOTH: tuple[Form, ...] = tuple((kind, kind) for kind in _KINDS)
# What the recipes of this package ask for, by operation and, where it has several launchers, variant.
USUAL: dict[str, tuple[Form, ...]] = {
    "quantize rows": tuple((kind,) for kind in _KINDS),
    "quantize columns": tuple((kind,) for kind in _KINDS),
    "quantize dual": _BOTH,
    "quantize_weight": tuple((kind,) for kind in _SQUARES),
    "rmsnorm_quantize": _BOTH + _ALONE,
    "swiglu_quantize": _BOTH + _ALONE,
    "swiglu_backward_quantize": (*((kind, kind, kind) for kind in _KINDS), (_KINDS[1], _KINDS[1], None)),
}


def variant_in_form(operation: str, variant: str, form: Form) -> str:
    """What the verdict on a variant's form is kept under: the variant alone where the form is a usual one, or none."""
    return variant if not form or form in _usual(operation, variant) else f"{variant} {', '.join(map(str, form))}"


def _usual(operation: str, variant: str) -> tuple[Form, ...]:
    return USUAL[f"{operation} {variant.removesuffix(PLAIN)}" if operation == "quantize" else operation]


def forms_of(operation: str, variant: str, precision: LinearPrecision) -> list[Form]:
    """Forms that training and evaluating linears of a precision ask a quantiser for, where nothing is frozen."""
    x, x_t, dy, dy_t = precision.fprop.left, precision.wgrad.right, precision.dgrad.left, precision.wgrad.left
    kept = x_t if precision.wgrad_source == "dual" else None
    forms: dict[str, list[Form]] = {
        "rows": [(x,), (dy,)],
        "columns": [(x_t,), (dy_t,)],
        "dual": [pair for pair in ((x, kept), (dy, dy_t)) if None not in pair],
        "quantize_weight": [(precision.fprop.right,), (precision.dgrad.right,)],
        "rmsnorm_quantize": [] if x_t is None else [(x, kept), (x, None)],
        "swiglu_quantize": [] if x_t is None else [(x, kept), (x, None)],
        "swiglu_backward_quantize": [] if dy_t is None else [(dy, dy_t, kept)],
    }
    block = SQUARE if operation == "quantize_weight" else ROW
    return [form for form in forms[variant if operation == "quantize" else operation] if _served(form, block)]


def _served(form: Form, block: tuple[int, int]) -> bool:
    """Whether a kernel for such blocks makes these copies: two of one matrix are of one format."""
    first, *second = [None if spec is None else spec.format for spec in form[:2]]
    return (
        first is not None and {*second} <= {first, None} and all(spec is None or spec.block == block for spec in form)
    )


def check_codes(
    operation: str, variant: str, device: torch.device, matrices: Sequence[tuple[int, int]] = MATRICES
) -> str | None:
    """Quantise matrices with a kernel; which copy of which, or what it is of, differs from the definition, or None.

    Args:
        operation, variant: as in QUANTISERS and STANDBY, or as `variant_in_form` says it.
        device: where to quantise.
        matrices: their rows and columns.
    """
    variant, _, said = variant.partition(" ")
    name, forms = variant.removesuffix(PLAIN), _usual(operation, variant)
    if said:
        forms = (tuple(None if spec == "None" else QuantSpec.parse(spec) for spec in said.split(", ")),)
    for number, (rows, cols) in enumerate(matrices):
        for dtype in [DTYPES[name]] if name in DTYPES else DTYPES.values():
            what = f"{[rows, cols]} {dtype_text(dtype)}"
            if operation in PRODUCERS and (part := check_producer(operation, (rows, cols), dtype, device)):
                return f"its {part} differs from the definition for {what}"
            inputs = [uneven_matrix(rows, cols, 3 * number + part, dtype, device) for part in range(3)]
            for form in forms:
                for copy, q, x, transposed in _copies(operation, variant, inputs, form):
                    if not q.same_bits(quantize(x.cpu(), q.spec, transpose=transposed)):
                        return f"its {copy} differs from the definition for {what} as {', '.join(map(str, form))}"
    return None


def uneven_matrix(rows: int, cols: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Each row of its own magnitude; a block of zeros, a NaN and an Inf, which strike their blocks only."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator)
    x *= torch.exp2(torch.randint(-20, 3, (rows, 1), generator=generator).float())
    x[:, 3:5] = 0.0
    x[rows // 2, cols // 2], x[rows - 1, 0] = float("nan"), float("inf")
    return x.to(dtype).to(device)


Copy = tuple[str, QTensor, Tensor, bool]  # its name, its codes, the matrix that they are of, whether transposed


def _copies(operation: str, variant: str, inputs: Sequence[Tensor], form: Form) -> list[Copy]:
    """What a kernel makes in a form."""
    words, variant = not variant.endswith(PLAIN), variant.removesuffix(PLAIN)
    module = importlib.import_module(f"fp8train.kernels.{operation}")
    (x, gate, up), (row, *others) = inputs, form
    assert row is not None
    if operation == "quantize" and variant != "dual":
        run: Callable[..., tuple[Tensor, Tensor]] = getattr(module, f"quantize_{variant}")
        return [(f"copy by {variant}", QTensor(*run(x, **format_of(row)), row), x, variant == "columns")]
    if operation == "quantize_weight":
        made = module.quantize_weight(x, two_launches=variant == "two_launches", **format_of(row))
        return _both(made, row, row, x)
    col, more = others[0], both_formats(row, others[0]) | {"words": words}
    if operation == "quantize":
        made = module.quantize_dual(x, words=words, **format_of(row), col_pow2=more["col_pow2"])
        return _both(made, row, col, x)
    if operation == "rmsnorm_quantize":
        found, weight = list[Copy](), torch.linspace(0.5, 1.5, x.shape[1], device=x.device)
        for out_dtype in dict.fromkeys((x.dtype, torch.bfloat16)):
            factors = x, weight, row_rstd(x, EPS)
            y = module.rmsnorm(*factors, out_dtype=out_dtype)
            made = module.rmsnorm_quantize(*factors, out_dtype=out_dtype, **more)
            found += _both(made, row, col, y, f" of y in {dtype_text(out_dtype)}")
        return found
    swiglu = importlib.import_module("fp8train.kernels.swiglu_quantize").swiglu
    if operation == "swiglu_quantize":
        return _both(module.swiglu_quantize(gate, up, **more), row, col, swiglu(gate, up))
    h = others[1]
    h_format = None if h is None else tuple(format_of(h).values())
    dgate, dup, h_t = module.swiglu_backward_quantize(x, gate, up, h=h_format, **more)
    sources = module.swiglu_backward(x, gate, up)
    found = _both(dgate, row, col, sources[0], " of dgate") + _both(dup, row, col, sources[1], " of dup")
    return found if h is None else [*found, ("column copy of h", QTensor(h_t[0], h_t[1], h), swiglu(gate, up), True)]


def _both(made: Sequence[Tensor], row: QuantSpec, col: QuantSpec | None, x: Tensor, of: str = "") -> list[Copy]:
    copies = zip(("row", "column"), as_copies(made, row, col), (False, True), strict=True)
    return [(f"{name} copy{of}", q, x, transposed) for name, q, transposed in copies if q is not None]


def dtype_text(dtype: torch.dtype) -> str:
    """Its name, without "torch."."""
    return str(dtype).removeprefix("torch.")
