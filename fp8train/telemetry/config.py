"""When telemetry measures, and how much of each operand."""

from __future__ import annotations

from dataclasses import dataclass

from fp8train.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class TelemetryConfig:
    """Statistics of the operands of every linear, in metrics.jsonl under fp8/ and as a table at the end.

    every: steps between samples, each of the first micro-batch of rank 0; null: off
    rows: rows of an operand that are measured, evenly spread; amax and non-finite values are those of all rows
    """

    every: int | None = 200
    rows: int = 256

    def __post_init__(self) -> None:
        for name, value in (("every", self.every), ("rows", self.rows)):
            if value is not None and value < 1:
                off = ", or null for none" if name == "every" else ""
                raise ConfigError(f"telemetry.{name}: got {value}; needs at least 1{off}.")
