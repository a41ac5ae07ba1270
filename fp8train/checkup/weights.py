"""Check of the weight codes: made from the master by the definition, and made anew whenever the master changes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fp8train.checkup.outcome import Outcome
from fp8train.checkup.subject import Subject
from fp8train.nn.linear import Float8Linear
from fp8train.nn.operands import LaterOperand
from fp8train.nn.weights import converted_linears, weights_changed
from fp8train.quant import reference
from fp8train.quant.qtensor import QTensor
from fp8train.trainer.assembly import Assembly

MOST = 12  # linears that are looked at, spread over the model


def weight_codes(subject: Subject) -> Outcome:
    """After a step, a load, an edit in place and an announced edit of .data, codes are those of the weight as it is."""
    assembly = subject.fresh()
    linears = [linear for linear in converted_linears(assembly.model) if linear.precision.any_fp8]
    linears = [linears[i * len(linears) // min(MOST, len(linears))] for i in range(min(MOST, len(linears)))]
    right, total, where = 0, 0, ""
    for occasion, change in _changes(subject, assembly, linears).items():
        change()
        for linear in linears:
            same = codes_are_defined(linear)
            right, total = right + same, total + 1
            where = where if same else where or f"after {occasion}"
    return Outcome(
        passed=right == total,
        first=f"{total} weights after step, load, edit, announced edit",
        second=f"{right} with the codes of the definition",
        detail=f"first that differ: {where}" if where else "",
        meaning="codes that a step, a load or an edit does not refresh, scales of the transposed copy that are not "
        "transposed, or scales that are rounded down.",
    )


def _changes(subject: Subject, assembly: Assembly, linears: list[Float8Linear]) -> dict[str, Callable[[], object]]:
    """What changes weights, by its name; each changes all of them enough to move codes."""
    model = assembly.model
    optimizer = subject.optimizer(assembly)

    def edit() -> None:
        with torch.no_grad():
            for linear in linears:
                linear.weight.mul_(1.7)
            for linear in linears:
                linear(torch.zeros(1, linear.in_features, device=subject.device))

    def announced() -> None:
        for linear in linears:
            linear.weight.data.mul_(0.6)
        weights_changed(model)

    def load() -> None:
        model.load_state_dict({name: value * 1.3 for name, value in model.state_dict().items()})

    return {
        "conversion": lambda: None,
        "a step": lambda: subject.train(assembly, optimizer, 0),
        "a load": load,
        "an edit in place": edit,
        "an announced edit": announced,
    }


def codes_are_defined(linear: Float8Linear) -> bool:
    """Whether both weight operands equal the definition's, bit for bit."""
    precision, weight = linear.precision, linear.prepared_weight()
    w, wt = linear.provider.operands(linear)
    wt = wt.now() if isinstance(wt, LaterOperand) else wt
    for operand, spec, transpose in ((w, precision.fprop.right, False), (wt, precision.dgrad.right, True)):
        if spec is None:
            expected = (weight.T if transpose else weight).to(precision.high)
            if not torch.equal(operand.data, expected):
                return False
            continue
        want = reference.quantize(weight, spec, transpose=transpose)
        assert operand.scale_inv is not None
        if not QTensor(operand.data, operand.scale_inv, spec).same_bits(want):
            return False
    return True
