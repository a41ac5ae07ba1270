"""Documents that are no recipe: each is refused, in one line that helps."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import yaml

from fp8train.errors import RecipeError
from fp8train.recipe import load_recipe
from tests.recipe_documents import FP8, REST, document
from tests.source_tree import ROOT


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text, "an error is one line"
    assert "needs" in text or "has" in text
    return text


@pytest.mark.parametrize(
    ("doc", "message"),
    [
        pytest.param({"rules": [REST]}, "version is None; needs 1", id="no version"),
        pytest.param({"version": 2, "rules": [REST]}, "version is 2; needs 1", id="other version"),
        pytest.param({"version": True, "rules": [REST]}, "version is True; needs 1", id="version true"),
        pytest.param({"version": 1}, "rules is None; needs a list", id="no rules"),
        pytest.param({"version": 1, "rules": []}, "rules is []; needs a list", id="empty rules"),
        pytest.param(
            document(REST, rule=[]), "'rule' is unknown; needs one of .*; nearest: rules", id="unknown top key"
        ),
        pytest.param(
            document({"matches": "*", "use": "bf16"}), "rule 1: key 'matches' is unknown.*nearest: match", id="rule key"
        ),
        pytest.param(document({"match": "*", "use": "fp9"}), "use is 'fp9'; needs one of .*; nearest: fp8", id="use"),
        pytest.param(document({"use": "bf16"}), "rule 1 has neither of match and layers", id="no selector"),
        pytest.param(
            document({"match": "*", "layers": "first:1", "use": "bf16"}), "has both of match", id="two selectors"
        ),
        pytest.param(
            document({"layers": "first:0", "use": "bf16"}), "layers is 'first:0'; needs first:N", id="layers 0"
        ),
        pytest.param(document({"layers": "middle:2", "use": "bf16"}), "layers is 'middle:2'", id="layers middle"),
        pytest.param(document({"match": "re:(", "use": "bf16"}), "needs a regular expression", id="bad regex"),
        pytest.param(document({"match": 3, "use": "bf16"}), "match is 3; needs a glob", id="match no text"),
        pytest.param(document({**REST, "optional": "yes"}), "optional is 'yes'; needs true or false", id="optional"),
        pytest.param(document("*"), "rule 1 is '[*]'; needs a mapping", id="rule no mapping"),
        pytest.param(
            document(REST, optimizer={"moments": "fp8"}), "moments is 'fp8'; needs fp32 or bf16", id="moments"
        ),
        pytest.param(document(REST, optimizer={"moment": "bf16"}), "nearest: moments", id="optimizer key"),
        pytest.param(document(REST, description=["a"]), "description is", id="description"),
        pytest.param({1: 2, "version": 1}, "key 1 is of type int; needs text", id="key no text"),
        pytest.param([], "is []; needs a mapping", id="no mapping"),
    ],
)
def test_malformed_document_is_refused(doc: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(doc))
    with pytest.raises(RecipeError, match=message.replace("[]", r"\[\]").replace("?", r"\?")) as caught:
        load_recipe(path)
    assert one_line(caught.value).startswith("mine.yaml")


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        pytest.param(
            {"fprop": {"x": "e4m3 1x128", "dy": "e4m3 1x128"}}, "fp8.fprop: key 'dy' is unknown", id="operand"
        ),
        pytest.param({"fwd": FP8["fprop"]}, "precisions.fp8: key 'fwd' is unknown", id="gemm"),
        pytest.param({"fprop": {"x": "e4m4 1x128"}}, "fp8.fprop.x: operand .* format 'e4m4'", id="format"),
        pytest.param({"fprop": {"x": "e4m3 128"}}, "block '128'", id="block"),
        pytest.param({"fprop": {"x": "e4m3 1x128 floor"}}, "scale 'floor'", id="operand scale"),
        pytest.param({"fprop": {"x": None}}, "fp8.fprop.x is None; needs text", id="operand null"),
        pytest.param({"fprop": {}}, "fp8.fprop has no operand", id="no operand"),
        pytest.param({"wgrad": {"source": "dual"}}, "fp8.wgrad has no operand", id="source alone"),
        pytest.param({}, "fp8 has no GEMM", id="no gemm"),
        pytest.param({"scale": "pow2"}, "fp8 has no GEMM", id="scale alone"),
        pytest.param({**FP8, "scale": "ue8m0"}, "fp8.scale is 'ue8m0'; needs pow2 or fp32", id="scale"),
        pytest.param({**FP8, "wgrad": {**FP8["wgrad"], "source": "copy"}}, "source is 'copy'; needs dual", id="source"),
        pytest.param(
            {"wgrad": {**FP8["wgrad"], "source": "requant"}},
            "needs x in FP8 in both fprop and wgrad",
            id="requant of nothing",
        ),
    ],
)
def test_malformed_precision_is_refused(precision: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe({"version": 1, "precisions": {"fp8": precision}, "rules": [REST]})
    one_line(caught.value)


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_builtin_precision_cannot_be_redefined(name: str) -> None:
    with pytest.raises(RecipeError, match=f"precisions.{name} is built in"):
        load_recipe({"version": 1, "precisions": {name: FP8}, "rules": [REST]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("version: 1\nversion: 1\n", "line 2 key 'version' is given twice", id="duplicate key"),
        pytest.param(
            "version: 1\nprecisions:\n  a: {x: 1, x: 2}\n", "line 3 key 'x' is given twice", id="nested duplicate"
        ),
        pytest.param(
            "version: 1\nrules:\n - {match: *lm_head, use: bf16}\n", "undefined alias.*in single quotes", id="bare star"
        ),
        pytest.param("version: [1\n", "needs YAML", id="no YAML"),
        pytest.param("", "is None; needs a mapping", id="empty"),
        pytest.param("a: \x01", "needs YAML", id="control character"),
    ],
)
def test_broken_yaml_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    one_line(caught.value)


def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"version: 1 # \xe9\n")
    for path in (tmp_path / "latin.yaml", tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        one_line(caught.value)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="recipe is 'blokwise'; needs one of bf16, .*; nearest: blockwise"):
        load_recipe("blokwise")


def test_random_documents_never_escape_the_checker() -> None:
    """Whatever a document holds, loading gives a recipe or a RecipeError, nothing else."""
    rng = random.Random(0)
    words = [
        "version",
        "rules",
        "precisions",
        "match",
        "use",
        "layers",
        "fp8",
        "bf16",
        "*",
        "re:[",
        "e4m3 1x128",
        "wgrad",
        "x",
    ]

    def value(depth: int) -> object:
        kind = rng.randrange(7 if depth else 4)
        if kind >= 5:
            return {rng.choice(words): value(depth - 1) for _ in range(rng.randrange(4))}
        return [rng.choice(words), rng.randrange(3), None, True, [value(depth - 1)] if depth else 1.5][kind]

    refused = 0
    for _ in range(2000):
        doc = {"version": 1, "precisions": {"fp8": value(3)}, "rules": [{"match": "*", "use": "fp8"}, value(2)]}
        try:
            load_recipe(doc)
        except RecipeError:
            refused += 1
    assert refused > 1000


def test_documents_in_the_readme_are_accepted_for_this_packages_own_models() -> None:
    text = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.S) if "version:" in block]
    assert blocks
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    layers = [f"layers.{i}.{part}" for i in range(6) for part in parts]
    for prefix in ("", "model."):  # and for those of transformers
        shapes = {f"{prefix}{fqn}": (128, 128) for fqn in layers} | {"lm_head": (128, 128)}
        for block in blocks:
            found = load_recipe(yaml.safe_load(block)).resolve(shapes)
            assert found[f"{prefix}layers.3.self_attn.o_proj"].precision.name == "fp8_fp32_x"
            assert found["lm_head"].precision.name == "bf16"


def test_nothing_is_no_recipe() -> None:
    with pytest.raises(RecipeError, match="recipe is None; needs a name, a path or a document"):
        load_recipe(None)  # type: ignore[arg-type]
