"""What a second launch gives to the compiled kernel, shown by one that only writes down what it gets."""

from __future__ import annotations

import threading
import types
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install fp8train[triton]")
from fp8train.kernels.launch import Ready, overlaps, properties  # noqa: E402


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
