"""FSDP2 that gathers what the GEMMs multiply, against FSDP2 that gathers the FP32 masters of it."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fp8train
from fp8train.convert import convert_model
from fp8train.errors import ConfigError
from fp8train.nn.gathered_operands import MASTER, gathered_form, show_weights
from fp8train.nn.linear import Float8Linear
from fp8train.nn.weights import converted_linears
from fp8train.quant.formats import BF16, BLOCKWISE, FP32, GemmPrecision, LinearPrecision, QuantSpec
from fp8train.recipe import load_recipe
from tests.distributed.ranks import run_ranks

WIDTH, INNER = 128, 300  # of 300 rows the ranks have 150 each, and share a block
RECIPES = ("blockwise", "deepseek_v3", "tensorwise", "rowwise", "bf16", "fp32", "placebo")


def _layers(precision: LinearPrecision, inner: int = INNER) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, inner), nn.GELU(), nn.Linear(inner, WIDTH, bias=False)) for _ in range(2)]
    model = nn.Sequential(*layers)
    everything = load_recipe("blockwise").document | {"rules": [{"match": "*", "use": "fp8"}]}
    convert_model(model, everything, backend="cpu")
    for linear in converted_linears(model):
        linear.set_precision(precision)
    return model


def sharded_model(precision: LinearPrecision, gather: bool, inner: int = INNER, **arguments: object) -> nn.Sequential:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = _layers(precision, inner)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh, **arguments)
    fully_shard(model, mesh=mesh, **arguments)
    if gather:
        fp8train.gather_operands(model)
    return model


@contextmanager
def _sent() -> Iterator[Counter[str]]:
    """Bytes that this rank puts into all-gathers, inside."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    real, count = getattr(dist, name), Counter[str]()

    def counted(output, input, *rest, **more):
        count["bytes"] += input.numel() * input.element_size()
        return real(output, input, *rest, **more)

    setattr(dist, name, counted)
    try:
        yield count
    finally:
        setattr(dist, name, real)


def inputs() -> torch.Tensor:
    return torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1))


def _train(model: nn.Module) -> list[torch.Tensor]:
    """Results and gradients of steps before which something is done to weights or precisions."""
    first: Float8Linear = model[0][0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    own, frozen = first.precision, model[1][2].weight

    def written() -> None:
        with torch.no_grad():
            first.weight.mul_(0.5)

    def unseen() -> None:
        first.weight.to_local().data.mul_(1.5)
        fp8train.weights_changed(model)

    def loaded() -> None:
        model.load_state_dict({name: weight * 0.75 for name, weight in model.state_dict().items()})

    def changed(precision: LinearPrecision) -> Callable[[], None]:
        return lambda: first.set_precision(precision)

    seen = []
    for before in (
        lambda: None, lambda: None, written, unseen, loaded, changed(BF16), changed(FP32), changed(own),
        lambda: frozen.requires_grad_(False), lambda: model.eval(), lambda: model.train(),
    ):  # fmt: skip
        before()
        y = model(inputs())
        y.square().mean().backward()
        seen += [y.detach().clone(), first.weight.grad.full_tensor()]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            seen.append(model(inputs()))
    return seen


def _bytes(model: nn.Module) -> int:
    model(inputs()).sum().backward()
    with _sent() as count:
        model(inputs()).sum().backward()  # codes are there
    return count["bytes"]


def other_codes() -> LinearPrecision:
    """BLOCKWISE with weights in E5M2, which are codes too."""
    fprop, dgrad = (
        dataclasses.replace(gemm, right=QuantSpec.parse("e5m2 128x128 pow2"))
        for gemm in (BLOCKWISE.fprop, BLOCKWISE.dgrad)
    )
    return dataclasses.replace(BLOCKWISE, name="e5m2", fprop=fprop, dgrad=dgrad)


def _copied() -> bool:
    """Whether a copy of a gathered linear computes with its own weight."""
    model = sharded_model(BLOCKWISE, True)
    model(inputs())
    linear, bias = copy.deepcopy(model[0][0]), model[0][0].bias.full_tensor()
    weight = copy.deepcopy(model[0][0].weight).full_tensor()
    linear.weight, linear.bias = nn.Parameter(weight * 2.0), nn.Parameter(bias * 2.0)
    model[0].unshard()
    return torch.equal(linear(inputs()), 2.0 * model[0][0](inputs()))


def _compiled(precision: LinearPrecision, gather: bool) -> tuple[list[torch.Tensor], int]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = sharded_model(precision, gather)
    for layer in model:
        layer.compile()
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=0.01), []
    for _ in range(3):
        y = model(inputs())
        y.square().mean().backward()
        seen += [y.detach().clone(), model[0][0].weight.grad.full_tensor()]
        optimizer.step()
        optimizer.zero_grad()
    return seen, sum(torch._dynamo.utils.counters["graph_break"].values())


def _shown() -> dict[str, object]:
    """What a hook sees of the weight, and what is asked of the master."""
    model, looks = sharded_model(BLOCKWISE, True), []
    model[0][0].register_forward_hook(lambda linear, args, y: looks.append(linear.weight.detach().clone()))
    results = [model(inputs())]
    show_weights(converted_linears(model), True)
    results.append(model(inputs()))
    show_weights(converted_linears(model), False)
    results.append(model(inputs()))
    return {
        "hidden": looks[0], "shown": looks[1], "hidden again": looks[2], "master": model[0][0].weight.full_tensor(),
        "same": all(torch.equal(results[0], other) for other in results[1:]),
        "held": [linear.provider.gathered.held_bytes for linear in converted_linears(model)],
    }  # fmt: skip


def refused(call: Callable[[], object]) -> str:
    with pytest.raises((ConfigError, ValueError, RuntimeError)) as caught:
        call()
    return str(caught.value)


