from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fp8train.errors import RecipeError
from fp8train.recipe import Recipe, load_recipe
from fp8train.recipe_options import Alarm, SchedulePart, SwigluRemedy


def recipe(**options: Any) -> Recipe:
    return load_recipe(load_recipe("blockwise").document | options)


def test_options_are_read_and_survive_the_canonical_text(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text(
        load_recipe("blockwise").text + "schedule: [{at: 0.8, use: fp8}, {at: 0.9, use: bf16}]\n"
        "alarm: {on: [spike, nonfinite], do: demote, spike_nats: 2, window: 8, at_most: 2}\n"
        "swiglu: {clamp: 100, smooth: true}\n"
    )  # a bare `on` is a truth value to YAML 1.1
    loaded = load_recipe(path)
    assert loaded.schedule == (SchedulePart(at=0.8, use="fp8"), SchedulePart(at=0.9, use="bf16"))
    assert loaded.alarm == Alarm(on=("nonfinite", "spike"), spike_nats=2.0, window=8, at_most=2)
    assert loaded.swiglu == SwigluRemedy(clamp=100.0, smooth=True)
    again = tmp_path / "again.yaml"
    again.write_text(loaded.text)
    assert load_recipe(again) == Recipe(**{
        **{name: getattr(loaded, name) for name in Recipe.__dataclass_fields__}, "name": "again", "source": "again.yaml"
    })  # fmt: skip
    assert load_recipe(again).hash == loaded.hash


def test_every_option_that_has_an_effect_is_part_of_the_hash():
    plain = recipe().hash
    changes = [
        {"schedule": [{"at": 0.9, "use": "bf16"}]}, {"schedule": [{"at": 0.8, "use": "bf16"}]},
        {"schedule": [{"at": 0.9, "use": "fp32"}]}, {"alarm": {}}, {"alarm": {"on": ["nonfinite"]}},
        {"alarm": {"window": 5}}, {"alarm": {"at_most": 5}}, {"alarm": {"spike_nats": 5}},
        {"swiglu": {"clamp": 1}}, {"swiglu": {"clamp": 2}}, {"swiglu": {"smooth": True}},
        {"swiglu": {"smooth": True, "match": "*w2"}},
    ]  # fmt: skip
    hashes = [recipe(**change).hash for change in changes]
    assert len({plain, *hashes}) == len(changes) + 1


def test_spelling_and_values_without_effect_are_not_part_of_the_hash():
    assert recipe(alarm={}).hash == recipe(alarm={"on": ["spike", "nonfinite"], "do": "demote", "window": 16}).hash
    assert recipe(alarm={"on": ["nonfinite"], "window": 3}).hash == recipe(alarm={"on": ["nonfinite"]}).hash
    assert (
        recipe(swiglu={"clamp": 7}).hash == recipe(swiglu={"clamp": 7.0, "smooth": False, "match": "*down_proj"}).hash
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": []}, "needs a list such as"),
        ({"schedule": {"at": 0.9, "use": "bf16"}}, "needs a list such as"),
        ({"schedule": [{"at": 0.9}]}, "use is None; needs one of bf16, fp32, fp8"),
        ({"schedule": [{"at": 0.9, "use": "bf61"}]}, "nearest: bf16"),
        ({"schedule": [{"at": 1.0, "use": "bf16"}]}, "at is 1.0; needs a number above 0 and below 1"),
        ({"schedule": [{"at": "0.9", "use": "bf16"}]}, "at is '0.9'"),
        ({"schedule": [{"at": True, "use": "bf16"}]}, "at is True"),
        ({"schedule": [{"at": 0.9, "use": "bf16"}, {"at": 0.5, "use": "fp8"}]}, "at is 0.5 after 0.9"),
        ({"schedule": [{"at": 0.9, "use": "bf16", "until": 1}]}, "key 'until' is unknown"),
        ({"alarm": {"on": ["spikes"]}}, "needs a list of nonfinite and spike"),
        ({"alarm": {"on": []}}, "needs a list of nonfinite and spike"),
        ({"alarm": {"do": "stop"}}, "do is 'stop'; needs demote"),
        ({"alarm": {"spike_nats": 0}}, "spike_nats is 0; needs a number above 0"),
        ({"alarm": {"spike_nats": "1e30"}}, "Correct it: YAML 1.1 takes it for text, 1.0e+30 for a number."),
        ({"alarm": {"window": 2.5}}, "window is 2.5; needs a whole number"),
        ({"alarm": {"at_mots": 2}}, "nearest: at_most"),
        ({"swiglu": {}}, "asks for nothing"),
        ({"swiglu": {"clamp": -1}}, "clamp is -1"),
        ({"swiglu": {"clamp": float("nan")}}, "clamp is nan"),
        ({"swiglu": {"smooth": "yes"}}, "smooth is 'yes'"),
        ({"swiglu": {"smoth": True}}, "nearest: smooth"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(RecipeError) as refusal:
        recipe(**options)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
