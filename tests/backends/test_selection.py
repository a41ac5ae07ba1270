"""Which backend runs, and what is said where none can."""

from __future__ import annotations

import pytest

from fp8train.backends import BACKENDS, get_backend, select_backend, selection
from fp8train.backends.cpu import CpuBackend
from fp8train.errors import BackendError, UserError
from fp8train.quant.formats import BF16, BLOCKWISE, LinearPrecision


class Picky(CpuBackend):
    """Serves nothing but BF16."""

    def unsupported(self, precision: LinearPrecision) -> str | None:
        return None if precision == BF16 else f"it serves bf16 only, not {precision.name}"


@pytest.fixture
def picky_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "picky", Picky)
    monkeypatch.setattr(selection, "AUTO_ORDER", {"cpu": ("picky", "cpu"), "cuda": ("picky", "cpu")})


def test_auto_takes_the_cpu_backend_on_a_cpu_and_on_meta() -> None:
    for device in ("cpu", "meta"):
        chosen = select_backend("auto", device, [BLOCKWISE])
        assert chosen.backend.name == "cpu"
        assert chosen.reason.startswith("backend cpu: ") and chosen.backend.note in chosen.reason


def test_auto_says_why_it_passed_over_the_ones_before(picky_first: None) -> None:
    chosen = select_backend("auto", "cpu", [BF16, BLOCKWISE])
    assert chosen.backend.name == "cpu"
    assert chosen.reason.endswith("(passed over: picky: it serves bf16 only, not fp8)")


def test_auto_takes_the_first_that_serves_all_precisions(picky_first: None) -> None:
    chosen = select_backend("auto", "cpu", [BF16])
    assert isinstance(chosen.backend, Picky) and "passed over" not in chosen.reason


def test_auto_with_no_candidate_left_gives_every_reason(picky_first: None) -> None:
    with pytest.raises(BackendError, match="picky: it computes on the CPU.*; cpu: it computes on the CPU") as error:
        select_backend("auto", "cuda")
    assert "'cuda'" in str(error.value)


@pytest.mark.parametrize("name", ["cpu", "cpu_torch", "dequant_bf16", "reference"])
def test_named_backend_is_taken_and_carries_its_name(name: str) -> None:
    chosen = select_backend(name, "cpu", [BLOCKWISE, BF16])
    assert chosen.backend is get_backend(name) and chosen.backend.name == name
    assert chosen.reason.startswith(f"backend {name} as asked: ")


@pytest.mark.parametrize("name", ["cpu", "cpu_torch"])
def test_named_backend_on_a_device_it_cannot_use_is_refused_with_a_remedy(name: str) -> None:
    with pytest.raises(BackendError, match=f"backend: {name} cannot be used: .*cuda.*backend=auto"):
        select_backend(name, "cuda")


def test_named_backend_that_cannot_serve_a_precision_is_refused(picky_first: None) -> None:
    with pytest.raises(BackendError, match="picky cannot be used: it serves bf16 only"):
        select_backend("picky", "cpu", [BLOCKWISE])


@pytest.mark.parametrize("name", ["tritom", "CPU", "", "auto "])
def test_unknown_backend_is_refused_with_the_known_names(name: str) -> None:
    with pytest.raises(BackendError, match="needs one of auto, cpu") as error:
        select_backend(name, "cpu")
    assert repr(name) in str(error.value)
    assert isinstance(error.value, UserError)  # commands exit with status 2


def test_backend_is_made_once_per_process() -> None:
    assert get_backend("cpu") is get_backend("cpu")
    assert get_backend("cpu") is not get_backend("cpu_torch")


@pytest.mark.parametrize("name", [*BACKENDS, "hopper", "hopper:bits=24,promote=none"])
def test_backend_emulates_unless_it_multiplies_by_fp8_instructions(name: str) -> None:
    assert get_backend(name).emulates != (name in ("triton", "cublaslt", "te", "deepgemm", "torchao"))
