"""convert_model: what it replaces, what it leaves, what it refuses, and that a refusal changes nothing."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8train.backends.coverage import COUNTS
from fp8train.conversion_report import collapse, index_ranges
from fp8train.convert import convert_model
from fp8train.errors import BackendError, ConfigError, RecipeError, UserError
from fp8train.models import ModelConfig, build_model, initialize
from fp8train.nn.linear import Float8Linear
from fp8train.quant.formats import BF16, BLOCKWISE
from fp8train.recipe import available_recipes, load_recipe

FP8 = {
    "fprop": {"x": "e4m3 1x128", "w": "e4m3 128x128"},
    "dgrad": {"dy": "e4m3 1x128", "w": "e4m3 128x128"},
    "wgrad": {"dy": "e4m3 1x128", "x": "e4m3 1x128"},
}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def recipe(*rules: dict) -> dict:
    return {"version": 1, "precisions": {"fp8": FP8}, "rules": list(rules)}


EVERYTHING = recipe({"match": "*", "use": "fp8"})


class Block(nn.Module):
    """An MLP with a router and a bias; the smallest module that has what conversion must respect."""

    keep_high_precision = ("router",)

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 40)
        self.down = nn.Linear(40, 24, bias=False)
        self.router = nn.Linear(24, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x))) * self.router(x).sigmoid().mean(-1, keepdim=True)


class Model(nn.Module):
    def __init__(self, num_layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(num_layers))
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def ours(device: str = "cpu") -> nn.Module:
    config = ModelConfig(
        name="tiny", vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
        max_seq_len=32, qkv_bias=True, qk_norm=True,
    )  # fmt: skip
    return build_model(config, device)


def hf_llama(device: str = "cpu") -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)
    with torch.device(device):
        return transformers.LlamaForCausalLM(config)


def hf_tied_qwen2(device: str = "cpu") -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
    config = transformers.Qwen2Config(**SIZES, tie_word_embeddings=True)
    with torch.device(device):
        return transformers.Qwen2ForCausalLM(config)


BUILDERS = {"ours": ours, "hf_llama": hf_llama, "hf_tied_qwen2": hf_tied_qwen2}


def names_and_identities(model: nn.Module) -> dict[str, int]:
    return {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


# What conversion does


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize("name", available_recipes())
def test_shipped_recipe_converts_without_edits(name: str, build, device: str) -> None:
    model = build(device)
    keys, identities = list(model.state_dict()), names_and_identities(model)
    report = convert_model(model, name, backend="cpu_torch")
    assert list(model.state_dict()) == keys
    assert names_and_identities(model) == identities
    assert all(type(module) is Float8Linear for module in model.modules() if isinstance(module, nn.Linear))
    by_name = {row.fqn: row for row in report.rows}
    assert len(by_name) == 2 * 7 + 1
    assert by_name["lm_head"].planned("fprop") == ("fp32" if name == "fp32" else "bf16")
    inside = {row.planned("fprop") for fqn, row in by_name.items() if fqn != "lm_head"}
    assert inside == {{"bf16": "bf16", "placebo": "bf16", "fp32": "fp32"}.get(name, "fp8")}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_converted_model_trains(build) -> None:
    torch.manual_seed(0)
    model = build()
    if build is ours:
        initialize(model, seed=1)
    convert_model(model, "blockwise", backend="cpu_torch")
    tokens = torch.randint(0, 64, (2, 16))
    loss = model(tokens, tokens) if build is ours else model(tokens, labels=tokens).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in model.parameters())


def test_fp32_recipe_changes_no_number() -> None:
    torch.manual_seed(0)
    model = hf_llama().eval()
    tokens = torch.randint(0, 64, (2, 16))
    before = model(tokens).logits
    convert_model(model, "fp32", backend="cpu_torch")
    # FP32 sums of K <= 48 terms in another order: n * 2^-24 relative to logits of order 1
    torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=48 * 2**-24)


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


def test_linears_share_one_input_cache(model: Model) -> None:
    convert_model(model, EVERYTHING, backend="cpu_torch")
    assert len({id(module.inputs) for module in model.modules() if isinstance(module, Float8Linear)}) == 1


def test_tied_weights_stay_tied() -> None:
    model = hf_tied_qwen2()
    convert_model(model, "blockwise", backend="cpu_torch")
    assert model.lm_head.weight is model.model.embed_tokens.weight


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
    second = convert_model(model, recipe({"match": "*up", "use": "fp8"}, {"match": "*", "use": "bf16"}), backend="cpu")
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


def test_eight_billion_parameters_are_laid_out_without_memory() -> None:
    config = ModelConfig(
        name="8b", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
        num_kv_heads=8, max_seq_len=8192,
    )  # fmt: skip
    report = convert_model(build_model(config, "meta"), "blockwise")
    assert len(report.rows) == 32 * 7 + 1
    layer = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096
    head = 128256 * 4096
    assert report.planned_fp8_share() == pytest.approx(32 * layer / (32 * layer + head), rel=1e-12)
    assert sum(row.master_bytes for row in report.rows) == 4 * (32 * layer + head)


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
    rows = {row.fqn: row for row in convert_model(model, recipe(*rules), backend="cpu_torch").rows}
    assert rows["layers.1.router"].precision == router
    if router == "bf16":
        assert "Block.keep_high_precision keeps it in BF16" in rows["layers.1.router"].reason


def test_decoder_keeps_its_lm_head() -> None:
    rows = {row.fqn: row.precision for row in convert_model(ours(), EVERYTHING, backend="cpu_torch").rows}
    assert rows["lm_head"] == "bf16" and rows["layers.0.mlp.up_proj"] == "fp8"


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


def _hook(model: Model) -> None:
    model.head.register_forward_hook(lambda *_: None)


def _backward_hook(model: Model) -> None:
    model.head.register_full_backward_hook(lambda *_: None)


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
        pytest.param(_hook, "'head' carries forward hooks; needs a bare nn.Linear.*Convert first", id="hook"),
        pytest.param(_backward_hook, "'head' carries backward hooks", id="backward hook"),
        pytest.param(_patched_forward, "'head' carries a forward of its own", id="patched forward"),
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
        pytest.param(recipe({"match": "layers.*", "use": "fp8"}), {}, RecipeError, id="linear without a rule"),
        pytest.param(recipe({"match": "*q", "use": "fp8"}, {"match": "*", "use": "bf16"}), {}, RecipeError, id="rule"),
        pytest.param(EVERYTHING, {"backend": "abacus"}, BackendError, id="unknown backend"),
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
    document = recipe({"match": "layers.0.*", "use": "fp8"}, {"match": "*", "use": "bf16"})
    with pytest.raises(RecipeError, match="'layers.0.up' and 'layers.1.up' are one module"):
        convert_model(model, document)


def test_subclass_is_left_as_it_is_where_its_rule_says_bf16(model: Model) -> None:
    model.head = own = Own(24, 10)
    report = convert_model(model, recipe({"match": "head", "use": "bf16"}, {"match": "*", "use": "fp8"}), "cpu_torch")
    assert model.head is own
    row = report.rows[-1]
    assert (row.precision, row.planned("fprop"), row.backend, row.site) == ("as is", "as is", "torch", 0)
    assert "a Own is left as it is" in row.reason


def test_attention_module_of_torch_is_not_half_converted() -> None:
    """nn.MultiheadAttention reads out_proj.weight without calling it: a swap would have no effect, so it is refused."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "mlp": nn.Linear(8, 8)})
    with pytest.raises(RecipeError, match="'attention.out_proj' is a .*NonDynamicallyQuantizableLinear"):
        convert_model(model, EVERYTHING, backend="cpu_torch")
    assert type(model["mlp"]) is nn.Linear


