"""The recipe document that tests of recipes and of conversion fill in."""

from __future__ import annotations

FP8 = {
    "fprop": {"x": "e4m3 1x128", "w": "e4m3 128x128"},
    "dgrad": {"dy": "e4m3 1x128", "w": "e4m3 128x128"},
    "wgrad": {"dy": "e4m3 1x128", "x": "e4m3 1x128", "source": "dual"},
}
REST = {"match": "*", "use": "bf16"}


def document(*rules: dict, **more: object) -> dict:
    """A document with these rules and the precision fp8; `more` are further top-level keys."""
    return {"version": 1, "precisions": {"fp8": FP8}, "rules": list(rules), **more}


def rows_everywhere() -> dict:
    """One scale per row, in lm_head too: a sharded model gathers the masters of all linears."""
    operands = {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}
    rows = {gemm: dict.fromkeys(names, "e4m3 row") for gemm, names in operands.items()}
    rules = [{"match": pattern, "use": "rows"} for pattern in ("*lm_head", "*")]
    return {"version": 1, "precisions": {"rows": rows}, "rules": rules}
