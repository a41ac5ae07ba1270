from __future__ import annotations

import io
import json
import re
import sys
import tracemalloc
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fp8train.errors import CheckpointError, TrainingError
from fp8train.metrics import (
    METRICS_FILE,
    Metrics,
    flat,
    missing_rows,
    peak_flops,
    read_metrics,
    to_json_line,
    truncate_metrics,
)
from fp8train.trainer.console import Console, progress_line, rate_text
from fp8train.trainer.run_folder import saved_evals
from tests.full_disk import files_of_at_most
from tests.source_tree import ROOT


def open_metrics(folder: Path, warnings: list[str], **options) -> Metrics:
    return Metrics(folder, warn=warnings.append, **options)


class TestJsonLines:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "-inf"])
    def test_non_finite_number_is_null_and_the_row_says_so(self, value: float):
        row = json.loads(
            to_json_line({"step": 1, "loss": value, "inner": {"list": [1.0, value]}}), parse_constant=pytest.fail
        )
        assert row == {"step": 1, "loss": None, "inner": {"list": [1.0, None]}, "nonfinite": True}

    def test_finite_row_does_not_mention_it(self):
        assert json.loads(to_json_line({"step": 1, "loss": 2.5})) == {"step": 1, "loss": 2.5}

    def test_row_is_on_disk_as_soon_as_it_is_written(self, tmp_path: Path):
        metrics = open_metrics(tmp_path, [])
        metrics.write({"step": 1, "loss": 2.0})
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
        metrics.close()

    def test_resumed_run_drops_the_rows_after_its_checkpoint(self, tmp_path: Path):
        first = open_metrics(tmp_path, [])
        for step in range(1, 6):
            first.write({"step": step, "loss": float(step)})
        first.write({"step": 5, "eval_loss": 1.0})
        first.close()
        second = open_metrics(tmp_path, [], resumed_step=3)
        second.write({"step": 4, "loss": 40.0})
        second.close()
        assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path / "metrics.jsonl")] == [
            (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0),
        ]  # fmt: skip

    def test_line_cut_short_by_a_crash_is_dropped(self, tmp_path: Path):
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
        truncate_metrics(path, 10)
        assert path.read_text() == '{"step": 1, "loss": 2.0}\n'

    def test_resume_holds_one_row_at_a_time(self, tmp_path: Path):
        path = tmp_path / METRICS_FILE
        path.write_text("".join(to_json_line({"step": step, "x/y/z": [0.5] * 250}) for step in range(1, 2001)))
        size = path.stat().st_size
        tracemalloc.start()
        truncate_metrics(path, 1500)
        assert missing_rows(path, 1501, 1) == (1501, 1501) and saved_evals(tmp_path) == []
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < size / 4

    @pytest.mark.parametrize("line", ['{"step": "2"}', '{"step": null}', "[2]", '{"step": 2'])
    def test_damaged_line_is_named_and_the_file_left_as_it_is(self, line: str, tmp_path: Path):
        path = tmp_path / "metrics.jsonl"
        path.write_text(text := f'{{"step": 1}}\n{line}\n')
        with pytest.raises(CheckpointError, match=r"metrics.jsonl: line 2 is damaged .* Delete the line"):
            truncate_metrics(path, 10)
        assert path.read_text() == text


class TestMetricsFileThatFails:
    def test_full_disk_stops_the_run_with_the_rows_before(self, tmp_path: Path):
        warnings: list[str] = []
        metrics = open_metrics(tmp_path, warnings)
        metrics.write({"step": 1, "loss": 2.0})
        with (
            files_of_at_most(30),
            pytest.raises(TrainingError, match=r"jsonl: the row of step 2 .*too large.*Make room"),
        ):
            metrics.write({"step": 2, "loss": 2.0})
        metrics.close()
        assert not warnings
        assert read_metrics(tmp_path / METRICS_FILE) == [{"step": 1, "loss": 2.0}]

    def test_rows_that_are_lost_at_closing_are_not_passed_over(self, tmp_path: Path):
        metrics = open_metrics(tmp_path, [])
        metrics._jsonl._file = open("/dev/full", "a")  # noqa: SIM115
        metrics._jsonl._file.write("{}")  # a file system over a network may refuse as late as this
        with pytest.raises(TrainingError, match="the last rows cannot be written .No space left"):
            metrics.close()

    @pytest.mark.parametrize("obstacle", ["folder", "no target"])
    def test_file_that_cannot_be_opened_is_refused(self, tmp_path: Path, obstacle: str):
        if obstacle == "folder":
            (tmp_path / METRICS_FILE).mkdir()
        else:
            (tmp_path / METRICS_FILE).symlink_to(tmp_path / "gone" / METRICS_FILE)
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: cannot be written .*needs a writable run_dir"):
            open_metrics(tmp_path, [])