# Report


@pytest.mark.parametrize("name", available_recipes())
def test_bytes_in_the_report_are_those_of_the_buffers(name: str) -> None:
    model = Model()
    model.lm_head = model.head
    del model.head
    report = convert_model(model, name, backend="cpu_torch")
    for row in report.rows:
        linear = model.get_submodule(row.fqn)
        buffers = dict(linear.named_buffers())
        scales = sum(b.numel() * b.element_size() for key, b in buffers.items() if "scale" in key and b is not None)
        codes = sum(b.numel() * b.element_size() for key, b in buffers.items() if "scale" not in key and b is not None)
        assert (row.code_bytes, row.scale_bytes) == (codes, scales), row.fqn
        assert row.master_bytes == sum(p.numel() * p.element_size() for p in linear.parameters())


def test_coverage_counts_what_ran(model: Model) -> None:
    report = convert_model(model, EVERYTHING, backend="cpu_torch")
    COUNTS.reset()
    model(torch.randn(5, 24)).sum().backward()
    coverage = report.coverage()
    linears = {entry["fqn"]: entry for entry in coverage["linears"]}
    up, router = linears["layers.1.up"]["gemms"], linears["layers.1.router"]["gemms"]
    counted = {"fp8_calls": 1, "other_calls": 0, "fp8_rows": 5, "other_rows": 0}
    assert up["wgrad"] == {"planned": "fp8", **counted, "exception": None}
    assert router["fprop"].pop("exception").startswith("bf16: Block.keep_high_precision")
    assert router["fprop"] == {"planned": "bf16", "fp8_calls": 0, "other_calls": 1, "fp8_rows": 0, "other_rows": 5}
    fp8 = 3 * 2 * (2 * 24 * 40 + 2 * 24 * 40 + 24 * 10)  # two blocks (up, down) and the head
    fp8 -= 2 * 24 * 40  # the input of the first layer has no gradient, so its up runs no dgrad
    other = 3 * 2 * 2 * 24 * 3 - 2 * 24 * 3
    assert coverage["fp8_flops_share"] == pytest.approx(fp8 / (fp8 + other), rel=1e-12)
    COUNTS.reset()
    assert report.coverage()["fp8_flops_share"] == 0
    json.dumps(coverage, allow_nan=False)