def _while_whole(model: nn.Sequential) -> None:
    model(inputs())
    model[0].unshard()
    model[0][0].set_precision(other_codes())
    model[0](inputs())


def _before_backward(model: nn.Sequential) -> None:
    y = model(inputs())
    model[0][0].set_precision(BF16)
    y.sum().backward()


def _between_forwards(model: nn.Sequential) -> None:
    y = model(inputs())
    for linear in converted_linears(model):
        linear.set_precision(BF16)
    (y + model(inputs())).sum().backward()


def _with_another_fsdp() -> None:
    from torch.distributed.fsdp import FSDPModule

    model = sharded_model(BLOCKWISE, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(FSDPModule, "_get_fsdp_state")
        fp8train.gather_operands(model)


def _refusals() -> dict[str, str]:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
    from torch.distributed.tensor import Shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    columns = {"shard_placement_fn": lambda weight: Shard(weight.dim() - 1)}
    return {
        "whole": refused(lambda: _while_whole(sharded_model(BLOCKWISE, True))),
        "backward": refused(lambda: _before_backward(sharded_model(BLOCKWISE, True))),
        "forwards": refused(lambda: _between_forwards(sharded_model(BLOCKWISE, True))),
        "plain": refused(lambda: fp8train.gather_operands(_layers(BLOCKWISE))),
        "offload": refused(lambda: sharded_model(BLOCKWISE, True, offload_policy=CPUOffloadPolicy(pin_memory=False))),
        "cast": refused(lambda: sharded_model(BLOCKWISE, True, mp_policy=policy)),
        "columns": refused(lambda: sharded_model(BLOCKWISE, True, **columns)),
        "other torch": refused(_with_another_fsdp),
    }


def _precision(recipe: str) -> LinearPrecision:
    document = load_recipe(recipe)
    return next(p for name, p in document.precisions.items() if name not in ("bf16", "fp32") or name == recipe)


def _on_ranks(world):
    found: dict[str, object] = {"shown": _shown(), "refusals": _refusals()}
    for recipe in RECIPES:
        precision = _precision(recipe)
        got, want = (_train(sharded_model(precision, gather)) for gather in (True, False))
        found[recipe] = {
            "same": [torch.equal(a, b) for a, b in zip(got, want, strict=True)],
            "bytes": [_bytes(sharded_model(precision, gather)) for gather in (True, False)],
            "bytes if whole": _bytes(sharded_model(precision, True, reshard_after_forward=False)),
            "moves": not torch.equal(got[0], got[3]),
        }
    found["copied"] = _copied()
    for name, precision in (("compiled", BLOCKWISE), ("compiled bf16", BF16)):
        (got, breaks), (want, _) = (_compiled(precision, gather) for gather in (True, False))
        found[name] = {"same": [torch.equal(a, b) for a, b in zip(got, want, strict=True)], "breaks": breaks}
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(_on_ranks, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_numbers_are_those_of_gathered_masters(ranks, recipe):
    """Through writes that are seen and unseen, loads, changes of precision, freezing and evaluation."""
    for result in ranks:
        assert len(result[recipe]["same"]) == 33 and all(result[recipe]["same"])
        assert result[recipe]["moves"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_bytes_are_those_of_the_operands(ranks, recipe):
    """A layer is gathered in forward and, unless it stays whole, in backward; the root has nothing of its own."""
    weights, biases = 2 * WIDTH * INNER, 4 * INNER
    each = gathered_form(_precision(recipe)).dtype.itemsize
    for result in ranks:
        sent, masters = result[recipe]["bytes"]
        assert masters == 2 * 2 * (4 * weights + biases) / 2
        assert sent == 2 * 2 * (each * weights + biases) / 2 == 2 * result[recipe]["bytes if whole"]


def test_a_copy_has_its_own_weight(ranks):
    assert all(result["copied"] for result in ranks)


def test_forms_cover_codes_bf16_and_masters():
    forms = {recipe: gathered_form(_precision(recipe)) for recipe in RECIPES}
    assert {recipe: form.dtype.itemsize for recipe, form in forms.items()} == {
        "blockwise": 1, "deepseek_v3": 1, "tensorwise": 1, "rowwise": 4, "bf16": 2, "fp32": 4, "placebo": 4,
    }  # fmt: skip
    assert all(forms[recipe].spec == _precision(recipe).fprop.right for recipe in ("blockwise", "tensorwise", "bf16"))
    weight = QuantSpec.parse("e4m3 128x128")
    assert gathered_form(LinearPrecision("forward", fprop=GemmPrecision(None, weight))) == MASTER


@pytest.mark.parametrize("name", ["compiled", "compiled bf16"])
def test_compiled_layers_give_the_same_without_a_break(ranks, name):
    for result in ranks:
        assert len(result[name]["same"]) == 6 and all(result[name]["same"])
        assert result[name]["breaks"] == 0


def test_a_hook_sees_the_weight_where_it_is_shown(ranks):
    for result in ranks:
        shown = result["shown"]
        assert shown["hidden"].isnan().all() and shown["hidden again"].isnan().all()
        assert torch.equal(shown["shown"], shown["master"])
        assert shown["same"]
        assert shown["held"] == [WIDTH * INNER / 2 + 2 * 4 * 3] * 4  # 3 blocks of 128 rows or columns


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("whole", "after reshard"), ("backward", "between two steps"), ("forwards", "precision of forward"),
        ("plain", "fully_shard"), ("offload", "Leave out"), ("cast", "Leave out"), ("columns", "Shard(0)"),
        ("other torch", "parallel.gather=fp32"),
    ],
)  # fmt: skip
def test_what_cannot_be_gathered_so_is_refused(ranks, name, remedy):
    assert all(remedy in result["refusals"][name] for result in ranks)
