"""How much each linear suffers from FP8 on a few windows: what `sensitivity` shows and `search` ranks by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8train.backends.coverage import GEMMS, NOT_COUNTED
from fp8train.data import MASKED_TARGET, Batch
from fp8train.errors import ConfigError
from fp8train.nn.inputs import InputNeeds, quantize_input
from fp8train.nn.linear import Float8Linear
from fp8train.nn.operands import Operand, as_matrix, gemm, quantized, requantized
from fp8train.nn.remedies import channel_scale
from fp8train.nn.weights import evaluation_precision, named_linears
from fp8train.quant.formats import BF16, LinearPrecision
from fp8train.telemetry.statistics import STATS, operand_statistics
from fp8train.trainer.step import inputs

RANGE_BATCHES = 5  # range_parm looks at the first batches only, as the Ascend tool does


@dataclass(kw_only=True, slots=True)
class GemmSensitivity:
    """What happens when one GEMM of one linear is quantised and everything else is in BF16; None: not applicable.

    loss_change: mean loss less that in BF16, in nats; only fprop reaches the loss of its own step
    loss_rms: root mean square over the tokens of the change of a token's loss
    sqnr_db: of the GEMM's output, against the same operands in FP32
    gradient_cosine: between the gradient of all parameters and that in BF16
    """

    loss_change: float | None = None
    loss_rms: float | None = None
    sqnr_db: float | None = None
    gradient_cosine: float | None = None


@dataclass(kw_only=True, slots=True)
class LinearSensitivity:
    """One linear.

    fqn: module path
    shape: of its weight, [N, K]
    gemms: fprop, dgrad and wgrad, each alone
    range_parm: largest |x| over the standard deviation of x - (channel maximum + channel minimum), as the Ascend
        quantisation tool (msModelSlim) computes it over the first 5 batches
    kurtosis: of x; 3 for a normal distribution
    row_error_p99: of x, see telemetry
    """

    fqn: str
    shape: tuple[int, int]
    gemms: dict[str, GemmSensitivity] = field(default_factory=lambda: {name: GemmSensitivity() for name in GEMMS})
    range_parm: float | None = None
    kurtosis: float | None = None
    row_error_p99: float | None = None


METRICS: dict[str, Callable[[LinearSensitivity], float | None]] = {
    "loss": lambda linear: linear.gemms["fprop"].loss_rms,
    "gradient": lambda linear: _largest(1 - c for g in linear.gemms.values() if (c := g.gradient_cosine) is not None),
    "sqnr": lambda linear: _largest(-s for g in linear.gemms.values() if (s := g.sqnr_db) is not None),
    "range_parm": lambda linear: linear.range_parm,
    "kurtosis": lambda linear: linear.kurtosis,
    "row_error": lambda linear: linear.row_error_p99,
}
NEEDS_GRADIENTS = ("gradient", "sqnr")  # metrics that need a backward pass


def ranked(linears: Sequence[LinearSensitivity], metric: str) -> list[tuple[LinearSensitivity, float]]:
    """Linears with their score, the most sensitive first; ties in the order of their names, no number last."""
    scores = [(linear, score if (score := METRICS[metric](linear)) is not None else -math.inf) for linear in linears]
    return sorted(scores, key=lambda pair: (-pair[1], pair[0].fqn))


class Calibration:
    """A converted model and the windows that it is judged on.

    Args:
        model: converted; returns logits for (tokens, None, document_ids). Linears whose rule quantises them are
            candidates; none is left changed.
        batches: calibration windows.

    Raises:
        ConfigError: no linear of the model is quantised, or the windows hold no target.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.model = model.eval()
        self.batches = batches
        self.device = next(model.parameters()).device
        self.linears = named_linears(model)
        self.rules = {fqn: linear.precision for fqn, linear in self.linears.items()}
        self.candidates = [fqn for fqn, precision in self.rules.items() if precision.quantized]
        self.tokens = sum(int((batch.targets != MASKED_TARGET).sum()) for batch in batches)
        if not self.candidates:
            raise ConfigError(
                f"calibration: none of the {len(self.linears)} linears is quantised under this recipe; needs at least "
                "one. Take another recipe, such as recipe=blockwise."
            )
        if not self.tokens:
            raise ConfigError("calibration: the windows hold no target; needs some. Give other text.")

    def loss(self, precisions: Mapping[str, LinearPrecision]) -> float:
        """Mean loss in nats with the linears that are named in that precision, all others as they are."""
        changed = {fqn: self.linears[fqn].precision for fqn in precisions}
        try:
            self._set(precisions)
            losses, _ = self._pass(False, {})
            return float(losses.mean())
        finally:
            self._set(changed)

    def measure(
        self, *, gradients: bool = True, progress: Callable[[int, int], None] | None = None
    ) -> list[LinearSensitivity]:
        """Every candidate, in the order of the model.

        Args:
            gradients: also measure what needs a backward pass: dgrad, wgrad and all cosines.
            progress: told (linears done, linears in all).
        """
        rows = {
            fqn: LinearSensitivity(fqn=fqn, shape=(self.linears[fqn].out_features, self.linears[fqn].in_features))
            for fqn in self.candidates
        }
        with evaluation_precision(self.model, BF16):
            probes = {fqn: _Probe(self.linears[fqn], self.rules[fqn], gradients) for fqn in self.candidates}
            losses, gradient = self._pass(gradients, probes)
            norm = _norm(gradient)
            for fqn, probe in probes.items():
                own = gradient[f"{fqn}.weight"] if gradients else None
                probe.finish(rows[fqn], own, norm)
            for done, (fqn, row) in enumerate(rows.items(), start=1):
                self._alone(fqn, row, losses, gradient if gradients else None, norm)
                if progress is not None:
                    progress(done, len(rows))
        return list(rows.values())

    def _alone(
        self, fqn: str, row: LinearSensitivity, losses: Tensor, gradient: dict[str, Tensor] | None, norm: float
    ) -> None:
        """Quantise fprop of one linear, then its dgrad, and compare with BF16."""
        linear, rule = self.linears[fqn], self.rules[fqn]
        for name in ("fprop", "dgrad") if gradient is not None else ("fprop",):
            if rule.gemms[name].left is None and rule.gemms[name].right is None:
                continue
            linear.set_precision(LinearPrecision(rule.name, **{name: rule.gemms[name]}))  # type: ignore[arg-type]
            changed, other = self._pass(gradient is not None, {})
            linear.set_precision(BF16)
            if name == "fprop":
                difference = changed - losses
                row.gemms[name].loss_change = float(difference.mean())
                row.gemms[name].loss_rms = float(difference.square().mean().sqrt())
            if gradient is not None:
                dot = sum(float((other[key].double() * gradient[key].double()).sum()) for key in gradient)
                row.gemms[name].gradient_cosine = dot / max(norm * _norm(other), 1e-300)

    def _pass(self, gradients: bool, probes: Mapping[str, _Probe]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss of every token [tokens] fp64, gradient of the mean loss by parameter) over all windows."""
        hooks = [self.linears[fqn].register_forward_hook(probe.look) for fqn, probe in probes.items()]
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        total: dict[str, Tensor] = {}
        losses = []
        try:
            with torch.set_grad_enabled(gradients):
                for part in self._parts():
                    losses.append(part.detach().double())
                    if gradients:
                        found = torch.autograd.grad(part.sum() / self.tokens, list(parameters.values()))
                        for name, gradient in zip(parameters, found, strict=True):
                            total[name] = total[name].add_(gradient) if name in total else gradient
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(losses), total

    def _parts(self) -> Iterator[Tensor]:
        """Loss of every target of each batch."""
        for batch in self.batches:
            tokens, targets, ids = inputs(batch, self.device)
            logits = self.model(tokens, None, ids).flatten(0, 1).float()
            losses = F.cross_entropy(logits, targets.flatten(), reduction="none", ignore_index=MASKED_TARGET)
            yield losses[targets.flatten() != MASKED_TARGET]

    def _set(self, precisions: Mapping[str, LinearPrecision]) -> None:
        for fqn, precision in precisions.items():
            if self.linears[fqn].precision != precision:
                self.linears[fqn].set_precision(precision)


class _Probe:
    """Looks at x and dy of one linear in BF16, and computes its GEMMs on the side as its rule says."""

    def __init__(self, linear: Float8Linear, rule: LinearPrecision, gradients: bool) -> None:
        self._linear, self._rule, self._gradients = linear, rule, gradients
        self._power = {name: [0.0, 0.0] for name in GEMMS}  # of the exact output, of the error
        self._wgrad_error: Tensor | None = None
        self._ranges: list[tuple[float, float]] = []
        self._stats: list[dict[str, float]] = []

    @torch.no_grad()
    def look(self, linear: Float8Linear, args: tuple[Any, ...], y: Tensor) -> None:
        """Forward hook."""
        x, weight = self._treated(as_matrix(args[0].detach()))
        if len(self._ranges) < RANGE_BATCHES:
            self._ranges.append(_range(x.float()))
        spec = self._rule.fprop.left or self._rule.wgrad.right
        if spec is not None:
            stats = operand_statistics(x, spec, backend=linear.backend_name).tolist()
            self._stats.append(dict(zip(STATS, stats, strict=True)))
        row, col = quantize_input(x, InputNeeds.of(self._rule, self._gradients), linear.backend_name)
        self._compare("fprop", row, self._operand(weight, self._rule.fprop.right), x.float() @ weight.T)
        if self._gradients and y.requires_grad:
            y.register_hook(lambda dy: self._look_back(as_matrix(dy).contiguous(), x, col, weight))

    @torch.no_grad()
    def _look_back(self, dy: Tensor, x: Tensor, col: Operand | None, weight: Tensor) -> None:
        rule, backend = self._rule, self._linear.backend_name
        wide = dy.float()
        left = quantized(dy, rule.dgrad.left, rule.high, False, backend)
        self._compare("dgrad", left, self._operand(weight, rule.dgrad.right, transpose=True), wide @ weight)
        assert col is not None, "gradients were asked for"
        if rule.wgrad_source == "requant" and rule.wgrad.right is not None:
            col = requantized(col, rule.wgrad.right, backend)
        left = quantized(dy, rule.wgrad.left, rule.high, True, backend)
        error = self._compare("wgrad", left, col, wide.T @ x.float())
        self._wgrad_error = error if self._wgrad_error is None else self._wgrad_error.add_(error)

    def finish(self, row: LinearSensitivity, gradient: Tensor | None, norm: float) -> None:
        """Fill in what was seen; `gradient` of the weight and the norm of all gradients are those in BF16."""
        for name, (signal, noise) in self._power.items():
            precision = self._rule.gemms[name]
            if noise > 0 and (precision.left is not None or precision.right is not None):
                row.gemms[name].sqnr_db = 10 * math.log10(signal / noise)
        row.range_parm = max(top for top, _ in self._ranges) / max(max(std for _, std in self._ranges), 1e-300)
        if self._stats:
            row.kurtosis = max(stats["kurtosis"] for stats in self._stats)
            row.row_error_p99 = max(stats["row_error_p99"] for stats in self._stats)
        if gradient is not None and self._wgrad_error is not None and row.gemms["wgrad"].sqnr_db is not None:
            error = self._wgrad_error.double()  # wgrad changes the gradient of its own weight and no other
            dot = float((gradient.double() * error).sum())
            other = math.sqrt(max(norm**2 + 2 * dot + float(error.square().sum()), 0.0))
            row.gemms["wgrad"].gradient_cosine = (norm**2 + dot) / max(norm * other, 1e-300)

    def _compare(self, name: str, left: Operand, right: Operand, exact: Tensor) -> Tensor:
        """Add the power of output and error of one GEMM; gives the error."""
        y = gemm(
            left, right, bias=None, out_dtype=torch.float32,
            high=self._rule.high, backend=self._linear.backend_name, site=NOT_COUNTED, name=name,
        )  # fmt: skip
        error = y - exact
        self._power[name][0] += float(exact.double().square().sum())
        self._power[name][1] += float(error.double().square().sum())
        return error

    def _operand(self, weight: Tensor, spec: Any, transpose: bool = False) -> Operand:
        return quantized(weight, spec, self._rule.high, transpose, self._linear.backend_name)

    def _treated(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x and the weight as the rule's precision would see them: the linear itself is in BF16 for the time being."""
        x, weight = self._linear.prepared(x), self._linear.weight.detach()
        if self._linear.remedy is None or self._linear.remedy.smooth is None:
            return x, weight
        scale = channel_scale(*(linear.weight for linear in self._linear.remedy.smooth))
        return x * scale.to(x.dtype), weight / scale


def _range(x: Tensor) -> tuple[float, float]:
    """(largest |x|, standard deviation of x - (channel maximum + channel minimum)) of a batch [M, K]."""
    centre = x.amax(0) + x.amin(0)
    return float(x.abs().amax()), float((x - centre).std())


def _norm(gradient: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in gradient.values()))


def _largest(values: Iterator[float]) -> float | None:
    return max(values, default=None)
