"""ZeRO of DeepSpeed on a converted model that nothing else was told about: numbers are those of torch's DDP."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fp8train.convert import convert_model
from fp8train.errors import ConfigError
from fp8train.models import ModelConfig, build_model
from fp8train.nn.weights import OPERANDS, check_weights, converted_linears
from fp8train.recipe import load_recipe
from tests.convertible_model import EVERYTHING, Bigrams
from tests.distributed.ranks import ROOT, own_folders, run_ranks

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed: pip install -e '.[dev]'")
README = ROOT / "fp8train/nn/README.md"
STEPS = 3
DECODER = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, num_kv_heads=1, max_seq_len=16
)
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
CLAMPED = load_recipe("blockwise").document | {"swiglu": {"clamp": 0.1}}
SMOOTH = CLAMPED | {"swiglu": {"smooth": True}}
RUNS = (
    *(f"stage {stage}" for stage in range(4)), "autocast 2", "autocast 3", "decoder 1", "decoder 3", "clamped 3",
    "recomputed 3", "accumulated 1", "accumulated 2", "accumulated 3", "made in parts", "continued 1", "continued 3",
)  # fmt: skip
Run = tuple[list[Tensor], dict[str, Tensor]]  # losses, and the weights afterwards


class _Layers(nn.Module):
    """Linears called one by one, or computed again in backward."""

    def __init__(self, recomputed: bool = False) -> None:
        super().__init__()
        self.recomputed = recomputed
        self.first = nn.Sequential(nn.Linear(64, 96), nn.GELU())
        self.second = nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.first, x, use_reentrant=False) if self.recomputed else self.first(x)
        return self.second(h).float()


class _Decoder(nn.Module):
    """The decoder, which takes its tokens from the signs of x."""

    recipe: Any = "blockwise"

    def __init__(self) -> None:
        super().__init__()
        self.decoder = build_model(DECODER)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder((x[:, :16] > 0).long()).float()


class _Clamped(_Decoder):
    recipe = CLAMPED


class _Smooth(_Decoder):
    recipe = SMOOTH


def _model(kind: Callable[[], nn.Module] = _Layers, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = kind()
    recipe = model.recipe if isinstance(model, _Decoder) else EVERYTHING
    convert_model(model, recipe, backend="cpu", fused="always")
    return model


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def _batches(rank: int, micro_batches: int) -> Iterator[list[Tensor]]:
    """Of each step, this rank's micro-batches."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield [torch.randn(2, 4, 64, generator=generator)[rank] for _ in range(micro_batches)]


def _ddp(
    rank: int, kind: Callable[[], nn.Module] = _Layers, micro_batches: int = 1, autocast: bool = False,
    each_is_summed: bool = False,
) -> Run:  # fmt: skip
    """each_is_summed: gradients go over ranks after each micro-batch and not after the last, as in ZeRO 2 and 3."""
    inner = _model(kind)
    model, optimizer, losses = DistributedDataParallel(inner), _adamw(inner), []
    for batches in _batches(rank, micro_batches):
        sums = {name: torch.zeros_like(parameter) for name, parameter in inner.named_parameters()}
        for number, x in enumerate(batches, start=1):
            reduced = each_is_summed or number == micro_batches
            with contextlib.nullcontext() if reduced else model.no_sync():
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = model(x).square().mean()
                (loss / micro_batches).backward()
            losses.append(loss.detach())
            if each_is_summed:
                for name, parameter in inner.named_parameters():
                    sums[name] += parameter.grad
                    parameter.grad = None
        if each_is_summed:
            for name, parameter in inner.named_parameters():
                parameter.grad = sums[name]
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: parameter.detach().clone() for name, parameter in inner.named_parameters()}


def _config(stage: int, micro_batches: int = 1, **more: Any) -> dict[str, Any]:
    """Parameters of any size are sharded in ZeRO-3."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return {
        "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": micro_batches, "zero_optimization": zero,
        "zero_allow_untested_optimizer": True, **more,
    }  # fmt: skip


def _engine(model: nn.Module, config: dict[str, Any]) -> Any:
    import deepspeed

    return deepspeed.initialize(model=model, optimizer=_adamw(model), config=config)[0]


def _trained(engine: Any, rank: int, micro_batches: int = 1, steps: slice = slice(None)) -> list[Tensor]:
    losses = []
    for x in sum(list(_batches(rank, micro_batches))[steps], []):
        loss = engine(x).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    check_weights(engine.module)
    return losses


def _whole(model: nn.Module) -> dict[str, Tensor]:
    """The weights, on every rank."""
    import deepspeed

    parameters = dict(model.named_parameters())
    partitioned = [parameter for parameter in parameters.values() if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _zero(rank: int, stage: int, kind: Callable[[], nn.Module] = _Layers, micro_batches: int = 1, **more: Any) -> Run:
    engine = _engine(_model(kind, seed=rank), _config(stage, micro_batches, **more))  # rank 0's weights count
    return _trained(engine, rank, micro_batches), _whole(engine.module)


def _continued(rank: int, stage: int, folder: str) -> tuple[Run, dict[str, Tensor]]:
    """A run that another model goes on with, and what DeepSpeed's own script makes of the checkpoint in its end."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    engine = _engine(_model(), _config(stage))
    losses = _trained(engine, rank, steps=slice(1))
    engine.save_checkpoint(folder)
    engine = _engine(_model(seed=9), _config(stage))
    _trained(engine, rank, steps=slice(1))
    engine.load_checkpoint(folder)
    losses += _trained(engine, rank, steps=slice(1, None))
    engine.save_checkpoint(folder, tag="end")
    torch.distributed.barrier()
    plain = _Layers()
    plain.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(folder, tag="end"))
    return (losses, _whole(engine.module)), dict(plain.named_parameters())


