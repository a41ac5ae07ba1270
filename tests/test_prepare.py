"""prepare: the same bytes for any number of workers and after any interruption; nothing half-written is read."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fp8train.data import DataConfig, build_dataset
from fp8train.errors import DataError, exit_code
from fp8train.prepare import PrepareConfig, main, prepare
from tests.source_tree import ROOT

LINES = 4000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {n} " + "abc " * (n % 13)}) + "\n" for n in range(LINES)))
    return file


def make_config(source: Path, out: Path, workers: int = 1, **options: object) -> PrepareConfig:
    data = DataConfig(kind="jsonl", path=str(source))
    return PrepareConfig(out=out, workers=workers, shard_bytes=8192, data=data, **options)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_bytes_do_not_depend_on_the_number_of_workers(source: Path, tmp_path: Path) -> None:
    index = prepare(make_config(source, tmp_path / "one"))
    assert index["documents"] == LINES
    assert len(index["shards"]) > 10
    prepare(make_config(source, tmp_path / "two", workers=2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_call_is_continued_to_the_same_bytes(workers: int, source: Path, tmp_path: Path) -> None:
    prepare(make_config(source, tmp_path / "whole"))
    out = tmp_path / "killed"
    arguments = ["data=jsonl", f"data.path={source}", f"out={out}", f"workers={workers}", "shard_bytes=8192"]
    code = "import os, sys; from fp8train import prepare; "
    code += "prepare.print = lambda *_, **__: os.kill(os.getpid(), 9); prepare.main(sys.argv[1:])"  # at the first shard
    # captured: this waits for the workers too, which have the same output and end after their parent
    killed = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = len(list(out.glob("shard_*.json")))
    with pytest.raises(DataError, match="is not finished"):
        build_dataset(DataConfig(kind="tokens", path=str(out)), 32, 1)
    assert done >= 1
    lines: list[str] = []
    prepare(make_config(source, out), report=lines.append)
    assert lines[0].startswith("going on: ")
    assert contents(out) == contents(tmp_path / "whole")


def test_half_written_files_are_written_again(source: Path, tmp_path: Path) -> None:
    prepare(make_config(source, tmp_path / "whole"))
    prepare(make_config(source, tmp_path / "out"))
    (tmp_path / "out" / "shard_00002.json").unlink()
    (tmp_path / "out" / "shard_00003.bin").write_bytes(b"half")
    (tmp_path / "out" / ".shard_00004.bin.1.tmp").write_bytes(b"half")
    prepare(make_config(source, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_finished_folder_is_left_as_it_is(source: Path, tmp_path: Path) -> None:
    prepare(make_config(source, tmp_path / "out"))
    before = (tmp_path / "out" / "shard_00000.bin").stat().st_mtime_ns
    lines: list[str] = []
    prepare(make_config(source, tmp_path / "out", workers=2), report=lines.append)
    assert len(lines) == 1
    assert (tmp_path / "out" / "shard_00000.bin").stat().st_mtime_ns == before


def test_streamed_dataset_is_continued_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")

    def config(out: Path) -> PrepareConfig:
        data = DataConfig(kind="hf", path=str(source), hf_streaming=True)
        return PrepareConfig(out=out, shard_bytes=8192, data=data)

    index = prepare(config(tmp_path / "whole"))
    assert index["documents"] == LINES
    prepare(config(tmp_path / "out"))
    for file in (tmp_path / "out").glob("shard_0000[2-9].json"):
        file.unlink()
    lines: list[str] = []
    prepare(config(tmp_path / "out"), report=lines.append)
    assert lines[0].startswith("going on after 2 shards: skipped ")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_workers_start_without_torch() -> None:
    """Spawned workers import the command again; torch would cost each of them seconds."""
    code = "import sys, fp8train.prepare, fp8train.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_command_names_totals_and_next_step(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data=jsonl", f"data.path={source}", f"out={tmp_path / 'out'}", "workers=1"]) == 0
    output = capsys.readouterr().out.splitlines()
    assert output[-2].startswith(f"prepared {tmp_path / 'out'}: 4,000 documents, ")
    assert output[-1].endswith("model.vocab_size=257 (which model.init_from has by itself)")


def test_worker_passes_a_bad_line_on(source: Path, tmp_path: Path) -> None:
    with source.open("a") as file:
        file.write("not json\n")
    with pytest.raises(DataError, match=f"rows.jsonl:{LINES + 1} is not JSON"):
        prepare(make_config(source, tmp_path / "out", workers=2))
    assert not (tmp_path / "out" / "index.json").exists()


def test_folder_in_use_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="is being written by another prepare"):
            prepare(make_config(source, tmp_path / "out"))


def test_changed_source_is_refused(source: Path, tmp_path: Path) -> None:
    prepare(make_config(source, tmp_path / "out"))
    source.write_text(source.read_text() + '{"text": "more"}\n')
    with pytest.raises(DataError, match="was begun with other values of files, pieces"):
        prepare(make_config(source, tmp_path / "out"))


def test_folder_of_other_files_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds other files .rows.jsonl.; needs an empty folder"):
        prepare(make_config(source, tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=stdlib"], "out is not given"),
        (["data=jsonl", "out=o"], "data.path: is not given"),
        (["data=json", "out=o"], "data=json is not known; needs one of hf, jsonl, mix, stdlib, text, tokens"),
        (["data=mix", "out=o"], "data.kind: is mix; prepare needs stdlib, text, jsonl or hf"),
        (["data=stdlib", "out=o", "worker=2"], "unknown key 'worker'; nearest: workers"),
        (["data=stdlib", "out=o", "workers=0"], "workers: is 0; needs at least 1"),
        (["data=stdlib", "out=/proc/nothing"], "out: /proc/nothing cannot be written"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_line_and_status_two(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_code(main, arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("o/*.bin"))
