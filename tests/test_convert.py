"""convert_model: what it replaces, what it leaves, what it refuses, and that a refusal changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fp8train.convert import convert_model
from fp8train.errors import BackendError, ConfigError, RecipeError, UserError
from fp8train.nn.linear import Float8Linear
from fp8train.quant.formats import BF16
from tests.convertible_model import EVERYTHING, Block, Model, names_and_identities
from tests.recipe_documents import document, rows_everywhere


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


# What conversion does


def test_fp8_recipe_changes_numbers_a_little() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    x = torch.randn(64, 24)
    before = model(x)
    convert_model(model, EVERYTHING, backend="cpu_torch")
    error = (model(x) - before).norm() / before.norm()
    # one E4M3 GEMM of N(0,1) data costs 10^(-28.5/20) = 3.8 %; a few of them in a row, some on the residual branch only
    assert 0.005 < error < 0.1


def test_parameters_and_their_state_stay(model: Model) -> None:
    model.layers[0].up.weight.requires_grad_(False)
    model.layers[1].eval()
    model.head.mark = "set by somebody"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    identities = names_and_identities(model)
    convert_model(model, EVERYTHING, backend="cpu_torch")
    assert names_and_identities(model) == identities
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.layers[0].up.weight.requires_grad
    assert model.layers[0].up.training and not model.layers[1].up.training
    assert model.head.mark == "set by somebody"


def test_what_else_refers_to_a_linear_has_the_converted_one_and_hooks_stay(model: Model) -> None:
    calls: list[str] = []
    beside = model.beside = [model.head]
    model.head.register_forward_hook(lambda *_: calls.append("forward"))
    model.head.register_full_backward_hook(lambda *_: calls.append("backward"))
    model.head.register_load_state_dict_post_hook(lambda *_: calls.append("load"))
    convert_model(model, EVERYTHING, backend="cpu_torch")
    assert beside[0] is model.head and type(model.head) is Float8Linear
    model(torch.randn(6, 24)).sum().backward()
    assert calls == ["forward", "backward"]
    with torch.no_grad():
        expected = model.layers[0].up(torch.ones(1, 24))
        model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
        assert calls[2:] == ["load"] and not torch.equal(model.layers[0].up(torch.ones(1, 24)), expected)


def test_linears_share_one_input_cache(model: Model) -> None:
    convert_model(model, EVERYTHING, backend="cpu_torch")
    assert len({id(module.inputs) for module in model.modules() if isinstance(module, Float8Linear)}) == 1


def test_shared_module_is_converted_once(model: Model) -> None:
    model.layers[1].up = model.layers[0].up
    report = convert_model(model, EVERYTHING, backend="cpu_torch")
    assert model.layers[0].up is model.layers[1].up
    assert type(model.layers[0].up) is Float8Linear
    row = report.rows[0]
    assert (row.fqn, row.other_names) == ("layers.0.up", ("layers.1.up",))
    assert len(report.rows) == 6


def test_shared_block_is_converted_once(model: Model) -> None:
    model.layers.append(model.layers[0])
    report = convert_model(model, EVERYTHING, backend="cpu_torch")
    assert model.layers[2].up is model.layers[0].up
    assert report.rows[0].other_names == ("layers.2.up",)


def test_second_conversion_changes_precisions_and_no_module(model: Model) -> None:
    first = convert_model(model, EVERYTHING, backend="cpu_torch")
    modules = {name: id(module) for name, module in model.named_modules()}
    second = convert_model(
        model, document({"match": "*up", "use": "fp8"}, {"match": "*", "use": "bf16"}), backend="cpu"
    )
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert model.layers[0].up.precision.any_fp8 and model.layers[0].down.precision == BF16
    assert model.layers[0].down.w_qdata is None, "codes of the former precision are gone"
    assert model.layers[0].up.backend_name == "cpu" and model.layers[0].up.plan.backend == "cpu"
    assert [row.site for row in first.rows] == [row.site for row in second.rows]


def test_linear_added_later_joins_the_converted_ones(model: Model) -> None:
    convert_model(model, EVERYTHING, backend="cpu_torch")
    model.extra = nn.Linear(24, 8)
    convert_model(model, EVERYTHING, backend="cpu_torch")
    assert type(model.extra) is Float8Linear and model.extra.inputs is model.head.inputs


def test_weights_follow_the_optimizer_after_conversion(model: Model) -> None:
    convert_model(model, EVERYTHING, backend="cpu_torch")
    codes = model.head.w_qdata.clone()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not torch.equal(model.head.w_qdata.view(torch.uint8), codes.view(torch.uint8))


def test_converted_model_can_be_copied(model: Model) -> None:
    convert_model(model, EVERYTHING, backend="cpu_torch")
    twin = copy.deepcopy(model)
    x = torch.randn(3, 24)
    assert torch.equal(twin(x), model(x))


# keep_high_precision


@pytest.mark.parametrize(
    ("rules", "router"),
    [
        pytest.param([{"match": "*", "use": "fp8"}], "bf16", id="catch-all"),
        pytest.param([{"match": "layers.*", "use": "fp8"}, {"match": "*", "use": "bf16"}], "bf16", id="covers"),
        pytest.param([{"match": "*router", "use": "fp8"}, {"match": "*", "use": "bf16"}], "fp8", id="names"),
    ],
)
def test_model_class_keeps_its_router_unless_a_rule_names_it(model: Model, rules: list[dict], router: str) -> None:
    rows = {row.fqn: row for row in convert_model(model, document(*rules), backend="cpu_torch").rows}
    assert rows["layers.1.router"].precision == router
    if router == "bf16":
        assert "Block.keep_high_precision keeps it in BF16" in rows["layers.1.router"].reason


def test_keep_high_precision_that_is_text_is_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Block, "keep_high_precision", "router")
    with pytest.raises(ConfigError, match="Block.keep_high_precision is 'router'; needs a tuple of globs"):
        convert_model(model, EVERYTHING)


# Refusals change nothing


class Own(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def _half(model: Model) -> None:
    model.head.to(torch.bfloat16)


def _kept_forward(model: Model) -> None:
    model.call = model.head.forward


def _patched_forward(model: Model) -> None:
    model.head.forward = lambda x: x


def _buffer(model: Model) -> None:
    model.head.register_buffer("mask", torch.ones(1))


def _extra_parameter(model: Model) -> None:
    model.head.gain = nn.Parameter(torch.ones(1))


def _taken_name(model: Model) -> None:
    model.head.site = 3


def _subclass(model: Model) -> None:
    model.head = Own(24, 10)


def _parametrized(model: Model) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.head)


def _lazy(model: Model) -> None:
    model.head = nn.LazyLinear(10)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(_half, "head.weight is torch.bfloat16; needs torch.float32.*model.float", id="dtype"),
        pytest.param(_kept_forward, "'call' of 'the model' is the forward of 'head' as nn.Linear", id="method"),
        pytest.param(
            _patched_forward,
            "'head' carries a forward of its own; needs a bare nn.Linear.*Convert first",
            id="patched forward",
        ),
        pytest.param(_buffer, "'head' carries buffer 'mask'", id="buffer"),
        pytest.param(_extra_parameter, "'head' carries parameter 'gain'", id="parameter"),
        pytest.param(_taken_name, "'head' has an attribute 'site' of its own", id="attribute"),
        pytest.param(
            _subclass, "'head' is a tests.test_convert.Own, a subclass of nn.Linear.*use: bf16", id="subclass"
        ),
        pytest.param(_parametrized, "'head' is a .*ParametrizedLinear, a subclass", id="parametrized"),
        pytest.param(_lazy, "'head' is a .*LazyLinear, a subclass", id="lazy"),
    ],
)
def test_linear_that_a_replacement_would_harm_is_refused_and_nothing_is_changed(
    model: Model, spoil, message: str
) -> None:
    spoil(model)
    before, hooks = kinds(model), len(model._forward_pre_hooks)
    with pytest.raises(UserError, match=message) as caught:
        convert_model(model, EVERYTHING, backend="cpu_torch")
    assert "\n" not in str(caught.value)
    assert kinds(model) == before and len(model._forward_pre_hooks) == hooks


@pytest.mark.parametrize(
    ("document", "options", "error"),
    [
        pytest.param(document({"match": "layers.*", "use": "fp8"}), {}, RecipeError, id="linear without a rule"),
        pytest.param(
            document({"match": "*q", "use": "fp8"}, {"match": "*", "use": "bf16"}), {}, RecipeError, id="rule"
        ),
        pytest.param(EVERYTHING, {"backend": "abacus"}, BackendError, id="unknown backend"),
        pytest.param(
            EVERYTHING
            | {"precisions": EVERYTHING["precisions"] | rows_everywhere()["precisions"]}
            | {"schedule": [{"at": 0.9, "use": "rows"}]},
            {"backend": "deepgemm", "device_type": "sm_90"},
            BackendError,
            id="backend that the schedule does not fit",
        ),
    ],
)
def test_recipe_or_backend_that_does_not_fit_changes_nothing(
    model: Model, document: dict, options: dict, error: type[Exception]
) -> None:
    before = kinds(model)
    with pytest.raises(error):
        convert_model(model, document, **options)
    assert kinds(model) == before


def test_second_conversion_that_is_refused_changes_nothing(model: Model) -> None:
    convert_model(model, EVERYTHING, backend="cpu_torch")
    model.extra = nn.Linear(24, 8, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="extra.weight is torch.bfloat16"):
        convert_model(model, "bf16", backend="cpu_torch")
    assert model.head.precision.any_fp8 and type(model.extra) is nn.Linear


@pytest.mark.parametrize("root", [nn.Linear(4, 4), Own(4, 4)], ids=["linear", "subclass"])
def test_root_linear_is_refused(root: nn.Linear) -> None:
    with pytest.raises(ConfigError, match="the model itself is a .*Pass nn.Sequential"):
        convert_model(root, EVERYTHING)


def test_model_without_linears_is_refused() -> None:
    with pytest.raises(ConfigError, match="LayerNorm has no nn.Linear"):
        convert_model(nn.LayerNorm(4), EVERYTHING)


def test_shared_module_with_two_precisions_is_refused(model: Model) -> None:
    model.layers[1].up = model.layers[0].up
    rules = {"match": "layers.0.*", "use": "fp8"}, {"match": "*", "use": "bf16"}
    with pytest.raises(RecipeError, match="'layers.0.up' and 'layers.1.up' are one module"):
        convert_model(model, document(*rules))


def test_subclass_is_left_as_it_is_where_its_rule_says_bf16(model: Model) -> None:
    model.head = own = Own(24, 10)
    report = convert_model(model, document({"match": "head", "use": "bf16"}, {"match": "*", "use": "fp8"}), "cpu_torch")
    assert model.head is own
    row = report.rows[-1]
    assert (row.precision, row.planned("fprop"), row.backend, row.site) == ("as is", "as is", "torch", 0)
    assert "a Own is left as it is" in row.reason


def test_attention_module_of_torch_is_not_half_converted() -> None:
    """nn.MultiheadAttention reads out_proj.weight without calling it: a swap would have no effect."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "mlp": nn.Linear(8, 8)})
    model["attention"].out_proj = nn.Linear(8, 8)
    report = convert_model(model, EVERYTHING, backend="cpu_torch")
    assert type(model["attention"].out_proj) is nn.Linear and type(model["mlp"]) is Float8Linear
    assert [row.precision for row in report.rows] == ["as is", "fp8"]


class Initialised(nn.Linear):
    """nn.Linear in all but its beginning."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        nn.init.ones_(self.weight)


def test_a_subclass_that_adds_no_more_than_a_beginning_is_converted(model: Model) -> None:
    model.head = Initialised(24, 10)
    convert_model(model, EVERYTHING, backend="cpu_torch")
    assert type(model.head) is Float8Linear and float(model.head.weight.detach().sum()) == 240


def test_subclasses_are_refused_all_at_once_with_globs(model: Model) -> None:
    model.head = Own(24, 10)
    for layer in model.layers:
        layer.up = Own(24, 40)
    pattern = r"'layers.0.up', 'layers.1.up', 'head' are tests.test_convert.Own, .*'layers.\*.up', use.*'head', use"
    with pytest.raises(RecipeError, match=pattern):
        convert_model(model, EVERYTHING, backend="cpu_torch")


def test_an_encoder_of_torch_is_converted_but_for_what_its_attention_reads() -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    report = convert_model(model, EVERYTHING, backend="cpu_torch")
    assert [row.precision for row in report.rows] == 2 * ["as is", "fp8", "fp8"]
    assert "reads its weight and does not call it" in report.rows[0].reason
    model(torch.randn(2, 5, 32)).sum().backward()
