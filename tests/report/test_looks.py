"""Verdicts that are drawn again as seeds are added: counted, planned for, and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fp8train.report.document import build_report
from fp8train.report.looks import looks_words
from fp8train.report.run_record import Arms, read_run
from fp8train.report.statistics import ALPHA, t_quantile
from tests.run_folders import verdict_of, words_of, write_run

GAPS = [0.0010, 0.0030, 0.0052, 0.0011, 0.0032, 0.0049]  # of 2.25 nats; margin 0.25 % = 0.0056


def arms_of(folder: Path, seeds: int) -> Arms:
    arms: dict[str, dict[int, Any]] = {"bf16": {}, "blockwise": {}}
    for arm, runs in arms.items():
        for seed in range(1, seeds + 1):
            path = folder / arm / f"seed_{seed}"
            loss = 2.25 + (GAPS[seed - 1] if arm == "blockwise" else 0.0)
            if not path.exists():
                write_run(path, recipe=arm, seed=seed, eval_loss=loss, init_hash=f"seed {seed}")
            runs[seed] = read_run(path)
    return arms


def test_a_second_look_that_was_not_planned_says_how_much_it_errs(tmp_path: Path) -> None:
    first = verdict_of(arms_of(tmp_path, 3))
    again = verdict_of(arms_of(tmp_path, 3), earlier=[first])
    assert len(first["looks"]) == len(again["looks"]) == 1, "the same runs again are no other look"
    assert first["caveats"] == again["caveats"] and "look" not in words_of(first)
    second = verdict_of(arms_of(tmp_path, 6), earlier=[again])
    assert [look["seeds"] for look in second["looks"]] == [3, 6]
    assert second["caveats"][-1] == (
        "This is look 2 at these arms: its answer and those before it are wrong with up to 10 % together, not 5 %."
    )
    assert "Looks so far: 3 seeds, 6 seeds;" in build_report(second, arms_of(tmp_path, 6))


def test_planned_looks_share_the_level(tmp_path: Path) -> None:
    first = verdict_of(arms_of(tmp_path, 3), looks=2)
    second = verdict_of(arms_of(tmp_path, 6), looks=2, earlier=[first])
    test = second["comparisons"]["blockwise"]["test"]
    assert test["confidence"] == pytest.approx(0.95) and "95 % interval" in second["numbers"][0]
    reach = t_quantile(0.975, 5) * test["sd"] / np.sqrt(6)
    assert test["high"] - test["mean"] == pytest.approx(reach)
    assert "look" not in words_of(second) and sum(look["alpha"] for look in second["looks"]) == pytest.approx(ALPHA)
    third = verdict_of(arms_of(tmp_path, 5), looks=2, earlier=[second])
    assert "up to 7.5 % together" in third["caveats"][-1]


def test_another_margin_afterwards_is_a_look_and_one_seed_is_none(tmp_path: Path) -> None:
    one = verdict_of(arms_of(tmp_path, 1))
    assert one["looks"] == [] and one["alpha"] == ALPHA
    first = verdict_of(arms_of(tmp_path, 3), earlier=[one])
    assert len(first["looks"]) == 1
    first["margin_percent"] = first["looks"][0]["margin_percent"] = 0.2
    assert len(verdict_of(arms_of(tmp_path, 3), earlier=[first])["looks"]) == 2


def test_a_verdict_of_an_earlier_version_was_a_look(tmp_path: Path) -> None:
    first = verdict_of(arms_of(tmp_path, 3))
    del first["looks"], first["alpha"]
    assert [look["seeds"] for look in verdict_of(arms_of(tmp_path, 6), earlier=[first])["looks"]] == [3, 6]


def test_looks_at_other_arms_do_not_count(tmp_path: Path) -> None:
    first = verdict_of(arms_of(tmp_path, 3))
    assert len(verdict_of(arms_of(tmp_path, 6), earlier=[first | {"primary": "mine"}])["looks"]) == 1


def test_error_over_two_looks_where_the_gap_lies_at_the_margin() -> None:
    """Drawn: two planned looks err with at most 5 %, two unplanned ones with more, and with no more than is said."""
    draws, margin = 40_000, 3.0  # in standard deviations between seeds
    gaps = margin + np.random.default_rng(0).standard_normal((draws, 6))

    def wrong(alpha: float) -> float:
        found = np.zeros(draws, dtype=bool)
        for count in (3, 6):
            part = gaps[:, :count]
            reach = t_quantile(1 - alpha, count - 1) * part.std(axis=1, ddof=1) / np.sqrt(count)
            found |= (part.mean(axis=1) + reach < margin) & (part.mean(axis=1) - reach > -margin)
        return float(found.mean())

    noise = 4 * np.sqrt(0.05 * 0.95 / draws)  # 4 standard errors of the drawn share
    assert wrong(ALPHA / 2) <= 0.05 + noise
    assert 0.05 + noise < wrong(ALPHA) <= 0.10 + noise
    assert looks_words([{"alpha": ALPHA / 2}] * 2) == []
