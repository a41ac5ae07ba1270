from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import nn

from fp8train.calibration import Calibration, LinearSensitivity, ranked
from fp8train.convert import convert_model
from fp8train.errors import ConfigError, exit_code
from fp8train.nn.shared_inputs import input_groups
from fp8train.nn.weights import named_linears
from fp8train.quant.formats import BF16
from fp8train.recipe import load_recipe
from fp8train.search import (
    Choice,
    SearchArguments,
    choose,
    cost_table,
    end_layers,
    gap_words,
    main,
    matching,
    saved_inputs,
    searched_recipe,
)
from fp8train.sensitivity import main as sensitivity
from tests.planted import LAYERS, PLANTED, own_text, planted_model
from tests.tiny_run import tiny_arguments, tiny_train

NAMES = [f"layers.{i}.{part}" for i in range(4) for part in (
    *(f"self_attn.{n}_proj" for n in "qkvo"), *(f"mlp.{n}_proj" for n in ("gate", "up", "down")))]  # fmt: skip


def order_of(*first: str) -> list[tuple[LinearSensitivity, float]]:
    """A ranking with these linears on top, then the others by name."""
    rest = sorted(set(NAMES) - set(first))
    rows = [LinearSensitivity(fqn=fqn, shape=(8, 8)) for fqn in (*first, *rest)]
    return [(row, float(-number)) for number, row in enumerate(rows)]


def level(count: int, *first: str, **options: Sequence[str]) -> Choice:
    return choose(SearchArguments(level=f"L{count}"), order_of(*first), NAMES, **options)


DOWN = [f"layers.{i}.mlp.down_proj" for i in range(4)]


class TestLevel:
    def test_takes_the_first_of_the_ranking(self):
        assert level(2, DOWN[2], DOWN[0]).searched == (DOWN[0], DOWN[2])

    def test_level_zero_takes_none(self):
        assert level(0).every == frozenset()

    def test_groups_move_together(self):
        assert level(1, "layers.1.self_attn.k_proj").searched == tuple(f"layers.1.self_attn.{n}_proj" for n in "qkv")
        assert level(1, "layers.1.mlp.up_proj").searched == ("layers.1.mlp.gate_proj", "layers.1.mlp.up_proj")

    def test_counts_beside_the_manual_list(self):
        choice = level(1, DOWN[2], DOWN[0], manual=[DOWN[2]])
        assert choice.manual == (DOWN[2],) and choice.searched == (DOWN[0],)
        assert choice.every == {DOWN[0], DOWN[2]}

    def test_more_than_there_are_takes_all_and_says_so(self):
        choice = level(99)
        assert choice.every == set(NAMES)
        assert choice.notes == ("level L99 exceeds the 28 linears that are left to choose: all of them",)


class TestFraction:
    def test_never_exceeds_the_fraction_manual_included(self):
        arguments = SearchArguments(fraction=0.15)  # 4 of 28
        choice = choose(
            arguments, order_of("layers.0.mlp.up_proj", "layers.1.self_attn.q_proj", *DOWN), NAMES, [DOWN[0]]
        )
        assert choice.every == {DOWN[0], "layers.0.mlp.gate_proj", "layers.0.mlp.up_proj", DOWN[1]}

    def test_above_a_fifth_only_if_told(self):
        with pytest.raises(ConfigError, match="max_fraction=0.2"):
            SearchArguments(fraction=0.3)
        assert SearchArguments(fraction=0.3, max_fraction=0.3).fraction == 0.3