def _made_in_parts(rank: int) -> Run:
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=_config(3)):
        model = _model()
    engine = _engine(model, _config(3))
    return _trained(engine, rank), _whole(model)


def _message(call: Callable[[], object]) -> str:
    with pytest.raises((ConfigError, ValueError)) as caught:
        call()
    return str(caught.value)


def _convert_in_engine(stage: int, **more: Any) -> None:
    model = _Layers()
    engine = _engine(model, _config(stage, **more))
    convert_model(engine.module, EVERYTHING, backend="cpu")


def _on_ranks(world: Any) -> dict[str, Any]:
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
        False  # gloo serves without it; to compile it takes a minute
    )
    deepspeed.init_distributed("gloo")
    rank = world.rank
    wanted = {
        "plain": _ddp(rank), "autocast": _ddp(rank, autocast=True), "decoder": _ddp(rank, _Decoder),
        "clamped": _ddp(rank, _Clamped),
        "summed_once": _ddp(rank, micro_batches=2), "each_summed": _ddp(rank, micro_batches=2, each_is_summed=True),
    }  # fmt: skip
    runs = {f"stage {stage}": ("plain", _zero(rank, stage)) for stage in range(4)}
    runs |= {f"autocast {stage}": ("autocast", _zero(rank, stage, **AUTOCAST)) for stage in (2, 3)}
    runs |= {f"decoder {stage}": ("decoder", _zero(rank, stage, _Decoder)) for stage in (1, 3)}
    runs["clamped 3"] = "clamped", _zero(rank, 3, _Clamped)
    runs["recomputed 3"] = "plain", _zero(rank, 3, partial(_Layers, recomputed=True))
    runs["accumulated 1"] = "summed_once", _zero(rank, 1, micro_batches=2)
    runs |= {f"accumulated {stage}": ("each_summed", _zero(rank, stage, micro_batches=2)) for stage in (2, 3)}
    runs["made in parts"] = "plain", _made_in_parts(rank)
    exported = {}
    with own_folders(world) as shared:
        for stage in (1, 3):
            run, exported[stage] = _continued(rank, stage, f"{shared}/{stage}")
            runs[f"continued {stage}"] = "plain", run
    return {
        "runs": {name: (wanted[reference], got) for name, (reference, got) in runs.items()},
        "exported": exported,
        **_other_facts(rank),
    }


def _example() -> bool:
    """Whether the README's example changes the weights of a model."""
    (code,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    torch.manual_seed(0)
    model = Bigrams()
    before = model.layers[0].weight.detach().clone()
    exec(compile(code, "README.md", "exec"), {"model": model, "tokens": torch.randint(64, (2, 32))})
    return not torch.equal(_whole(model)["layers.0.weight"], before)


def _other_facts(rank: int) -> dict[str, Any]:
    engine = _engine(_model(), _config(3))
    _trained(engine, rank)
    linears = converted_linears(engine.module)
    return {
        "resident": [name for linear in linears for name in OPERANDS if getattr(linear, name) is not None],
        "example": _example(),
        "messages": {
            "apart": _message(lambda: linears[0].forward(torch.zeros(4, 64))),
            "bf16": _message(lambda: _zero(rank, 2, bf16={"enabled": True})),
            "sent in bf16": _message(lambda: _convert_in_engine(2, **AUTOCAST)),
            "in an engine": _message(lambda: _convert_in_engine(3)),
            "smooth": _message(lambda: _zero(rank, 3, _Smooth)),
        },
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(_on_ranks, 2, tmp_path_factory.mktemp("ranks"))


def _same(wanted: dict[str, Tensor], got: dict[str, Tensor]) -> bool:
    return wanted.keys() == got.keys() and all(torch.equal(got[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("name", RUNS)
def test_losses_and_weights_are_those_of_ddp_bit_for_bit(ranks: list[dict[str, Any]], name: str) -> None:
    for result in ranks:
        (losses, weights), (got_losses, got) = result["runs"][name]
        assert len({float(loss) for loss in losses}) == len(losses) == len(got_losses)
        assert all(map(torch.equal, got_losses, losses)) and _same(weights, got)


def test_example_trains(ranks: list[dict[str, Any]]) -> None:
    assert all(result["example"] for result in ranks)


@pytest.mark.parametrize("stage", [1, 3])
def test_what_zero_to_fp32_exports_is_loaded_by_a_model_that_is_not_converted(
    ranks: list[dict[str, Any]], stage: int
) -> None:
    for result in ranks:
        assert _same(result["runs"][f"continued {stage}"][1][1], result["exported"][stage])


def test_zero_3_keeps_no_codes_between_steps(ranks: list[dict[str, Any]]) -> None:
    assert [result["resident"] for result in ranks] == [[], []]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("apart", "Call the module, not"), ("bf16", "torch_autocast in place of bf16"), ("smooth", "take `smooth` out"),
     ("sent in bf16", "Convert before deepspeed.initialize"), ("in an engine", "Convert first")],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_with_a_remedy(ranks: list[dict[str, Any]], name: str, remedy: str) -> None:
    assert all(remedy in result["messages"][name] for result in ranks)
