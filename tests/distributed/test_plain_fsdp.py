"""FSDP as torch has it, on a converted model that nothing else was told about."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fp8train.backends import get_backend
from fp8train.convert import convert_model
from fp8train.errors import ConfigError
from fp8train.nn.linear import Float8Linear
from fp8train.nn.weights import check_weights
from fp8train.quant.formats import QuantSpec
from tests.convertible_model import EVERYTHING
from tests.distributed.ranks import run_ranks


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))


def _train(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Results of three steps and of an evaluation."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    results = []
    for _ in range(3):
        y = model(x)
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        results.append(y.detach())
    check_weights(model)
    with torch.no_grad():
        return [*results, model(x)]


def _message(call: Callable[[], object]) -> str:
    with pytest.raises((ConfigError, ValueError, TypeError)) as caught:
        call()
    return str(caught.value)


def _on_ranks(world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))  # on both ranks: their mean is either's gradient
    found = {}
    for name in ("plain", "layers", "root", "rounded"):
        model = _model()
        convert_model(model, EVERYTHING, backend="cpu")
        for layer in (model[0], model[2]) if name == "layers" else ():
            fully_shard(layer, mesh=mesh)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if name == "rounded" else MixedPrecisionPolicy()
        if name != "plain":
            fully_shard(model, mesh=mesh, mp_policy=policy)
        found[name] = _message(lambda: model(x)) if name == "rounded" else _train(model, x)  # noqa: B023
    flat = _model()
    convert_model(flat, EVERYTHING, backend="cpu")
    cpu = torch.device("cpu")
    found["fsdp1"] = _train(FullyShardedDataParallel(flat, use_orig_params=True, device_id=cpu), x)
    split = _model()
    fully_shard(split, mesh=mesh)
    found["sharded_first"] = _message(lambda: convert_model(split, EVERYTHING, backend="cpu"))
    parallel = _model()
    convert_model(parallel, EVERYTHING, backend="cpu")
    parallel[0].weight = nn.Parameter(distribute_tensor(parallel[0].weight.detach(), mesh))
    found["tensor_parallel"] = _message(lambda: parallel(x))
    weight = parallel[0].weight.detach()
    found["pointer"] = _message(lambda: get_backend("cpu").quantize_square(weight, QuantSpec.parse("e4m3 128x128")))
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(_on_ranks, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ["layers", "root", "fsdp1"])
def test_a_model_sharded_after_its_conversion_computes_what_it_did(ranks, name):
    for result in ranks:
        assert len(result[name]) == 4
        assert all(map(torch.equal, result[name], result["plain"]))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("rounded", "param_dtype None"), ("sharded_first", "Convert first"), ("tensor_parallel", "Call the module"),
     ("pointer", "to_local")],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_with_a_remedy(ranks, name, remedy):
    assert all(remedy in result[name] for result in ranks)


def test_a_weight_of_another_tensor_class_is_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    linear = Float8Linear(16, 16, backend="cpu")
    half = torch.randn(16, 16)
    linear.weight = nn.Parameter(TwoTensor(half, half.clone()))
    with pytest.raises(ValueError, match="weight is a TwoTensor; needs a plain tensor"):
        linear(torch.randn(4, 16))
