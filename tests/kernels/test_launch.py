"""What a second launch gives to the compiled kernel, shown by one that only writes down what it gets."""

from __future__ import annotations

import threading
import types
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.kernels import (  # noqa: E402
    gemm,
    gemm_gluon_launch,
    gemm_launch,
    gemm_wgrad,
    launch,
    quantize,
    quantize_weight,
    rmsnorm_backward,
    rmsnorm_quantize,
    rmsnorm_rstd,
    rope,
    swiglu_backward_quantize,
    swiglu_quantize,
)
from fp8train.kernels.launch import Ready, overlaps, properties  # noqa: E402
from fp8train.quant.qtensor import QTensor  # noqa: E402
from tests.kernels.products import DEVICE, assert_product, m_contiguous, padded_rows, quantized  # noqa: E402
from tests.shapes import matrix  # noqa: E402


class Compiled:
    """Stands in for what Triton returns from a launch."""

    def __init__(self, scratch_bytes: int = 0) -> None:
        self.metadata = types.SimpleNamespace(global_scratch_size=scratch_bytes)
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.launches.append((grid, *arguments))


class Descriptor:
    """As Triton's: a plain class around its tensor."""

    def __init__(self, base: torch.Tensor) -> None:
        assert base is not None
        self.base, self.shape, self.block_shape = base, list(base.shape), [64, 128]


@pytest.fixture
def on_device_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def test_later_tensors_take_the_places_of_the_first_and_nothing_else_changes(on_device_0: None) -> None:
    compiled, x, y = Compiled(), torch.zeros(2, 3), torch.ones(2, 3)
    arguments = {"x_ptr": x, "bias_ptr": None, "M": 2, "out_ptr": y, "BLOCK": 128}
    ready = Ready(compiled, (7,), arguments, {"x_ptr": 0, "out_ptr": 1, "bias_ptr": 2}, 0)
    later = torch.rand(2, 3), torch.rand(2, 3)
    ready(*later, None)
    ((grid, *given),) = compiled.launches
    assert grid == (7, 1, 1)
    assert given[0] is later[0] and given[3] is later[1] and given[1:3] == [None, 2] and given[4] == 128


def test_a_descriptor_is_made_anew_around_each_tensor(on_device_0: None) -> None:
    compiled, x = Compiled(), torch.zeros(2, 3)
    ready = Ready(compiled, (1, 2), {"x_desc": Descriptor(x), "x_ptr": x}, {"x_desc": 0, "x_ptr": 0}, 0)
    tensors = [torch.rand(2, 3) for _ in range(3)]
    for tensor in tensors:
        ready(tensor)
    for (_, described, pointer), tensor in zip(compiled.launches, tensors, strict=True):
        assert described.base is tensor and pointer is tensor
        assert isinstance(described, Descriptor) and (described.shape, described.block_shape) == ([2, 3], [64, 128])
    assert len({id(launch[1]) for launch in compiled.launches}) == 3, "each launch has its own: threads may share a key"


def test_what_is_kept_holds_no_tensor(on_device_0: None) -> None:
    x = torch.zeros(2, 3)
    ready = Ready(Compiled(), (1,), {"x_desc": Descriptor(x), "x_ptr": x}, {"x_desc": 0, "x_ptr": 0}, 0)
    kept = [*ready.arguments, *(value for _, _, fields in ready.descriptors for value in fields.values())]
    assert not any(isinstance(value, torch.Tensor) for value in kept)


def test_scratch_memory_is_provided_in_every_thread(on_device_0: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    asked = []
    monkeypatch.setattr(triton, "set_allocator", lambda f: asked.append(threading.get_ident()))
    ready = Ready(Compiled(scratch_bytes=128), (1,), {"x_ptr": None}, {"x_ptr": 0}, 0)
    thread = threading.Thread(target=ready, args=(torch.zeros(1),))
    thread.start()
    thread.join()
    ready(torch.zeros(1))
    assert len(set(asked)) == 2


def test_properties_tell_apart_what_a_launch_depends_on() -> None:
    wide = torch.zeros(64, 64)
    views = [
        wide, wide.to(torch.bfloat16), wide[:, :32], wide[1:], wide.T, wide.flatten()[1:65].view(8, 8),
        wide.flatten()[4:68].view(8, 8), wide.to("meta"),
    ]  # fmt: skip
    keys = [properties(view, None) for view in views]
    assert len(set(keys)) == len(keys)
    assert properties(torch.zeros(64, 64), None) == keys[0], "another tensor of the same kind has the same"


def test_memory_that_is_shared_is_found() -> None:
    memory = torch.zeros(100)
    out, before, across, empty = memory[20:40], memory[:20], memory[39:50], memory[30:30]
    assert overlaps(out, (before, None, empty, memory[40:])) is None
    assert overlaps(out, (before, across)) == 1
    assert overlaps(memory.view(10, 10)[:, :3], (memory.view(10, 10)[1:3, 5:],)) == 0, "spans count, holes too"


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, on_device_0: None) -> dict[Any, Ready]:
    """Launches are kept on a CPU too: what is "compiled" there is the interpreted kernel, or the model's."""
    ready: dict[Any, Ready] = {}

    class Again:
        metadata = types.SimpleNamespace(global_scratch_size=0)

        def __init__(self, kernel: Any, options: dict[str, Any]) -> None:
            self.kernel, self.options = kernel, options

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            names = self.kernel.arg_names
            launch = self.kernel[tuple(size for size in grid if size != 1) or (1,)]
            return lambda *arguments: launch(**dict(zip(names, arguments, strict=True)), **self.options)

    def first_launch(
        key: Any, kernel: Any, grid: Any, arguments: Any, tensors: Any, device: torch.device, **options: Any
    ) -> None:
        ordered = {name: arguments[name] for name in kernel.arg_names}
        kernel[grid](**ordered, **options)
        ready[key] = Ready(Again(kernel, options), grid, ordered, tensors, 0)

    for module in (launch, gemm_launch, gemm_gluon_launch):
        monkeypatch.setattr(module, "first_launch", first_launch)
    for module in (launch, gemm_launch):
        monkeypatch.setattr(module, "READY", ready)
    return ready