def test_report_is_plain_data(model: Model) -> None:
    report = convert_model(model, "bf16", backend="cpu_torch")
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["recipe_hash"] == load_recipe("bf16").hash
    first = document["linears"][0]
    assert (first["fqn"], first["shape"], first["fprop"]) == ("layers.0.up", [40, 24], "bf16")


def test_row_names_the_operands(model: Model) -> None:
    row = convert_model(model, EVERYTHING, backend="cpu_torch").rows[0]
    assert (row.fprop, row.dgrad, row.wgrad) == tuple(BLOCKWISE.describe(gemm) for gemm in ("fprop", "dgrad", "wgrad"))
    assert (row.out_features, row.in_features, row.precision, row.rule) == (40, 24, "fp8", "1: *")


def test_matrices_outside_linears_are_listed() -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3), "embed": nn.Embedding(4, 4), "out": nn.Linear(4, 4)})
    assert convert_model(model, EVERYTHING, backend="cpu_torch").others == (("conv", "Conv1d"),)


def test_table_joins_layers_that_are_alike() -> None:
    model = Model(num_layers=12)
    document = recipe(
        {"layers": "first:1", "use": "bf16"}, {"layers": "last:2", "use": "bf16"}, {"match": "*", "use": "fp8"}
    )
    report = convert_model(model, document, backend="cpu_torch")
    labels = {label: count for label, count, _ in collapse(report.rows)}
    assert labels["layers.0.up"] == 1 and labels["layers.{1..9}.up"] == 9 and labels["layers.{10,11}.up"] == 2
    assert sum(labels.values()) == len(report.rows)
    assert len(report.table(every=True).splitlines()) == len(report.rows) + 1


def test_table_joins_experts_and_layers() -> None:
    experts = nn.ModuleList(
        nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(8))}) for _ in range(3)
    )
    report = convert_model(nn.ModuleDict({"layers": experts}), EVERYTHING, backend="cpu_torch")
    assert [(label, count) for label, count, _ in collapse(report.rows)] == [("layers.{0..2}.experts.{0..7}", 24)]


@pytest.mark.parametrize(
    ("indices", "text"), [([0], "{0}"), ([3, 2], "{2,3}"), ([0, 1, 2], "{0..2}"), ([0, 2, 3, 4, 9], "{0,2..4,9}")]
)
def test_index_ranges(indices: list[int], text: str) -> None:
    assert index_ranges(indices) == text


def test_converted_model_can_be_copied(model: Model) -> None:
    convert_model(model, EVERYTHING, backend="cpu_torch")
    twin = copy.deepcopy(model)
    x = torch.randn(3, 24)
    assert torch.equal(twin(x), model(x))
