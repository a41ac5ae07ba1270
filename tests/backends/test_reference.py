"""Backend `reference`: the definition, behind the interface of a backend."""

from __future__ import annotations

import torch

from fp8train.backends.reference import ReferenceBackend
from fp8train.quant import reference
from fp8train.quant.formats import BLOCKWISE, QuantSpec
from tests.quant.specs import arrangements, every_bf16, same_codes
from tests.shapes import matrix

BACKEND = ReferenceBackend()
SPEC, SQUARE = QuantSpec.parse("e4m3 1x128"), QuantSpec.parse("e4m3 128x128")


@arrangements
def test_every_bf16_number_has_the_codes_of_the_definition(arrangement: str) -> None:
    x = every_bf16(arrangement)
    assert same_codes(BACKEND.quantize(x, SPEC, False), reference.quantize(x, SPEC))


def test_dual_and_square_copies_are_separate_quantisations() -> None:
    x = matrix(130, 300)
    row, col = BACKEND.quantize_dual(x, SPEC, SPEC)
    assert same_codes(row, reference.quantize(x, SPEC))
    assert same_codes(col, reference.quantize(x, SPEC, transpose=True))
    q, qt = BACKEND.quantize_square(x, SQUARE)
    assert same_codes(qt, reference.quantize(x.T.contiguous(), SQUARE)) and same_codes(q.transpose(), qt)


def test_high_precision_product_is_rounded_once() -> None:
    a, b = matrix(20, 300, seed=1), matrix(30, 300, seed=2)
    assert torch.equal(
        BACKEND.mm(a, b, None, None, False, torch.float32), (a.double() @ b.double().T).to(torch.float32)
    )
    out = torch.ones(20, 30)
    BACKEND.mm(a, b, None, out, True, torch.float32)
    assert torch.equal(out, 1 + BACKEND.mm(a, b, None, None, False, torch.float32))


def test_it_runs_everywhere_and_serves_everything() -> None:
    assert BACKEND.unavailable("cuda") is None and BACKEND.unsupported(BLOCKWISE) is None
