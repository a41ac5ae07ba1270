"""The report: one file that asks for nothing, with every number in an accessible table."""

from __future__ import annotations

import re
import shutil
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fp8train.report import build_report
from fp8train.report.arm_rows import slots
from fp8train.report.page import STYLE, typeset
from fp8train.report.run_record import Arms, read_run
from tests.run_folders import make_coverage, verdict_of, write_run

VOID = {"meta", "link", "br", "use", "path"}


class Outline(HTMLParser):
    """Elements of a page, with their attributes, and the text of each kind."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.unbalanced: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self._open or self._open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def arms_of(tmp_path: Path, **changes: Any) -> Arms:
    options = {"recipe": "blockwise", "eval_loss": 2.2731, "tokens_per_second": 28_400.0, "memory_bytes": 1.16e9}
    bf16 = write_run(tmp_path / "bf16" / "seed_1", eval_loss=2.2704)
    fp8 = write_run(tmp_path / "blockwise" / "seed_1", **(options | changes))
    return {"bf16": {1: read_run(bf16)}, "blockwise": {1: read_run(fp8)}}


def report_of(arms: Arms) -> str:
    return build_report(verdict_of(arms), arms)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    return report_of(arms_of(tmp_path_factory.mktemp("arms")))


@pytest.fixture(scope="module")
def outline(report: str) -> Outline:
    return Outline(report)


def test_page_asks_the_network_for_nothing(report: str, outline: Outline) -> None:
    assert not re.findall(r"(?:https?:)?//[\w.]+", report.replace("data:,", ""))
    assert not [tag for tag, _ in outline.elements if tag in {"script", "img", "iframe", "object", "embed"}]
    links = [attributes.get("href") or "" for _, attributes in outline.elements if "href" in attributes]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "@import" not in report and "url(" not in STYLE
    policy = outline.all("meta")[1]["content"] or ""
    assert policy.startswith("default-src 'none'")


def test_page_is_well_formed_and_ids_are_unique(outline: Outline) -> None:
    assert not outline.unbalanced
    ids = Counter(attributes["id"] for _, attributes in outline.elements if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    wanted = {(attributes["href"] or "")[1:] for attributes in outline.all("a")}
    assert wanted <= set(ids), "the navigation leads to sections that are there"


def test_verdict_is_the_heading_and_its_numbers_follow(outline: Outline) -> None:
    assert outline.texts["h1"] == ["FP8 blockwise ended 0.12\u202f% above BF16, in one seed."]
    assert outline.texts["p"][0].startswith("+0.12\u202f% held-out loss (2.2731 against 2.2704 nats per token)")
    assert "Indicative" in outline.texts["span"] and "With one seed" in outline.texts["li"][0]


def test_four_questions_are_answered_at_the_top_and_lead_to_their_sections(tmp_path: Path) -> None:
    def tiles(arms: Arms) -> list[list[str]]:
        text = report_of(arms).partition('<dl class="tiles')[2].partition("</dl>")[0]
        return [
            re.findall(r'href="(#\w+)"|"value">(.*?)</dd>|"detail">(.*?)</dd>', part) for part in text.split("<dt>")[1:]
        ]

    def flat(arms: Arms) -> list[tuple[str, ...]]:
        return [tuple("".join(found) for found in tile) for tile in tiles(arms)]

    good, slow = flat(arms_of(tmp_path / "good")), flat(arms_of(tmp_path / "busy", speed_spread=1.5))
    assert [tile[0] for tile in good] == ["#speed", "#loss", "#coverage", "#stability"]
    assert [tile[1] for tile in good] == ["0.71\u00d7", "Unproven", "95.8\u202f%", "Yes"]
    assert good[2][2] == "of the FLOPs of all linears; not wgrad of layers.3.mlp.down_proj, lm_head"
    assert good[0][2].endswith("; on a machine without FP8 units")
    assert slow[0][1] == "Not comparable" and slow[0][2].startswith("FP8 blockwise's steps varied ")
    lost = flat(arms_of(tmp_path / "lost", losses=np.full(40, np.nan), eval_loss=np.nan))
    assert [tile[1] for tile in (lost[1], lost[3])] == ["No, it diverged", "No"]
    assert lost[0][1:] == ("Unknown", "no seed was finished by both arms")
    gaps = np.linspace(5.5, 2.3, 40)
    gaps[[10, 20, 30]] = np.nan  # of a run that does not say how many steps it skipped
    assert "finished 40 steps; 3 skipped" in flat(arms_of(tmp_path / "gaps", losses=gaps))[3][2]


@pytest.mark.parametrize("names", [["blockwise"], ["placebo", "blockwise"], ["blockwise", "placebo", "tensorwise"]])
def test_an_arm_has_one_colour_whatever_stands_beside_it(tmp_path: Path, names: list[str]) -> None:
    found = slots(verdict_of(seeds_of(tmp_path, **{name: [0.0, 0.1, 0.2] for name in names})))
    assert found == {
        name: {"bf16": 0, "blockwise": 1, "placebo": 2, "tensorwise": 3}[name] for name in ("bf16", *names)
    }


def test_every_table_has_a_caption_and_headers(outline: Outline) -> None:
    tables = len(outline.all("table"))
    assert tables >= 7
    assert len(outline.all("caption")) == tables and all(text.strip() for text in outline.texts["caption"])
    assert {attributes.get("scope") for attributes in outline.all("th")} == {"col", "row"}


def test_every_chart_has_a_text_alternative_and_a_caption(outline: Outline) -> None:
    charts = [attributes for attributes in outline.all("div") if "chart" in (attributes.get("class") or "").split()]
    assert len(charts) == 6 == len(outline.all("figure")) == len(outline.all("figcaption"))
    assert all(chart["role"] == "img" and len(chart["aria-label"] or "") > 20 for chart in charts)


def test_numbers_of_the_charts_are_in_tables(outline: Outline) -> None:
    cells = {text.strip() for text in outline.texts["td"]}
    assert {"2.2704", "2.2731", "+0.0027", "+0.12\u202f%", "1.08\u00a0GiB", "0.83\u00d7", "FP8", "BF16"} <= cells


def test_reader_learns_what_differs_where_fp8_ran_and_on_what(report: str) -> None:
    for text in ("lm_head", "kept in high precision by the model", "layers.*.self_attn.q_proj", "layers 0\u20133"):
        assert text in report, text
    assert "What differs between the arms" in report and "2.13.0" in report and "match: " in report
    assert "optim:" in report, "the whole configuration"


def test_both_colour_schemes_define_the_same_variables() -> None:
    light, dark = STYLE.split("@media screen and (prefers-color-scheme: dark)")
    names = re.findall(r"(--[\w-]+):", light)
    assert sorted(names) == sorted(re.findall(r"(--[\w-]+):", dark.split("* {")[0]))
    assert set(re.findall(r"var\((--[\w-]+)\)", STYLE)) <= set(names)


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two #rrggbb colours. Source: WCAG 2.2, relative luminance."""

    def luminance(color: str) -> float:
        channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_arm_colours_can_be_read_on_the_paper(scheme: str) -> None:
    block = STYLE.split("@media screen and (prefers-color-scheme: dark)")[scheme == "dark"]
    colors = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", block))
    for name in ("--ink", "--muted", "--alert", *(f"--series-{slot}" for slot in range(6))):
        assert contrast(colors[name], colors["--paper"]) >= 4.5, name  # WCAG 2.2 AA for text


