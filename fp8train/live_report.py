"""The report of a converted model as it is: of a copy, or of one that was unpickled, whose linears count anew."""

from __future__ import annotations

from torch import nn

from fp8train.conversion_report import ConversionReport, ConversionRow
from fp8train.nn.linear import Float8Linear
from fp8train.unreached import unreached

_UNKNOWN = "not known"  # a linear knows its precision, and not which rule gave it


def report_of(model: nn.Module) -> ConversionReport:
    """Rows, table and coverage of a converted model, from its linears.

    Args:
        model: converted; linears that are of other classes are not in the rows.

    Returns:
        ConversionReport: without recipe and rules, which a model does not keep.

    Raises:
        ValueError: the model has no Float8Linear.
    """
    linears: dict[int, Float8Linear] = {}
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Float8Linear):
            linears[id(module)] = module
            paths.setdefault(id(module), []).append(path)
    if not linears:
        raise ValueError(
            f"report_of: {type(model).__name__} has no Float8Linear; needs one or more. Call convert_model first."
        )
    rows = [
        ConversionRow(
            fqn=paths[key][0], shape=(linear.out_features, linear.in_features), has_bias=linear.bias is not None,
            numbers=linear.precision, backend=linear.backend_name, rule=_UNKNOWN, reason="as the linear is",
            site=linear.site, copies=linear.provider.copies, other_names=tuple(paths[key][1:]),
        )
        for key, linear in linears.items()
    ]  # fmt: skip
    return ConversionReport(
        recipe=_UNKNOWN, recipe_hash="", backend=rows[0].backend, backend_reason="as the linears are",
        rows=tuple(rows), others=tuple(unreached(model)),
    )  # fmt: skip
