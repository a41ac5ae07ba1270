"""The Gluon kernel with faults planted in its source, for the machines that must see them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from fp8train.kernels import gemm_gluon, gemm_gluon_sum

GIVE_BACK = "        mbarrier.arrive(empty.index(held), count=1)\n        held = slot\n"
_PROMOTED = "gl.expand_dims(scale, 1) * gl.expand_dims(b_scale, 0), acc)\n    return acc, slot, phase, held"
# a slot is given back when its scales may be on their way to the registers, as it was: H200, 2026-11-26
EARLY_AHEAD = (
    (GIVE_BACK, "        held = slot\n"),
    (_PROMOTED, _PROMOTED.replace("\n", "\n        mbarrier.arrive(empty.index(held), count=1)\n")),
)


def faulty_modules(folder: Path, *changes: tuple[str, str]) -> tuple[ModuleType, ModuleType]:
    """gemm_gluon_sum and gemm_gluon with changes to their source, which is written to the folder."""
    faulty = []
    found = 0
    for module in (gemm_gluon_sum, gemm_gluon):
        text = Path(module.__file__).read_text(encoding="utf-8")
        for old, new in changes:
            found += old in text
            text = text.replace(old, new)
        path = folder / f"{module.__name__.rpartition('.')[2]}.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"faulty_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        faulty.append(importlib.util.module_from_spec(spec))
        spec.loader.exec_module(faulty[-1])
    assert found == len(changes)
    for name in vars(gemm_gluon_sum).keys() & vars(faulty[1]).keys():
        if hasattr(vars(gemm_gluon_sum)[name], "fn"):
            setattr(faulty[1], name, vars(faulty[0])[name])  # imported from the right one
    return faulty[0], faulty[1]