def test_gemm_planned_in_fp8_that_ran_outside_it_raises_an_alert(tmp_path: Path) -> None:
    coverage = make_coverage("blockwise")
    coverage["linears"][0]["gemms"]["dgrad"] |= {"fp8_rows": 0, "other_rows": 1000}
    text = report_of(arms_of(tmp_path, coverage=coverage))
    assert "planned in FP8 and also ran outside it: layers.0.self_attn.q_proj (dgrad)" in text
    assert "not FP8, planned FP8" in text


def test_what_a_schedule_or_an_alarm_changed_is_said_and_raises_no_alert(tmp_path: Path) -> None:
    coverage = make_coverage("blockwise")
    coverage["linears"][0]["gemms"]["dgrad"] |= {"fp8_rows": 500, "other_rows": 500}
    coverage["linears"][0]["changed"] = "the schedule: bf16 from step 4"
    text = report_of(arms_of(tmp_path, coverage=coverage))
    assert "during the run, the schedule: bf16 from step 4: layers.0.self_attn.q_proj." in text
    assert ", dgrad of layers.0.self_attn.q_proj throughout (the schedule: bf16 from step 4)" in text
    assert "also ran outside it" not in text and "planned FP8" not in text


@pytest.mark.parametrize("recipe", ["blockwise", "bf16"])
def test_refused_kernels_are_named_with_their_reasons(tmp_path: Path, recipe: str) -> None:
    """Also those of a run without FP8: its rotary embedding is one of our kernels."""
    refused = ["gemm gluon_192x128_s4: it hung", "rope bf16: 1 < 2"]
    coverage = make_coverage(recipe) | {"refused_kernels": refused}
    text = (
        "refused on its machine, so that others took their place: gemm gluon_192x128_s4: it hung; rope bf16: 1 &lt; 2"
    )
    assert text in report_of(arms_of(tmp_path / "refused", coverage=coverage))
    assert "refused on its machine" not in report_of(
        arms_of(tmp_path / "all", coverage=coverage | {"refused_kernels": []})
    )


