"""Channels that the weights of other linears scale (swiglu: smooth), where each rank has its rows of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fp8train
from fp8train.convert import convert_model
from fp8train.distributed.sharding import free_gathered
from fp8train.errors import ConfigError
from fp8train.nn.gathered_operands import show_weights
from fp8train.nn.gathering import gather_masters
from fp8train.nn.linear import Float8Linear
from fp8train.nn.remedies import channel_scale
from fp8train.nn.weights import converted_linears, evaluation_precision
from fp8train.quant.formats import BF16
from fp8train.recipe import load_recipe
from fp8train.shards import is_sharded, local, whole
from tests.distributed.ranks import run_ranks

WIDTH, INNER = 128, 300  # of 300 rows the ranks have 150 each, and share a block
WEIGHTS_IN_BF16 = {"fp8": {"fprop": {"x": "e4m3 1x128"}}}
PRECISIONS = {recipe: load_recipe(recipe).document["precisions"] for recipe in ("blockwise", "rowwise")}
PRECISIONS["weights in bf16"] = WEIGHTS_IN_BF16
GATHER: dict[str, Callable[[nn.Module], None]] = {"operands": fp8train.gather_operands, "fp32": gather_masters}


class MLP(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, inner, bias=False)
        self.up_proj = nn.Linear(WIDTH, inner, bias=False)
        self.down_proj = nn.Linear(inner, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def _layers(precisions: str = "blockwise", inner: int = INNER) -> nn.Sequential:
    """Two MLPs with channels of many sizes."""
    torch.manual_seed(0)
    model = nn.Sequential(MLP(inner), MLP(inner))
    with torch.no_grad():
        for layer in model:
            layer.up_proj.weight.mul_(torch.logspace(-2, 2, inner)[torch.randperm(inner), None])
    rules = [{"match": "*", "use": "fp8"}]
    recipe = {"version": 1, "precisions": PRECISIONS[precisions], "rules": rules}
    convert_model(model, recipe | {"swiglu": {"clamp": 0.5, "smooth": True}}, backend="cpu")
    return model


def _sharded(model: nn.Sequential, gather: str, by: str = "layer", **arguments: Any) -> nn.Sequential:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parts = {"layer": list(model), "linear": converted_linears(model), "root": []}
    for part in (*parts[by], model):
        fully_shard(part, mesh=mesh, **arguments)
    GATHER[gather](model)
    return model


def _inputs() -> Tensor:
    return torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1))


def _steps(model: nn.Sequential, before: Sequence[Callable[[], object]]) -> list[Tensor]:
    """Results and gradients of a step after each of these, and an evaluation after each step."""
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True), []
    for do in before:
        do()
        y = model(_inputs())
        y.square().mean().backward()
        seen += [y.detach().clone(), *(whole(weight.grad) for weight in model.parameters() if weight.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            seen.append(model(_inputs()))
        free_gathered(model)  # or the root would stay whole, with its weight as it was
    return seen


def _trained(model: nn.Sequential) -> list[Tensor]:
    """Writes to the weights that scale, seen and unseen, changes of precision, freezing, evaluations."""
    mlp: MLP = model[0]
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    own = down.precision

    def written() -> None:
        with torch.no_grad():
            gate.weight.mul_(4.0)

    def written_locally() -> None:
        with torch.no_grad():
            own = local(up.weight)
            own.mul_(1.0 + 7.0 * (own[:, :1] > 0))

    def unseen() -> None:
        local(gate.weight).data.mul_(0.5)
        fp8train.weights_changed(model)

    def loaded() -> None:
        name = "0.up_proj.weight"
        model.load_state_dict({name: model.state_dict()[name] * 32.0}, strict=False)

    def evaluated() -> None:
        with torch.inference_mode(), evaluation_precision(model, BF16):
            model(_inputs())
            free_gathered(model)

    return _steps(
        model,
        [
            lambda: None, written, written_locally, unseen, loaded, evaluated, lambda: down.set_precision(BF16),
            lambda: down.set_precision(own), lambda: gate.set_precision(BF16), lambda: down.requires_grad_(False),
            lambda: gate.requires_grad_(False), lambda: model.eval(), lambda: model.train(),
        ],
    )  # fmt: skip


def _compiled(model: nn.Sequential) -> tuple[list[Tensor], int]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for layer in model:
        layer.compile(backend="aot_eager")
    seen = _steps(model, [lambda: None] * 3)
    return seen, sum(torch._dynamo.utils.counters["graph_break"].values())


def _evaluated_between(model: nn.Sequential) -> list[Tensor]:
    """Micro-batches, and an evaluation between forward and backward of the second."""
    model(_inputs() * 2).square().mean().backward()
    y = model(_inputs())
    model.train(not is_sharded(model.parameters()))  # which would have a plain one make its codes anew, and none of y's
    with torch.no_grad():
        evaluated = model(_inputs() * 3)
    model.train()
    y.square().mean().backward()
    return [y.detach(), evaluated, *(whole(weight.grad) for weight in model.parameters())]


def _shown(gather: str) -> bool:
    """Whether a hook sees what the GEMMs multiply where it is shown, and the results stay."""
    model, looks = _sharded(_layers(), gather), []
    down: Float8Linear = model[0].down_proj
    down.register_forward_hook(lambda linear, args, y: looks.append(linear.prepared_weight().detach().clone()))
    results = []
    for shown in (False, True, False):
        show_weights(converted_linears(model), shown)
        results.append(model(_inputs()))
    gate, up, weight = (whole(getattr(model[0], f"{name}_proj").weight.detach()) for name in ("gate", "up", "down"))
    return torch.equal(looks[1], weight / channel_scale(gate, up)) and all(torch.equal(results[0], y) for y in results)


def _refused(call: Callable[[], object]) -> str:
    with pytest.raises((ConfigError, RuntimeError)) as caught:
        call()
    return str(caught.value)


def _while_whole(gather: str) -> None:
    model = _sharded(_layers(), gather)
    model(_inputs())
    model[0].unshard()
    model[0].down_proj.set_precision(model[0].down_proj.precision)
    model[0](_inputs())


def _plain() -> None:
    from torch.distributed.fsdp import fully_shard

    model = _layers()
    fully_shard(model)
    model(_inputs())


def _shared() -> None:
    model = _layers()
    model[1].gate_proj.weight = model[1].up_proj.weight
    _sharded(model, "operands")


def _unscaled(precisions: str) -> nn.Sequential:
    model = _layers(precisions)
    for layer in model:
        layer.down_proj.set_remedy(None)
    return model


def _on_ranks(world: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"moves": {}, "breaks": {}, "same": {}}

    def compare(name: tuple[object, ...], got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
        found["same"][name] = [torch.equal(a, b) for a, b in zip(got, want, strict=True)]

    for precisions in PRECISIONS:
        want = _trained(_layers(precisions))
        found["moves"][precisions] = not torch.equal(want[0], _unscaled(precisions)(_inputs()))
        ways = [("operands", "layer"), ("operands", "root"), ("fp32", "layer")]
        for gather, by in ways if precisions == "blockwise" else ways[:1]:
            compare((precisions, gather, by), _trained(_sharded(_layers(precisions), gather, by)), want)
    wanted = {"compiled": _compiled(_layers())[0], "between": _evaluated_between(_layers())}
    for gather in GATHER:
        got, found["breaks"][gather] = _compiled(_sharded(_layers(), gather))
        compare(("compiled", gather), got, wanted["compiled"])
        for reshard in (True, False):
            model = _sharded(_layers(), gather, reshard_after_forward=reshard)
            compare(("evaluated between", gather, reshard), _evaluated_between(model), wanted["between"])
        for inner, by in ((1, "layer"), (261, "layer"), (INNER, "linear")):
            got = _steps(_sharded(_layers(inner=inner), gather, by), [lambda: None] * 2)
            compare((inner, by, gather), got, _steps(_layers(inner=inner), [lambda: None] * 2))
    found["shown"] = {gather: _shown(gather) for gather in GATHER}
    found["refusals"] = {
        "whole": _refused(lambda: _while_whole("operands")), "whole fp32": _refused(lambda: _while_whole("fp32")),
        "plain": _refused(_plain), "shared": _refused(_shared),
    }  # fmt: skip
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(_on_ranks, 2, tmp_path_factory.mktemp("ranks"))


def test_numbers_are_those_of_a_model_that_is_not_sharded(ranks: list[dict[str, Any]]) -> None:
    """Through all that may be done to weights and precisions, compiled, and however the rows fall on the ranks."""
    for result in ranks:
        assert len(result["same"]) == 3 + 2 + 2 * (1 + 2 + 3)
        for name, same in result["same"].items():
            assert len(same) >= 8 and all(same), name
        assert all(result["moves"][precisions] for precisions in PRECISIONS)
        assert result["breaks"] == dict.fromkeys(GATHER, 0)


@pytest.mark.parametrize("gather", GATHER)
def test_a_hook_sees_the_scaled_weight_where_it_is_shown(ranks: list[dict[str, Any]], gather: str) -> None:
    assert all(result["shown"][gather] for result in ranks)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("whole", "after reshard"), ("whole fp32", "after reshard"), ("plain", "Call fp8train.gather_operands"),
        ("shared", "Take `smooth` out"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_with_a_remedy(ranks: list[dict[str, Any]], name: str, remedy: str) -> None:
    assert all(remedy in " ".join(result["refusals"][name].split()) for result in ranks)
