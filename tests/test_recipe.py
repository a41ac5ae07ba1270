"""Recipes: what their documents mean, which rule decides for a linear, and what the hash follows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fp8train.errors import RecipeError
from fp8train.quant.formats import BF16, BLOCKWISE, FP32, QuantSpec
from fp8train.recipe import available_recipes, layer_positions, load_recipe, nearest_paths
from tests.recipe_documents import FP8, REST, document

NUM_LAYERS = 4
LINEARS = {
    f"model.layers.{index}.{name}": (256, 128)
    for index in range(NUM_LAYERS)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate", "mlp.down_proj")
} | {"lm_head": (1000, 128)}


def resolve(*rules: dict, keep: dict[str, str] | None = None) -> dict[str, str]:
    assigned = load_recipe(document(*rules)).resolve(LINEARS, keep)
    return {fqn: assignment.precision.name for fqn, assignment in assigned.items()}


# What a document means


def test_shipped_recipes_are_those_of_the_issue() -> None:
    expected = {"bf16", "blockwise", "deepseek_v3", "fp32", "infir2", "rowwise", "tensorwise", "wgrad_bf16"}
    assert expected <= set(available_recipes())


@pytest.mark.parametrize("name", available_recipes())
def test_shipped_recipe_has_a_source_in_the_readme(name: str) -> None:
    readme = (Path(__file__).parents[1] / "recipes" / "README.md").read_text()
    assert f"| `{name}` |" in readme


def test_blockwise_is_the_default_precision_of_the_linear() -> None:
    assert load_recipe("blockwise").precisions["fp8"] == BLOCKWISE


def test_builtin_precisions_are_bf16_and_fp32() -> None:
    precisions = load_recipe({"version": 1, "rules": [{"match": "*", "use": "bf16"}]}).precisions
    assert precisions == {"bf16": BF16, "fp32": FP32}


def test_deepseek_v3_scales_are_fp32_but_for_the_inputs_that_the_paper_names() -> None:
    linears = {
        "layers.0.self_attn.q_proj": (128, 128),
        "layers.0.self_attn.o_proj": (128, 128),
        "layers.0.mlp.experts.7.up_proj": (128, 128),
        "layers.0.mlp.experts.7.down_proj": (128, 128),
        "layers.0.mlp.gate": (8, 128),
    }
    recipe = load_recipe("deepseek_v3")
    by_name = {fqn.split(".")[-1]: assigned.precision for fqn, assigned in recipe.resolve(linears).items()}

    def kinds(name: str) -> tuple[str, ...]:
        gemms = by_name[name].gemms.values()
        return tuple(operand.scale for gemm in gemms for operand in (gemm.left, gemm.right) if operand is not None)

    assert kinds("q_proj") == ("fp32",) * 6
    assert (
        kinds("o_proj") == kinds("up_proj") == ("pow2", "fp32", "fp32", "fp32", "fp32", "pow2")
    )  # x of fprop and wgrad
    assert kinds("down_proj") == ("fp32", "fp32", "pow2", "fp32", "pow2", "fp32")  # dy of dgrad and wgrad
    assert by_name["gate"] is BF16
    assert {by_name[name].wgrad_source for name in ("q_proj", "o_proj", "up_proj", "down_proj")} == {"requant"}
    assert recipe.moments == "bf16"


def test_operand_may_carry_its_own_scale() -> None:
    doc = document({"match": "*", "use": "mixed"})
    doc["precisions"] = {"mixed": {"fprop": {"x": "e4m3 1x128 fp32", "w": "e4m3 128x128"}, "scale": "pow2"}}
    fprop = load_recipe(doc).precisions["mixed"].fprop
    assert (fprop.left, fprop.right) == (QuantSpec.parse("e4m3 1x128 fp32"), QuantSpec.parse("e4m3 128x128 pow2"))


def test_scale_is_pow2_unless_the_document_says_otherwise() -> None:
    assert load_recipe(document({"match": "*", "use": "fp8"})).precisions["fp8"].wgrad.right.scale == "pow2"


def test_gemm_left_out_runs_in_bf16_and_operand_left_out_stays_bf16() -> None:
    doc = document({"match": "*", "use": "partial"})
    doc["precisions"] = {"partial": {"fprop": {"w": "e4m3 128x128"}, "dgrad": FP8["dgrad"]}}
    precision = load_recipe(doc).precisions["partial"]
    assert (precision.fprop.fp8, precision.dgrad.fp8, precision.wgrad.fp8) == (False, True, False)
    assert precision.fprop.left is None and precision.fprop.right == QuantSpec.parse("e4m3 128x128")
    assert precision.high is torch.bfloat16


# Which rule decides


@pytest.mark.parametrize(
    ("rules", "fp8"),
    [
        pytest.param([{"match": "*q_proj", "use": "fp8"}], lambda fqn: fqn.endswith("q_proj"), id="glob spans dots"),
        pytest.param([{"match": "model.layers.[01].*", "use": "fp8"}], lambda fqn: fqn[13:14] in "01", id="glob class"),
        pytest.param(
            [{"match": r"re:.*\.(q|o)_proj", "use": "fp8"}], lambda fqn: fqn[-6:-4] in ("q_", "o_"), id="regex"
        ),
        pytest.param([{"layers": "first:1", "use": "fp8"}], lambda fqn: ".0." in fqn, id="first layers"),
        pytest.param([{"layers": "last:2", "use": "fp8"}], lambda fqn: ".2." in fqn or ".3." in fqn, id="last layers"),
        pytest.param(
            [{"match": "*q_proj", "use": "bf16"}, {"match": "*layers.*", "use": "fp8"}],
            lambda fqn: "layers" in fqn and "q_proj" not in fqn,
            id="first match wins",
        ),
    ],
)
def test_rules_select(rules: list[dict], fp8) -> None:
    chosen = resolve(*rules, {"match": "*", "use": "bf16"})
    assert {fqn for fqn, name in chosen.items() if name == "fp8"} == {
        fqn for fqn in LINEARS if fp8(fqn) and fqn != "lm_head"
    }


def test_glob_and_regex_match_the_whole_path() -> None:
    rest = {"match": "*", "use": "bf16"}
    for pattern in ("q_proj", "model.layers.0", "re:q_proj", r"re:model\.layers"):
        with pytest.raises(RecipeError, match="matches none of the 17 linears"):
            resolve({"match": pattern, "use": "fp8"}, rest)


@pytest.mark.parametrize(
    ("path", "position"),
    [
        ("model.layers.3.mlp.up_proj", (3, 4)),
        ("transformer.h.0.attn.c_proj", (0, 1)),
        ("blocks.11.ff.experts.2.w1", (11, 12)),
        ("encoder.layer.1.attention.query", (1, 2)),
        ("layers.0", (0, 1)),
        ("lm_head", None),
        ("experts.3.w1", None),
        ("sublayers.3.w1", None),
    ],
)
def test_layer_index_is_read_from_the_path(path: str, position: tuple[int, int] | None) -> None:
    assert layer_positions([path]) == {path: position}


def test_encoder_and_decoder_layers_are_counted_apart() -> None:
    positions = layer_positions(["encoder.layers.1.a", "decoder.layers.5.a"])
    assert positions == {"encoder.layers.1.a": (1, 2), "decoder.layers.5.a": (5, 6)}


def test_rule_whose_matches_are_taken_by_earlier_rules_is_no_error() -> None:
    chosen = resolve(
        {"match": "*layers.*", "use": "fp8"}, {"match": "*q_proj", "use": "fp8"}, {"match": "*", "use": "bf16"}
    )
    assert set(chosen.values()) == {"fp8", "bf16"}


@pytest.mark.parametrize(
    ("pattern", "precision"),
    [
        ("*", "bf16"),
        ("model.layers.0.mlp.*", "bf16"),
        (r"re:.*layers\.\d+\.mlp\..*", "bf16"),
        (r"re:.*\.[a-z_]+", "bf16"),
        ("*gate", "fp8"),
        ("model.layers.?.mlp.gate", "fp8"),
        (r"re:.*\.(gate|down_proj)", "fp8"),
    ],
)
def test_only_a_rule_that_names_a_kept_module_overrides_its_model_class(pattern: str, precision: str) -> None:
    gate = "model.layers.0.mlp.gate"
    rules = {"match": pattern, "use": "fp8"}, {"match": "*", "use": "bf16"}
    assert resolve(*rules, keep={gate: "MoE.keep_high_precision"})[gate] == precision
    assert resolve(*rules)[gate] == "fp8", "without the declaration the rule holds"


def test_layers_rule_does_not_override_a_model_class() -> None:
    gate = "model.layers.0.mlp.gate"
    chosen = resolve({"layers": "first:1", "use": "fp8"}, {"match": "*", "use": "bf16"}, keep={gate: "MoE"})
    assert chosen[gate] == "bf16" and chosen["model.layers.0.mlp.down_proj"] == "fp8"


def test_kept_module_stays_in_fp32_under_fp32() -> None:
    recipe = load_recipe("fp32")
    assert recipe.resolve(LINEARS, {"lm_head": "Decoder"})["lm_head"].precision is FP32


def test_assignment_says_which_rule_decided_and_why() -> None:
    recipe = load_recipe(document({"match": "*", "use": "fp8"}))
    assigned = recipe.resolve(LINEARS, {"lm_head": "Decoder.keep_high_precision"})
    assert assigned["model.layers.0.mlp.gate"].rule == "1: *"
    assert "says fp8" in assigned["model.layers.0.mlp.gate"].reason
    assert "Decoder.keep_high_precision keeps it in BF16" in assigned["lm_head"].reason


# Hash and text


@pytest.mark.parametrize("name", available_recipes())
def test_canonical_text_loads_to_the_same_hash(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.text)
    again = load_recipe(path)
    assert (again.hash, again.text, again.precisions) == (recipe.hash, recipe.text, recipe.precisions)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("version: 1\n", "# a comment\nversion:   1\ndescription: words\n", id="comment and description"),
        pytest.param("use: fp8}", "use: 'fp8', optional: false}", id="quotes and defaults"),
        pytest.param("x: e4m3 1x128, w", "x: e4m3 1x128 pow2, w", id="scale spelled out"),
        pytest.param("    scale: pow2\n", "", id="default scale"),
        pytest.param("{x: e4m3 1x128, w: e4m3 128x128}", "{w: e4m3 128x128, x: e4m3 1x128}", id="key order"),
    ],
)
def test_hash_ignores_spelling(old: str, new: str, tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "recipes" / "blockwise.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new))
    assert path.read_text() != text
    assert load_recipe(path).hash == load_recipe("blockwise").hash


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("scale: pow2", "scale: fp32", id="scale"),
        pytest.param("source: dual", "source: requant", id="source"),
        pytest.param("e4m3 128x128", "e4m3 tensor", id="block"),
        pytest.param('"*layers.*"', '"*layers.?.*"', id="pattern"),
        pytest.param('"*", use: bf16', '"*", use: fp32', id="use"),
        pytest.param("version: 1", "version: 1\noptimizer: {moments: bf16}", id="moments"),
    ],
)
def test_hash_follows_meaning(old: str, new: str, tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "recipes" / "blockwise.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new))
    assert load_recipe(path).hash != load_recipe("blockwise").hash


def test_hash_ignores_the_order_of_precisions() -> None:
    forward = {"fp8": FP8, "weights": {"fprop": {"w": "e4m3 128x128"}}}
    backward = dict(reversed(forward.items()))
    first, second = ({"version": 1, "precisions": order, "rules": [REST]} for order in (forward, backward))
    assert load_recipe(first).hash == load_recipe(second).hash


def test_hash_follows_the_order_of_rules() -> None:
    first, second = {"match": "*q_proj", "use": "bf16"}, {"match": "*layers.*", "use": "fp8"}
    assert load_recipe(document(first, second)).hash != load_recipe(document(second, first)).hash


# Rules that do not fit the model


@pytest.mark.parametrize("optional", [False, True])
def test_rule_that_matches_nothing_is_an_error_unless_optional(optional: bool) -> None:
    rules = {"match": "*q_prj", "use": "fp8", "optional": optional}, REST
    if optional:
        assert set(resolve(*rules).values()) == {"bf16"}
        return
    with pytest.raises(
        RecipeError, match="rule 1 '[*]q_prj' matches none .*Closest module paths: model.layers.0.self_attn.q_proj"
    ):
        resolve(*rules)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ([{"match": "*layers.*", "use": "fp8"}, {"match": "*down_proj", "use": "bf16"}], "rule 2 '[*]down_proj'"),
        ([{"match": "*", "use": "bf16"}, {"match": "*layers.*", "use": "fp8"}], "rule 2 '[*]layers.[*]'"),
        (
            [{"match": "*q_proj", "use": "fp8"}, {"match": "*o_proj", "use": "bf16"}, {"match": "re:.*[qo]_proj",
             "use": "bf16"}],
            "rule 3 .* says bf16 and decides no linear: .* rule 1 '[*]q_proj' says fp8 of 'model.layers.0.self_attn.q_",
        ),
    ],
    ids=["layers before a linear", "all before layers", "in parts"],
)  # fmt: skip
def test_rule_that_earlier_ones_contradict_is_an_error_unless_optional(rules: list[dict], says: str) -> None:
    with pytest.raises(RecipeError, match=f"{says}.*The first rule that matches decides: move it up"):
        resolve(*rules, REST)
    resolve(*rules[:-1], rules[-1] | {"optional": True}, REST)


@pytest.mark.parametrize(
    "rules",
    [
        [{"match": "*q_proj", "use": "bf16"}, {"match": "*layers.0.self_attn.q_proj", "use": "bf16"}],
        [{"match": "*layers.0.*", "use": "bf16"}, {"match": "*q_proj", "use": "fp8"}],
    ],
    ids=["nothing else", "in part"],
)
def test_rule_that_says_the_same_or_decides_some_linears_may_stand_behind(rules: list[dict]) -> None:
    resolve(*rules, REST)


def test_nearest_path_is_the_one_with_the_indices_that_were_meant() -> None:
    assert nearest_paths("model.layers.1.mlp.dwn_proj", LINEARS)[0] == "model.layers.1.mlp.down_proj"


def test_layers_rule_without_layers_is_an_error() -> None:
    with pytest.raises(RecipeError, match="matches none"):
        load_recipe(document({"layers": "first:1", "use": "fp8"}, REST)).resolve({"head": (8, 8)})


def test_more_layers_than_the_model_has_is_an_error() -> None:
    with pytest.raises(RecipeError, match="asks for 5 layers; the model has 4. Lower the number"):
        resolve({"layers": "last:5", "use": "fp8"}, REST)


def test_linear_without_a_rule_is_an_error_that_names_it() -> None:
    with pytest.raises(RecipeError, match="linear 'lm_head' has no rule; every linear needs one"):
        resolve({"match": "*layers.*", "use": "fp8"})
