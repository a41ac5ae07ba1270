"""What a user can get wrong, through the commands: exit status 2, one line with the remedy, nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from fp8train import export, prepare, train
from fp8train.errors import exit_code
from fp8train.metrics import METRICS_FILE, read_metrics
from fp8train.models import ModelConfig, build_model, initialize, save_hf
from tests.full_disk import files_of_at_most
from tests.tiny_run import padded_metrics, tiny_arguments, tiny_train

RULES = """
version: 1
precisions:
  fp8:
    fprop: {x: e4m3 1x128, w: e4m3 128x128}
    dgrad: {dy: e4m3 1x128, w: e4m3 128x128}
    wgrad: {dy: e4m3 1x128, x: e4m3 1x128}
    scale: pow2
rules:
"""

Prepared = Callable[[Path], list[str]]


def recipe_of(*rules: str) -> Prepared:
    """A recipe with these rules."""

    def prepared(folder: Path) -> list[str]:
        (folder / "own.yaml").write_text(RULES + "".join(f"  - {rule}\n" for rule in rules), encoding="utf-8")
        return [f"recipe={folder / 'own.yaml'}"]

    return prepared


def data_of(content: bytes | None, *more: str) -> Prepared:
    """A text file with this content, or none."""

    def prepared(folder: Path) -> list[str]:
        if content is not None:
            (folder / "given.txt").write_bytes(content)
        return [f"data.path={folder / 'given.txt'}", *more]

    return prepared


def given(*arguments: str) -> Prepared:
    return lambda folder: list(arguments)


def foreign_checkpoint(folder: Path) -> list[str]:
    """A folder that another program wrote."""
    (folder / "foreign").mkdir()
    (folder / "foreign" / "model.safetensors").write_bytes(b"x" * 100)
    return [f"resume={folder / 'foreign'}"]


def cut_off_model(folder: Path) -> list[str]:
    """A Hugging Face folder whose weights end too early."""
    config = ModelConfig(
        vocab_size=264, hidden_size=64, intermediate_size=128, num_layers=1, num_heads=1, num_kv_heads=1, max_seq_len=64
    )
    model = build_model(config)
    initialize(model, 1)
    save_hf(model.state_dict(), config, folder / "hf", "float32", None)
    weights = folder / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return ["model=hf", f"model.init_from={folder / 'hf'}", "data.tokenizer=bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(given("optim.lrr=1"), "unknown key 'optim.lrr'; nearest: optim.lr", id="unknown nested key"),
        pytest.param(given("steps=abc"), "steps: .*'abc'.*needs int", id="wrong type"),
        pytest.param(
            recipe_of("{match: '*layrs.*', use: fp8}", "{match: '*', use: bf16}"),
            r"rule 1 '\*layrs\.\*' matches none of the 8 linears.*Closest.*Correct the rule",
            id="rule that matches nothing",
        ),
        pytest.param(
            recipe_of("{match: '*layers.*', use: fp8}"), "linear 'lm_head' has no rule.*End the rules", id="no rule"
        ),
        pytest.param(
            given("backend=triton"),
            "triton cannot be used.*Use backend=auto",
            id="triton without a GPU",
            marks=pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="there is a GPU"),
        ),
        pytest.param(data_of(None), "given.txt does not exist.*Correct the path", id="missing data"),
        pytest.param(data_of(b""), "given.txt is empty; needs text", id="empty data"),
        pytest.param(data_of(b"good \xff\xfe bad" * 900), r"not UTF-8 at byte 5 \(0xff\).*iconv", id="not UTF-8"),
        pytest.param(data_of(b"hello"), "got 6 tokens.*needs at least 130.*Give more text", id="too little data"),
        pytest.param(given("model.vocab_size=200"), "token id 256 .*model.vocab_size=257", id="id beyond vocabulary"),
        pytest.param(given("micro_batch_samples=3"), "needs a divisor of the 8 sequences", id="micro-batch"),
        pytest.param(
            foreign_checkpoint, "neither a run folder.*nor a checkpoint.*Correct the path", id="foreign checkpoint"
        ),
        pytest.param(cut_off_model, "model.safetensors: damaged, cut off or unreadable.*Fetch", id="init_from cut off"),
        pytest.param(given("model=hf"), "model: no size is given.*model.init_from=DIR", id="hf without a folder"),
        pytest.param(given("run_dir="), "run_dir: got an empty text; needs a folder", id="empty run_dir"),
    ],
)
def test_mistake_is_one_line_and_leaves_no_folder(
    arguments: Prepared, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    base = tiny_arguments(tmp_path, run="made/for/it")
    extra = arguments(tmp_path)
    if "model=hf" in extra:
        base = [argument for argument in base if not argument.startswith("model.")]
    assert exit_code(train.main, [*base, *extra]) == 2
    assert_one_line(capsys, message)
    assert not (tmp_path / "made").exists()
    assert not any((tmp_path / "here").iterdir())


def test_port_in_use_is_one_line_and_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in (("RANK", 0), ("WORLD_SIZE", 2), ("LOCAL_RANK", 0), ("MASTER_PORT", port)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        assert exit_code(train.main, [*tiny_arguments(tmp_path), "parallel.timeout_seconds=5"]) == 2
    assert_one_line(capsys, rf"port {port} \(MASTER_PORT\) is in use; needs a free one.*--standalone")
    assert not (tmp_path / "run").exists()


class TestDiskThatFillsUp:
    def test_while_a_run_saves(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The checkpoint before stays, nothing half-written does, and the same command then goes on to the end."""
        arguments = tiny_arguments(tmp_path, "checkpoint.every=3")
        tiny_train(tmp_path, "steps=3")
        with files_of_at_most(100_000):
            assert exit_code(train.main, arguments) == 2
        assert_one_line(capsys, "step_00000006: cannot be written: File too large.*make room")
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000003"]
        assert not temporary_files(tmp_path)
        assert exit_code(train.main, arguments) == 0
        assert json.loads((tmp_path / "run" / "result.json").read_text())["finished"]

    @pytest.mark.parametrize(
        ("recipe", "each", "options", "number", "message"),
        [
            ("blockwise", 12, ("checkpoint.minutes=null",), 1, "needs .* for one checkpoint. Make room, or give"),
            ("deepseek_v3", 8, ("checkpoint.minutes=null",), 1, "needs .* for one checkpoint. Make room, or give"),
            ("blockwise", 12, (), 3, "needs .* for 3 more checkpoints of .*keep fewer .checkpoint.keep_last"),
            ("blockwise", 12, ("checkpoint.every=1", "checkpoint.keep_last=4"), 5, "for 5 more checkpoints"),
        ],
        ids=["one", "one with BF16 moments", "by default", "more are kept"],
    )
    def test_before_a_run_begins_for_want_of_space(
        self,
        recipe: str,
        each: int,
        options: tuple[str, ...],
        number: int,
        message: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A parameter takes 4 bytes and its two moments 8 in FP32, 4 in BF16."""
        tiny_train(tmp_path, run="size")
        size = number * each * json.loads((tmp_path / "size" / "result.json").read_text())["parameters"]
        usage, arguments = shutil.disk_usage(tmp_path), tiny_arguments(tmp_path, f"recipe={recipe}", *options)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=size - 1))
        assert exit_code(train.main, arguments) == 2
        assert_one_line(capsys, f"run_dir: the disk of .* free; .*{message}")
        assert not (tmp_path / "run").exists()
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=size))
        assert exit_code(train.main, arguments) == 0

    def test_while_a_run_begins(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = tiny_arguments(tmp_path)
        with files_of_at_most(1000):
            assert exit_code(train.main, arguments) == 2
        assert_one_line(capsys, "cannot be written .File too large.; needs a writable folder with space")
        assert not temporary_files(tmp_path)

    def test_while_a_resumed_run_cuts_its_metrics(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        metrics = padded_metrics(tmp_path)
        before = metrics.read_bytes()
        with files_of_at_most(100_000):
            assert exit_code(train.main, tiny_arguments(tmp_path)) == 2
        assert_one_line(capsys, "metrics.jsonl: cannot be written .File too large.")
        assert metrics.read_bytes() == before
        assert not temporary_files(tmp_path)

    def test_while_a_run_writes_its_metrics(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The run stops, and the same command then goes on without a row missing."""
        metrics = padded_metrics(tmp_path)
        with files_of_at_most(metrics.stat().st_size + 50):
            assert exit_code(train.main, tiny_arguments(tmp_path)) == 1
        assert_one_line(capsys, "metrics.jsonl: the row of step 4 cannot be written .File too large.", "failed")
        assert not (tmp_path / "run" / "result.json").exists()
        assert exit_code(train.main, tiny_arguments(tmp_path)) == 0
        rows = [row["step"] for row in read_metrics(metrics) if "loss" in row]
        assert rows == [1, 2, 3, 4, 5, 6]

    @pytest.mark.parametrize("workers", [1, 2])
    def test_while_shards_are_written(self, workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "long.txt").write_text("many words\n" * 20_000)
        call = ["data=text", f"data.path={tmp_path}/*.txt", f"out={tmp_path / 'out'}", f"workers={workers}"]
        call += ["shard_bytes=100000"]
        with files_of_at_most(50_000):
            assert exit_code(prepare.main, call) == 2
        assert_one_line(capsys, "out: .*out cannot be written .File too large..*Free space")
        assert not temporary_files(tmp_path)
        assert not (tmp_path / "out" / "index.json").exists()
        assert exit_code(prepare.main, call) == 0

    def test_while_a_model_is_exported(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = tiny_train(tmp_path, "steps=1").run_dir
        with files_of_at_most(100_000):
            assert exit_code(export.main, [f"checkpoint={run}", f"out={tmp_path / 'hf'}"]) == 2
        assert_one_line(capsys, "hf: cannot be written.*Free space")
        assert not (tmp_path / "hf").exists() and not list(tmp_path.glob(".hf*"))


def test_damaged_metrics_are_one_line_that_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_train(tmp_path, "steps=2")
    metrics = tmp_path / "run" / METRICS_FILE
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join([lines[0], '{"step": 2, "lo\n', *lines[1:]]))
    assert exit_code(train.main, tiny_arguments(tmp_path)) == 2
    assert_one_line(capsys, "metrics.jsonl: line 2 is damaged.*Delete the line")


def test_metrics_that_cannot_be_opened_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / METRICS_FILE).symlink_to(tmp_path / "gone" / METRICS_FILE)
    assert exit_code(train.main, tiny_arguments(tmp_path)) == 2
    assert_one_line(capsys, "metrics.jsonl: cannot be written .No such file.*give another run_dir")


def assert_one_line(capsys: pytest.CaptureFixture[str], message: str, kind: str = "error") -> None:
    """stderr is one line, of that form."""
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.startswith(f"fp8train: {kind}: ") and error.count("\n") == 1, error


def temporary_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".partial"))]