class TestFailingSinks:
    def test_missing_wandb_is_one_warning_and_rows_go_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "wandb", None)  # import raises ImportError
        warnings: list[str] = []
        metrics = open_metrics(tmp_path, warnings, wandb="offline")
        metrics.write({"step": 1, "loss": 2.0})
        metrics.close()
        assert len(warnings) == 1 and "dropped" in warnings[0]
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1

    def test_wandb_that_cannot_go_online_is_tried_offline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        fake = FakeWandb(refuses=("online",))
        monkeypatch.setitem(sys.modules, "wandb", fake)
        warnings: list[str] = []
        metrics = open_metrics(tmp_path, warnings, wandb="online")
        metrics.write({"step": 1, "loss": 2.0})
        metrics.close()
        assert fake.modes == ["online", "offline"]
        assert fake.rows == [({"loss": 2.0}, 1)]
        assert len(warnings) == 1 and "trying wandb offline" in warnings[0]

    def test_wandb_that_fails_twice_is_dropped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "wandb", FakeWandb(refuses=("online", "offline")))
        warnings: list[str] = []
        metrics = open_metrics(tmp_path, warnings, wandb="online")
        metrics.write({"step": 1, "loss": 2.0})
        metrics.close()
        assert len(warnings) == 2 and "dropped" in warnings[1]

    def test_wandb_that_breaks_online_and_then_offline_is_dropped(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setitem(sys.modules, "wandb", FakeWandb(breaks_at=2))
        warnings: list[str] = []
        metrics = open_metrics(tmp_path, warnings, wandb="online")
        for step in range(1, 5):
            metrics.write({"step": step, "loss": 2.0})
        metrics.close()
        assert len(warnings) == 2 and "trying wandb offline" in warnings[0] and "dropped" in warnings[1]
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4

    def test_sink_that_breaks_in_the_middle_is_announced_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        fake = FakeWandb(breaks_at=2)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        warnings: list[str] = []
        metrics = open_metrics(tmp_path, warnings, wandb="offline")
        for step in range(1, 5):
            metrics.write({"step": step, "loss": 2.0})
        metrics.close()
        assert len(warnings) == 1
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4


class TestWandb:
    def test_resumed_run_keeps_its_id(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        fake = FakeWandb()
        monkeypatch.setitem(sys.modules, "wandb", fake)
        for resumed in (0, 3):
            open_metrics(tmp_path, [], wandb="offline", resumed_step=resumed).close()
        assert len(fake.ids) == 2 and fake.ids[0] == fake.ids[1]

    def test_network_that_is_gone_does_not_hold_the_job_at_its_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        wandb, fake = pytest.importorskip("wandb", reason="needs the extra [wandb]"), FakeWandb()
        monkeypatch.setitem(sys.modules, "wandb", fake)
        open_metrics(tmp_path, [], wandb="online").close()
        (settings,) = fake.settings
        before_the_job_ends = re.search(r"--signal=B:USR1@(\d+)", (ROOT / "launch" / "slurm.sbatch").read_text())
        assert 0 < wandb.Settings(**vars(settings)).finish_timeout < int(before_the_job_ends[1])


def test_tensorboard_forgets_the_steps_after_the_one_that_training_goes_on_from(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed, steps in ((0, range(1, 6)), (3, range(4, 8)), (0, range(1, 3))):
        metrics = Metrics(tmp_path, tensorboard=True, resumed_step=resumed, warn=pytest.fail)
        for step in steps:
            metrics.write({"step": step, "loss": 1.0})
        metrics.close()
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert [event.step for event in events.Scalars("loss")] == [*range(1, steps[-1] + 1)]


def test_tensorboard_writes_event_files(tmp_path: Path):
    pytest.importorskip("tensorboard")
    warnings: list[str] = []
    metrics = open_metrics(tmp_path, warnings, tensorboard=True)
    metrics.write({"step": 1, "loss": 2.0, "skipped": True})
    metrics.close()
    assert not warnings
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class TestConsole:
    def shown(self, stream: io.StringIO, **options) -> str:
        console = Console(4, print_every=2, stream=stream, **options)
        console.info("start")
        for step in range(1, 5):
            row = {"step": step, "loss": 2.0, "lr": 1e-3, "grad_norm": 1.0, "step_seconds": 0.1}
            console.step(row | {"tokens_per_second": 10.0}, None)
        console.warn("careful")
        console.close()
        return stream.getvalue()

    def test_plain_lines_come_every_so_many_steps(self):
        lines = self.shown(io.StringIO(), label="fp8").splitlines()
        assert lines[0] == "[fp8] start" and lines[-1] == "[fp8] warning: careful"
        assert [line.split()[2] for line in lines[1:-1]] == ["2/4", "4/4"]

    def test_terminal_gets_a_bar_instead_of_lines(self):
        text = self.shown(Terminal())
        assert "4/4 [" in text and "step 4/4 (" not in text and "warning: careful" in text

    def test_other_ranks_write_nothing(self):
        assert self.shown(io.StringIO(), enabled=False) == ""
        assert self.shown(Terminal(), enabled=False) == ""

    def test_skipped_step_is_called_so(self):
        row = {"step": 1, "loss": float("nan"), "lr": 1e-3, "grad_norm": 1.0, "step_seconds": 0.1}
        assert "loss non-finite (skipped)" in progress_line(row | {"tokens_per_second": 10.0, "skipped": True}, 4, None)

    def test_progress_line_has_the_agreed_form(self):
        row = {
            "step": 120, "loss": 3.2141, "lr": 3e-4, "grad_norm": 0.81, "step_seconds": 0.412,
            "tokens_per_second": 318_000.0, "mfu": 0.441, "memory_bytes": 61.2 * 2**30,
        }  # fmt: skip
        assert progress_line(row, 5000, 1990.0) == (
            "step 120/5000 (2.4%) loss 3.214 lr 3.0e-04 gnorm 0.81 dt 412ms tok/s 318k mfu 44.1% mem 61.2GiB "
            "eta 0:33:10"
        )

    @pytest.mark.parametrize(
        ("count", "text"),
        [(950, "950"), (999.7, "1.00k"), (3180, "3.18k"), (31_800, "31.8k"), (318_000, "318k"), (1.25e6, "1.25M")],
        ids=str,
    )
    def test_counts_have_three_digits(self, count: float, text: str):
        assert rate_text(count) == text


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        pytest.param("NVIDIA H100 80GB HBM3", 989.4e12, id="H100 SXM"),
        pytest.param("NVIDIA H100 PCIe", 756e12, id="H100 PCIe"),
        pytest.param("NVIDIA H200", 989.4e12, id="H200"),
        pytest.param("cpu", None, id="CPU"),
    ],
)
def test_peak_is_known_for_the_exact_board_or_not_at_all(name: str, bf16: float | None):
    assert peak_flops(name) == bf16


class FakeWandb(ModuleType):
    """What WandbSink uses of wandb."""

    Settings = SimpleNamespace

    def __init__(self, refuses: tuple[str, ...] = (), breaks_at: int | None = None) -> None:
        super().__init__("wandb")
        self.refuses, self.breaks_at = refuses, breaks_at
        self.modes: list[str] = []
        self.ids: list[str] = []
        self.settings: list[SimpleNamespace] = []
        self.rows: list[tuple[dict, int]] = []

    def init(self, *, mode: str, id: str, settings: SimpleNamespace, **_options) -> SimpleNamespace:
        self.modes.append(mode)
        self.settings.append(settings)
        self.ids.append(id)
        if mode in self.refuses:
            raise RuntimeError(f"no {mode}")
        return SimpleNamespace(log=self.log, finish=lambda: None)

    def log(self, row: dict, step: int) -> None:
        if step == self.breaks_at:
            raise RuntimeError("broken pipe")
        self.rows.append((row, step))


def test_rows_of_a_folder_that_is_gone_are_not_written_into_nowhere(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    metrics = Metrics(folder, warn=pytest.fail)
    metrics.write({"step": 1})
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(TrainingError, match="has been removed or renamed.*the row of step 2 is lost"):
        metrics.write({"step": 2})
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
    with pytest.raises(TrainingError, match="has been removed or renamed"):
        metrics.write({"step": 3})


def test_charts_get_the_numbers_of_telemetry_one_by_one() -> None:
    row = {
        "step": 5, "loss": 2.0, "skipped": True, "fp8/columns": ["amax", "sqnr_db"], "fp8/what_if": ["lm_head"],
        "fp8/seconds": 0.1, "fp8/lm_head/x": [3.0, None], "fp8/layers.0.mlp.up_proj/dy": [1.0, 31.0],
    }  # fmt: skip
    assert flat(row) == {
        "step": 5, "loss": 2.0, "skipped": True, "fp8/seconds": 0.1, "fp8/lm_head/x/amax": 3.0,
        "fp8/layers.0.mlp.up_proj/dy/amax": 1.0, "fp8/layers.0.mlp.up_proj/dy/sqnr_db": 31.0,
    }  # fmt: skip