on_a_cpu = pytest.mark.skipif(DEVICE == "cuda", reason="a GPU keeps its launches by itself: tests there use them")
ENTRIES = [(module, name) for module in (gemm, gemm_wgrad) for name in module.CONFIGS]


@on_a_cpu
@pytest.mark.parametrize(("module", "config"), ENTRIES, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("given", ["out", "new", "fp32"])
def test_a_second_product_is_that_of_its_own_operands(
    module: Any, config: str, given: str, kept: dict[Any, Ready]
) -> None:
    square = module is gemm
    run = gemm.gemm if square else gemm_wgrad.gemm_wgrad
    for seed in (1, 2, 3):
        a, b = quantized(200, 272, "e4m3 1x128", seed), quantized(160, 272, f"e4m3 {'128' if square else '1'}x128", 9)
        b = QTensor(
            padded_rows(b.qdata, 16), b.scale_inv * seed if square else m_contiguous(b.scale_inv * seed), b.spec
        )
        options: dict[str, Any] = {"config": config}
        if given == "out":
            options |= {"out": matrix(200, 160, seed=seed).clone()} | ({} if square else {"accumulate": True})
        elif square:
            options |= {"out_dtype": torch.float32 if given == "fp32" else torch.bfloat16}
            options |= {"bias": matrix(1, 160, seed=seed)[0]} if given == "fp32" else {}
        plus = options["out"].clone() if "accumulate" in options else options.get("bias")
        y = run(padded_rows(a.qdata, 16), b.qdata, m_contiguous(a.scale_inv), b.scale_inv, **options)
        assert_product(y, a, b, plus, seed)
    assert len(kept) == 1


@on_a_cpu
def test_a_launch_that_is_kept_serves_no_bias_and_no_out_of_another_kind(kept: dict[Any, Ready]) -> None:
    a, b = quantized(40, 272, "e4m3 1x128", 1), quantized(24, 272, "e4m3 128x128", 2)
    wide, twice = matrix(1, 48, seed=3)[0], torch.zeros(2000).as_strided((40, 24), (23, 1))

    def run(bias: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return gemm.gemm(a.qdata, b.qdata, a.scale_inv, b.scale_inv, bias=bias, out=out)

    for bias in (wide[:24], wide[:24].bfloat16(), wide[24:].clone()):
        assert_product(run(bias, torch.zeros(40, 24)), a, b, bias)
    assert len(kept) == 2
    for bias, out, message in (
        (wide[::2], torch.zeros(40, 24), "bias is"),
        (wide[:24].long(), torch.zeros(40, 24), "bias is"),
        (wide[:24], twice, "out has"),
    ):
        with pytest.raises(ValueError, match=message):
            run(bias, out)


@on_a_cpu
def test_a_second_call_of_each_quantiser_is_that_of_its_own_input(kept: dict[Any, Ready]) -> None:
    options: dict[str, Any] = {"fp8_dtype": torch.float8_e4m3fn, "pow2": True}
    weight = torch.linspace(0.5, 1.5, 272)
    calls = {
        "rows": lambda x, y, z: quantize.quantize_rows(x, **options),
        "dual": lambda x, y, z: quantize.quantize_dual(x, **options),
        "weight": lambda x, y, z: quantize_weight.quantize_weight(x.float(), **options),
        "sum": lambda x, y, z: rmsnorm_rstd.add_rstd(x, y, eps=1e-5),
        "norm": lambda x, y, z: rmsnorm_quantize.rmsnorm_quantize(x, weight, z[:, 0].float(), **options),
        "norm backward": lambda x, y, z: rmsnorm_backward.rmsnorm_backward(
            x, y, weight, z[:, 0].float(), dtotal=z, branch_dtype=torch.float32
        ),
        "rope": lambda x, y, z: [rope.rope(x.view(2, 1, 35, 544), *y[:70].float().view(2, 35, 272), out_dtype=y.dtype)],
        "swiglu": lambda x, y, z: swiglu_quantize.swiglu_quantize(x, y, **options),
        "backward": lambda x, y, z: sum(swiglu_backward_quantize.swiglu_backward_quantize(x, y, z, **options)[:2], ()),
        "backward with h": lambda x, y, z: sum(
            swiglu_backward_quantize.swiglu_backward_quantize(x, y, z, h=tuple(options.values()), **options), ()
        ),
    }
    for name, call in calls.items():
        made = []
        for again in (False, True):
            if not again:
                kept.clear()
            for seed in (1, 2):
                made.append(call(*(matrix(140, 272, seed=10 * seed + part).bfloat16() for part in range(3))))
            if not again:
                assert len(kept) == 1, name
        first, second = made[:2], made[2:]
        kept.clear()
        alone = call(*(matrix(140, 272, seed=20 + part).bfloat16() for part in range(3)))  # seed 2, launched by Triton
        for copies in (first[1], second[1]):
            for tensor, wanted in zip(copies, alone, strict=True):
                assert torch.equal(tensor.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8)), name