@pytest.mark.parametrize(
    ("backend", "emulates"), [("hopper:bits=14,promote=128", True), ("triton", False)], ids=["emulation", "kernels"]
)
def test_report_says_where_speed_does_not_carry_over(tmp_path: Path, backend: str, emulates: bool) -> None:
    arms = {}
    for arm in ("bf16", "blockwise"):
        coverage = make_coverage(arm) | {"backend": backend, "emulates": emulates}
        arms[arm] = {1: read_run(write_run(tmp_path / arm, recipe=arm, coverage=coverage))}
    assert ("A GPU rounds alike, but sums in another order" in report_of(arms)) == emulates


@pytest.mark.parametrize(("facts", "count"), [({}, 3), ({"skipped_steps": 4}, 4)], ids=["not said", "said"])
def test_skipped_steps_raise_one_alert(tmp_path: Path, facts: dict[str, int], count: int) -> None:
    losses = np.linspace(5, 2, 40)
    losses[10:13] = np.nan
    said = f"<li>FP8 blockwise: skipped steps, whose loss or gradient was not finite: {count}.</li>"
    assert said in report_of(arms_of(tmp_path, losses=losses, **facts))


def test_diverged_arm_still_gets_a_report(tmp_path: Path) -> None:
    outline = Outline(report_of(arms_of(tmp_path, losses=np.full(40, np.nan), eval_loss=np.nan)))
    assert "diverged in 1 of 1 seed" in outline.texts["h1"][0] and len(outline.all("figure")) == 6


def test_names_of_the_user_are_escaped(tmp_path: Path) -> None:
    coverage = make_coverage("blockwise")
    coverage["linears"][-1] |= {"fqn": "<script>alert(1)</script>", "reason": "a & b"}
    text = report_of(arms_of(tmp_path, coverage=coverage))
    assert "<script" not in text and "&lt;script&gt;" in text and "a &amp; b" in text


def seeds_of(tmp_path: Path, count: int = 3, **gaps: list[float]) -> Arms:
    """BF16 and arms whose held-out loss is `gaps` percent above it, one value a seed."""
    arms: dict[str, dict[int, Any]] = {"bf16": {}} | {arm: {} for arm in gaps}
    for seed in range(1, count + 1):
        for arm in arms:
            loss = 2.27 * (1 + gaps.get(arm, [0.0] * count)[seed - 1] / 100)
            folder = tmp_path / arm / f"seed_{seed}"
            run = write_run(folder, recipe=arm, seed=seed, eval_loss=loss, init_hash=f"seed {seed}")
            arms[arm][seed] = read_run(run)
    return arms


def test_many_seeds_have_a_row_each(tmp_path: Path) -> None:
    outline = Outline(report_of(seeds_of(tmp_path, blockwise=[0.0, 0.1, 0.2])))
    assert not outline.unbalanced and outline.texts["th"].count("Seed") == 6
    assert sum(text.strip() == "3" for text in outline.texts["td"]) >= 4


def test_seeds_get_intervals_in_a_picture_and_a_table_beside_the_placebo(tmp_path: Path) -> None:
    arms = seeds_of(tmp_path, placebo=[0.1, -0.1, 0.0], blockwise=[0.3, -0.2, 0.1])
    text = report_of(arms)
    outline = Outline(text)
    assert (
        "Inconclusive" in outline.texts["span"] and "3 seeds of 40 steps, 163,840 tokens each" in outline.texts["span"]
    )
    assert outline.texts["h1"] == ["Whether FP8 blockwise matches BF16 within 0.25\u202f% is open."]
    labels = [attributes.get("aria-label") or "" for attributes in outline.all("div")]
    (gaps,) = [label for label in labels if label.startswith("Gap of the held-out loss")]
    assert "placebo 0.00 % (-0.17 to +0.17 %), chance alone" in gaps and "inconclusive" in gaps
    cells = {cell.strip() for cell in outline.texts["td"]}
    assert {"inconclusive", "equivalent", "\u22120.17 to +0.17\u202f%"} <= cells
    assert "shaded: from the lowest to the highest of them" in text, "the loss curves have a band"
    assert outline.texts["caption"][0].strip() and not outline.unbalanced