class TestBudget:
    @staticmethod
    def gap(kept: frozenset[str]) -> float:
        return 0.1 * (4 - len(kept & set(DOWN)))

    @pytest.mark.parametrize(("budget", "wanted"), [(0.4, 0), (0.3, 1), (0.15, 3), (0.0, 4)])
    def test_takes_the_fewest_within_the_budget(self, budget: float, wanted: int):
        arguments = SearchArguments(loss_budget=budget + 1e-9)
        choice = choose(arguments, order_of(*DOWN), NAMES, loss_gap=self.gap)
        assert choice.searched == tuple(DOWN[:wanted])
        assert len(choice.notes) <= 5  # 16 groups: binary search

    def test_more_than_max_fraction_is_refused(self):
        arguments = SearchArguments(loss_budget=0.0, max_fraction=0.1)
        with pytest.raises(ConfigError, match="needs 14% of the linears in BF16, more than max_fraction=0.1"):
            choose(arguments, order_of(*DOWN), NAMES, loss_gap=self.gap)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "got none of level, fraction, loss_budget"),
        ({"level": "L1", "fraction": 0.1}, "got level and fraction"),
        ({"level": "10"}, "needs L and a number"),
        ({"level": "L1", "metric": "los"}, "nearest: loss"),
        ({"loss_budget": -1.0}, "at least 0 nats"),
        ({"level": "L1", "first": -1}, "at least 0"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        SearchArguments(**options)


def test_manual_takes_globs_and_refuses_what_names_nothing():
    assert matching(["*down_proj"], NAMES) == DOWN
    with pytest.raises(
        ConfigError, match="'layers.0.mlp.down_prj' names no quantised linear; nearest: layers.0.mlp.down"
    ):
        matching(["layers.0.mlp.down_prj"], NAMES)


def test_first_and_last_cover_whole_layers():
    assert end_layers(NAMES, NAMES, 1, 1) == [fqn for fqn in NAMES if fqn.startswith(("layers.0", "layers.3"))]


def test_groups_are_of_one_parent():
    assert [len(group) for group in input_groups(NAMES)] == [3, 1, 2, 1] * 4
    assert input_groups(["a.wq", "a.wk"]) == [["a.wq"], ["a.wk"]]


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.model = inner


def test_written_recipe_converts_the_chosen_linears_and_no_others(tmp_path: Path):
    arguments = SearchArguments(level="L1", last=1)
    choice = Choice(searched=("layers.1.mlp.down_proj",), manual=("layers.0.self_attn.o_proj",))
    model = planted_model("bf16")
    made = searched_recipe(load_recipe("blockwise"), choice, list(named_linears(model)), arguments)
    path = tmp_path / "made.yaml"
    path.write_text(made.text)
    assert load_recipe(path).hash == made.hash
    for target, prefix in ((model, ""), (Wrapped(model), "model.")):
        convert_model(target, load_recipe(path))
        high = {fqn for fqn, linear in named_linears(target).items() if linear.precision == BF16}
        last = {fqn for fqn in named_linears(model) if fqn.startswith(f"layers.{LAYERS - 1}.")}
        assert high == {prefix + fqn for fqn in (*choice.searched, *choice.manual, *last, "lm_head")}


@pytest.mark.parametrize("level", ["o_proj", "all"])
def test_written_recipe_is_accepted_where_a_rule_has_nothing_left_to_decide(level: str):
    model = planted_model("bf16")
    linears = list(named_linears(model))
    rules = [{"layers": "first:1", "use": "bf16"}, {"match": "*o_proj", "use": "fp8"}]
    rules = [{"match": "*layers.0.self_attn.q_proj", "use": "fp32"}, *rules]  # of which first=1 takes everything
    base = load_recipe("blockwise").document
    base = load_recipe(base | {"rules": [*rules, *base["rules"]]})
    chosen = [fqn for fqn in linears if level == "all" or fqn.endswith("o_proj")]
    made = searched_recipe(
        base, Choice(searched=(), manual=tuple(chosen)), linears, SearchArguments(level="L0", first=1)
    )
    convert_model(model, made)
    high = {fqn for fqn, linear in named_linears(model).items() if linear.precision == BF16}
    assert high >= set(chosen) and (level == "all") == (high == set(linears))
    optional = [rule for rule in made.document["rules"] if rule.get("optional")]
    assert {"match": "*o_proj", "use": "fp8", "optional": True} in optional
    assert made.document["rules"].count({"layers": "first:1", "use": "bf16"}) == 1


def test_searched_recipe_beats_random_and_first_and_last_layers_on_held_out_text():
    model = planted_model("blockwise")
    calibration = Calibration(model, own_text(model, windows=1, seed=1))
    held_out = Calibration(model, own_text(model, windows=2, seed=2))
    order = ranked(calibration.measure(gradients=False), "loss")
    count = len(PLANTED)
    choice = choose(SearchArguments(fraction=0.18), order, calibration.candidates)  # 5 of 28
    assert choice.every == PLANTED
    high = held_out.loss(dict.fromkeys(held_out.candidates, BF16))

    def gap(kept: Sequence[str]) -> float:
        return held_out.loss(dict.fromkeys(kept, BF16)) - high

    searched = gap(sorted(choice.every))
    others = {
        "none": [],
        "first layer": end_layers(held_out.candidates, held_out.candidates, 1, 0),
        "last layer": end_layers(held_out.candidates, held_out.candidates, 0, 1),
    }
    source = random.Random(0)
    for number in range(6):
        others[f"random {number}"] = source.sample(held_out.candidates, count)
    for name, kept in others.items():
        assert abs(searched) < 0.5 * gap(kept), (name, searched, gap(kept))


class Twice(nn.Module):
    """Two linears, each under two names: layers.1 is layers.0."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.ModuleDict({"up_proj": nn.Linear(64, 128), "down_proj": nn.Linear(128, 64)})
        self.layers = nn.ModuleList([block, block])


class TestCosts:
    @staticmethod
    def rows(model: nn.Module, choice: Choice) -> tuple[list[list[str]], list[str]]:
        """Cells of the linears, and of the line that sums them."""
        report = convert_model(model, "blockwise", backend="cpu_torch")
        text = cost_table(report, choice, dict.fromkeys((row.fqn for row in report.rows), 1.0), "loss")
        lines = [re.split("  +", line) for line in text.splitlines()]
        last = next(number for number, line in enumerate(lines) if line[0] == "in all")
        return lines[1:last], lines[last]

    @pytest.mark.parametrize(
        "named",
        [{"manual": (DOWN[0],)}, {"ends": (DOWN[0],)}, {"manual": (DOWN[0],), "ends": (DOWN[0],)}],
        ids=["manual", "first or last", "both"],
    )
    def test_linear_is_counted_once_however_it_was_chosen(self, named: dict[str, tuple[str, ...]]):
        rows, total = self.rows(planted_model("bf16"), Choice(searched=(), **named))
        assert [row[0] for row in rows] == [DOWN[0]] and rows[0][1] == next(iter(named)).replace("ends", "first/last")
        assert total[1:] == rows[0][3:7]

    def test_linear_with_two_names_is_one_row_and_a_share_of_the_whole(self):
        rows, total = self.rows(Twice(), Choice(searched=("layers.0.up_proj", "layers.0.down_proj")))
        assert [row[3] for row in rows] == ["50.00", "50.00"] and total[1] == "100.00"

    @pytest.mark.parametrize(
        ("moved", "more"),
        [
            (("q_proj", "k_proj", "v_proj"), [128, 0, 0]),  # 1 byte a channel becomes 2
            (("k_proj",), [256]),  # the other two still read it in FP8
            (("o_proj",), [128]),
        ],
        ids=["all that read it", "one of three", "alone"],
    )
    def test_an_input_counts_once_however_many_linears_read_it(self, moved: tuple[str, ...], more: list[int]):
        report = convert_model(planted_model("bf16"), "blockwise", backend="cpu_torch")
        names = [f"layers.1.self_attn.{name}" for name in moved]
        assert [saved_inputs(report, names)[name] for name in names] == more

    def test_an_input_that_backward_keeps_in_bf16_already_costs_nothing_more(self):
        model = planted_model("bf16")
        report = convert_model(model, "wgrad_bf16", backend="cpu_torch")
        assert set(saved_inputs(report, [row.fqn for row in report.rows]).values()) == {0}

    @pytest.mark.parametrize("end", ["first", "last"])
    def test_more_layers_than_there_are_is_an_error(self, end: str):
        wanted = {"first": 0, "last": 0} | {end: LAYERS + 1}
        with pytest.raises(ConfigError, match=f"search: {end} is {LAYERS + 1}; the model has {LAYERS} layers"):
            end_layers(NAMES, NAMES, **wanted)


class TestWords:
    def test_a_linear_that_follows_another_of_its_input_says_which(self):
        v, down = "layers.1.self_attn.v_proj", DOWN[3]
        by_level = level(2, v, down)
        assert by_level.led == {f"layers.1.self_attn.{n}_proj": "v_proj" for n in "qk"}
        assert level(3, v, down, "layers.1.self_attn.q_proj").led == {"layers.1.self_attn.k_proj": "v_proj"}
        share = choose(SearchArguments(fraction=0.15), order_of(v, "layers.1.self_attn.q_proj", down), NAMES)
        assert share.led == by_level.led and set(share.searched) == {*by_level.led, v, down}
        assert level(0, manual=[v]).led == by_level.led

    def test_the_table_gives_the_cause_and_the_last_line_both_losses(self, tmp_path: Path, capsys):
        manual = "manual=['*v_proj','*up_proj']"
        assert main([*tiny_arguments(tmp_path), "level=L0", "windows=2", manual, f"out={tmp_path / 'r.yaml'}"]) == 0
        text = capsys.readouterr().out
        for name, cause in {"v_proj": "manual", "q_proj": "with v_proj", "k_proj": "with v_proj"}.items():
            assert re.search(rf"^layers.0.self_attn.{name} +{cause} ", text, re.M), name
        assert re.search(r"^calibration loss: searched \S+, blockwise \S+ nats above BF16 on 128 tokens", text, re.M)

    def test_a_search_that_did_not_help_says_so(self):
        words = "searched +9.5e-05, blockwise -2.4e-04 nats above BF16 on 128 tokens"
        assert gap_words(9.5e-5, -2.43e-4, "blockwise", 128) == f"{words} (not better)"
        assert gap_words(1e-4, 2e-4, "blockwise", 128).endswith("tokens")


class TestCommands:
    def test_search_writes_a_recipe_that_trains_next(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        out = tmp_path / "made.yaml"
        run = tiny_arguments(tmp_path)
        assert main([*run, "level=L1", "windows=2", "manual=['*o_proj']", f"out={out}"]) == 0
        text = capsys.readouterr().out
        assert "manual" in text and "rank" in text and "time % <=" in text
        high = [rule["match"] for rule in load_recipe(out).document["rules"] if rule["use"] == "bf16"]
        assert high[0] == "*layers.0.self_attn.o_proj"
        with pytest.raises(ConfigError, match="exists; needs a new file"):
            main([*run, "level=L1", f"out={out}"])

    def test_sensitivity_gives_table_and_json(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        out = tmp_path / "sensitivity.json"
        assert sensitivity([*tiny_arguments(tmp_path), "windows=2", f"out={out}"]) == 0
        table = capsys.readouterr().out.splitlines()
        content = json.loads(out.read_text())
        assert len(content["linears"]) == 7 and content["tokens"] == 128
        assert [line.split()[0] for line in table[3:10]] == [row["fqn"] for row in content["linears"]]
        head = table[2].replace("loss ", "loss_").replace(" dB", "_dB").replace("1-cos ", "1-cos_").split()
        assert head[:4] == ["linear", "loss_change", "loss_rms", "fprop_dB"] and table[10].startswith("by loss; ")
        assert float(table[3].split()[2]) == pytest.approx(content["linears"][0]["score"], rel=0.01)
        assert len(table) == 12 and all(word in "".join(table[10:]) for word in ("range_parm", "kurtosis", "SQNR"))
        assert set(content["linears"][0]["gemms"]["dgrad"]) == {
            "loss_change", "loss_rms", "sqnr_db", "gradient_cosine"
        }  # fmt: skip

    def test_checkpoint_is_judged_under_its_own_recipe_by_name(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        tiny_train(tmp_path, "steps=1", "recipe=rowwise")
        assert sensitivity([f"checkpoint={tmp_path / 'run'}", "windows=2"]) == 0
        assert f"{tmp_path / 'run'}; recipe rowwise; 128 tokens" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            (["level=L3", "recipe=bf16"], "none of the 8 linears is quantised"),
            (["level=L3", "windows=9999"], "the calibration text has 836 windows"),
            (["level=L3", "seq_len=64", "data.path=missing.txt"], "missing.txt"),
            (["level=L3", "out=/proc/nowhere/r.yaml"], "search: /proc/nowhere/r.yaml cannot be written"),
            (["level=L3", "manual='*o_proj'"], "quotes around a value that has a *"),
        ],
        ids=["no linears", "short text", "no text", "no place", "no quotes"],
    )
    def test_bad_input_is_one_line_and_status_2(
        self, extra: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
    ):
        assert exit_code(main, [*tiny_arguments(tmp_path), f"out={tmp_path / 'r.yaml'}", *extra]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