def test_table_of_steps_holds_the_means_that_the_curves_show(tmp_path: Path) -> None:
    """Blockwise is 1 % above BF16 in seed 1 and 2 % in seed 2, whose losses are 3 and 5 all along."""
    arms: dict[str, dict[int, Any]] = {"bf16": {}, "blockwise": {}}
    for seed, level in ((1, 3.0), (2, 5.0)):
        for arm in arms:
            losses = np.full(40, level * (1 + seed / 100 * (arm == "blockwise")))
            run = write_run(tmp_path / arm / f"{seed}", recipe=arm, seed=seed, losses=losses, init_hash=f"seed {seed}")
            arms[arm][seed] = read_run(run)
    text = report_of(arms)
    table = text.split("<summary>Loss by step, as a table</summary>")[1].split("</table>")[0]
    assert "nats per token, mean of 2 seeds." in Outline(table).texts["caption"][0]
    rows = [re.findall(r">([^<>]+)</t[dh]>", row) for row in table.split("<tr>")[2:]]
    assert rows[-1] == ["40", "163,840", "4.0000", "4.0650", "+1.50\u202f%"]
    assert len(rows) == 12 and all(row[2:] == rows[-1][2:] for row in rows)


def test_table_of_steps_of_a_diverged_arm_has_gaps(tmp_path: Path) -> None:
    text = report_of(arms_of(tmp_path, losses=np.full(40, np.nan), eval_loss=np.nan))
    table = text.split("<summary>Loss by step, as a table</summary>")[1].split("</table>")[0]
    assert table.count("<td") >= 12 and "nan" not in table and "mean of" not in table


def test_captions_say_that_the_smoothed_curve_lags_and_whose_flops_are_counted(tmp_path: Path) -> None:
    """Mean age of what an EMA of 0.9 averages: the sum of k 0.1 0.9^k over k >= 0 is 0.9 / 0.1 = 9 rows."""
    text = report_of(seeds_of(tmp_path, blockwise=[0.0, 0.1, 0.2]))
    assert "below the bold line while the loss falls fast, since that line lags by about 9 logged steps." in text
    assert re.search(r"FP8 blockwise: 95\.8\u202f% of 3 runs' [\d.]+\u00a0GFLOP ran in FP8", text)


def test_damaged_lines_that_were_left_out_raise_an_alert(tmp_path: Path) -> None:
    arms = arms_of(tmp_path)
    file = tmp_path / "blockwise" / "seed_1" / "metrics.jsonl"
    file.write_text("{\n" + file.read_text())
    damaged = {"bf16": arms["bf16"], "blockwise": {1: read_run(file.parent, skip_damaged=True)}}
    assert "FP8 blockwise: damaged lines of metrics left out: 1." in report_of(damaged)


def test_two_by_two_table_shows_what_was_crossed(tmp_path: Path) -> None:
    arms = arms_of(tmp_path)
    verdict = verdict_of(arms, crossed={"blockwise": {1: {"baseline_weights": 2.2777}}})
    cells = {text.strip() for text in Outline(build_report(verdict, arms)).texts["td"]}
    assert {"2.2777", "+0.0073"} <= cells, "the loss of BF16's weights in FP8, and what that costs"


@pytest.mark.slow
def test_report_of_a_long_run_is_small_and_quick(tmp_path: Path) -> None:
    steps = 25_000
    losses = 2.2 + 3.3 * np.exp(-np.arange(steps) / 2250) + np.random.default_rng(0).normal(0, 0.05, steps)
    base = write_run(tmp_path / "bf16", losses=losses)
    other = write_run(tmp_path / "blockwise", recipe="blockwise")
    shutil.copy(base / "metrics.jsonl", other)
    (other / "result.json").write_text((base / "result.json").read_text())
    begin = time.process_time()  # not wall time: the machine may be busy with other tests
    arms: Arms = {"bf16": {1: read_run(base)}, "blockwise": {1: read_run(other)}}
    report = report_of(arms)
    assert time.process_time() - begin < 6
    assert len(report.encode()) < 1_000_000


@pytest.mark.parametrize(
    ("plain", "wanted"),
    [
        ("-0.12 %", "\u22120.12\u202f%"),
        ("0.83x", "0.83\u00d7"),
        ("1.08 GiB", "1.08\u00a0GiB"),
        ("e4m3 1x128", "e4m3 1x128"),
        ("layer-2", "layer-2"),
        ("FP8 mix_4x, lr=-3 and 4x-mix", "FP8 mix_4x, lr=-3 and 4x-mix"),
        ("-3.17 to -0.42 % (-1), 16x.", "\u22123.17 to \u22120.42\u202f% (\u22121), 16\u00d7."),
        ("a < b", "a &lt; b"),
        ("-", "\u2013"),
    ],
)
def test_typesetting(plain: str, wanted: str) -> None:
    assert typeset(plain) == wanted
