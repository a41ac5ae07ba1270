"""Hugging Face datasets: stored and streamed, local files and saved datasets, and what a missing package says."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fp8train.data import Batcher, DataConfig, SourceConfig, build_dataset, check_vocabulary
from fp8train.data.stream import StreamedDataset
from fp8train.errors import DataError
from fp8train.trainer.console import Console
from tests.data.corpora import make_documents
from tests.tiny_run import tiny_train

datasets = pytest.importorskip("datasets")
pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
TEXTS = [document.decode() for document in make_documents(400, longest=100)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a test stays in the user's cache, and nothing of it is shown as a bar."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"id": n, "body": text}) + "\n" for n, text in enumerate(TEXTS)))
    return file


def make_config(path: Path, **options: object) -> DataConfig:
    return DataConfig(kind="hf", path=str(path), text_key="body", holdout_fraction=0.2, **options)  # type: ignore[arg-type]


def test_stored_rows_equal_the_same_lines_read_as_jsonl(jsonl: Path) -> None:
    stored = build_dataset(make_config(jsonl), 16, 1)
    lines = DataConfig(kind="jsonl", path=str(jsonl), text_key="body", holdout_fraction=0.2)
    assert stored.fingerprint == build_dataset(lines, 16, 1).fingerprint


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_dataset_is_read(streaming: bool, tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"body": TEXTS}).save_to_disk(tmp_path / "saved")
    dataset = build_dataset(make_config(tmp_path / "saved", hf_streaming=streaming), 16, 1)
    assert dataset.streaming is streaming
    assert len(dataset.sample(3).tokens) == 17


def test_stream_is_one_seeded_order_for_any_number_of_ranks(jsonl: Path) -> None:
    def hashes(seed: int, world_size: int) -> list[list[int]]:
        parts = [
            Batcher(build_dataset(make_config(jsonl, hf_streaming=True), 16, seed), 4, 1, rank, world_size)
            for rank in range(world_size)
        ]
        steps = [[part.micro_batches(step) for part in parts] for step in range(8)]
        return [rank[m].tokens[0].tolist() for step in steps for m in range(4 // world_size) for rank in step]

    assert hashes(1, 1) == hashes(1, 2) == hashes(1, 4)
    assert hashes(1, 1) != hashes(2, 1)


def test_stream_windows_continue_each_other_and_number_their_documents(jsonl: Path) -> None:
    dataset = build_dataset(make_config(jsonl, hf_streaming=True, document_mask=True), 16, 1)
    windows = [dataset.sample(index) for index in range(50)]
    for window, following in zip(windows, windows[1:], strict=False):
        assert window.tokens[-1] == following.tokens[0]
    for window in windows:
        assert window.document_ids[0] == 0
        changes = np.flatnonzero(np.diff(window.document_ids))
        assert np.array_equal(changes, np.flatnonzero(window.tokens[:-1] == 256))


def test_skip_reaches_the_same_sample_and_says_its_cost(jsonl: Path) -> None:
    read, skipped = (build_dataset(make_config(jsonl, hf_streaming=True), 16, 1) for _ in range(2))
    expected = [read.sample(index).tokens for index in range(30)][29]
    cost = skipped.skip_to(29)
    assert "sample 29" in cost
    assert "tokenised 464 tokens" in cost
    assert " documents" in cost and cost.endswith(" s")
    assert np.array_equal(skipped.sample(29).tokens, expected)
    assert np.array_equal(skipped.sample(29).tokens, expected), "going back starts the stream again"


@pytest.mark.parametrize("index", [1, 30, 2600], ids=["first", "middle", "second epoch"])
@pytest.mark.parametrize("behind", [0, 3], ids=["at it", "by a rank that is behind"])
def test_noted_position_of_a_stream_is_reached_without_its_tokens(index: int, behind: int, jsonl: Path) -> None:
    read, skipped = (build_dataset(make_config(jsonl, hf_streaming=True), 16, 1) for _ in range(2))
    for passed in range(max(1, index - behind)):
        read.sample(passed)
    noted = json.loads(json.dumps(read.stream_positions()))
    windows = [read.sample(further) for further in range(index, index + 300)]
    for dataset in (skipped, read):  # after a resume, and where an alarm goes back
        cost = dataset.skip_to(index, noted)
        assert f"tokenised {16 * (index - noted[0]['sample'])} tokens" in cost
        for window, sample in zip(windows, range(index, index + 300), strict=True):
            again = dataset.sample(sample)
            assert np.array_equal(again.tokens, window.tokens)
            assert np.array_equal(again.document_ids, window.document_ids)
    before = noted[0]["sample"] - 1
    assert f"tokenised {16 * before:,} tokens" in skipped.skip_to(before, noted), "it lies beyond"


def test_run_on_a_stream_goes_on_where_it_was_without_tokenising_it_again(jsonl: Path, tmp_path: Path) -> None:
    said: list[str] = []
    console = Console(enabled=False)
    console.info = said.append  # type: ignore[method-assign]
    options = (
        "data=hf",
        f"data.path={jsonl}",
        "data.text_key=body",
        "data.hf_streaming=true",
        "data.document_bytes=null",
    )
    tiny_train(tmp_path, *options, "steps=3")
    resumed = tiny_train(tmp_path, *options, "steps=5", console=console)
    assert resumed.stream_hash == tiny_train(tmp_path, *options, "steps=5", run="straight").stream_hash
    assert any("at step 3; data position: sample 24 of" in line and "tokenised 0 tokens" in line for line in said)


def test_stream_goes_on_in_another_order_after_its_end(jsonl: Path) -> None:
    dataset = build_dataset(make_config(jsonl, hf_streaming=True), 16, 1)
    stream = bytes(b"\n"[0] if token == 256 else token for n in range(4000) for token in dataset.sample(n).tokens[1:])
    documents = stream.decode().split("\n")[1:-1]  # the first lacks the token that is no target
    size = len({*documents})
    first, second = documents[: size - 1], documents[size - 1 : 2 * size - 1]
    assert 200 < size < len(TEXTS)
    assert len({*second}) == size
    assert [text for text in second if text in first] != first


def test_stream_never_trains_on_what_it_holds_out(jsonl: Path) -> None:
    dataset = build_dataset(make_config(jsonl, hf_streaming=True, eval_windows=10**6), 16, 1)
    held = np.concatenate([sample.tokens[:-1] for sample in dataset.eval_samples()])
    trained = np.concatenate([dataset.sample(index).tokens[:-1] for index in range(600)])
    split = [
        bytes(part.tolist()) for part in np.split(held, np.flatnonzero(held == 256) + 1)[1:-1] for part in [part[:-1]]
    ]
    text = "".join(chr(token) for token in trained)
    assert len(split) > 10
    assert not [document for document in split if f"\u0100{document.decode()}\u0100" in text]


def test_evaluation_of_a_stream_is_fixed_and_leaves_its_position(jsonl: Path) -> None:
    one, two = (build_dataset(make_config(jsonl, hf_streaming=True, eval_windows=6), 16, seed) for seed in (1, 2))
    one.sample(5)
    assert [s.tokens.tolist() for s in one.eval_samples()] == [s.tokens.tolist() for s in two.eval_samples()]
    assert len(one.eval_samples()) == 6
    assert isinstance(one, StreamedDataset)
    assert one._next == 6


def test_mix_of_stored_and_streamed_sources(jsonl: Path) -> None:
    stream = SourceConfig(kind="hf", path=str(jsonl), text_key="body", hf_streaming=True, weight=3)
    config = DataConfig(kind="mix", mix=[stream, SourceConfig(kind="stdlib")])
    read, skipped = build_dataset(config, 16, 1), build_dataset(config, 16, 1)
    assert read.streaming
    expected = [read.sample(index).tokens for index in range(21)][20]
    assert "documents" in skipped.skip_to(20)
    assert np.array_equal(skipped.sample(20).tokens, expected)
    noted = skipped.stream_positions()
    assert len(noted) == 1
    fresh = build_dataset(config, 16, 1)
    assert "tokenised 0 tokens" in fresh.skip_to(21, noted)
    assert np.array_equal(fresh.sample(21).tokens, skipped.sample(21).tokens)


def test_vocabulary_of_a_stream_is_that_of_its_tokenizer(jsonl: Path) -> None:
    dataset = build_dataset(make_config(jsonl, hf_streaming=True), 16, 1)
    check_vocabulary(dataset, 257)
    with pytest.raises(DataError, match="bytes has 257 ids; the model has 200"):
        check_vocabulary(dataset, 200)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({}, "neither data.hf_name nor data.path is given", id="no-name"),
        pytest.param({"path": "nowhere.parquet"}, "nowhere.parquet cannot be loaded", id="missing-file"),
        pytest.param({"path": "rows.xyz"}, "no reader for files named rows.xyz", id="unknown-suffix"),
        pytest.param(
            {"path": "rows.jsonl", "text_key": "txt"}, "has the columns id, body; needs 'txt'", id="no-column"
        ),
        pytest.param({"path": "rows.jsonl", "text_key": "id"}, "row 0 of .* has a int under 'id'", id="not-text"),
        pytest.param({"path": "rows.jsonl", "hf_split": "dev"}, "cannot be loaded .*dev", id="no-split"),
        pytest.param(
            {"path": "rows.jsonl", "text_key": "id", "hf_streaming": True}, "has a int under 'id'", id="stream"
        ),
    ],
)
def test_bad_dataset_is_one_line(
    options: dict[str, object], message: str, jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(jsonl.parent)
    with pytest.raises(DataError, match=message) as caught:
        build_dataset(DataConfig(kind="hf", **options), 16, 1).sample(0)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'fp8train\[hf\]'"):
        build_dataset(DataConfig(kind="hf", hf_name="owner/name"), 16, 1)


@pytest.mark.parametrize("streaming", [False, True])
def test_null_rows_are_passed_over_as_empty_ones_are(streaming: bool, tmp_path: Path) -> None:
    sizes = {}
    for name, extra in (("plain", []), ("holes", [None, "", None])):
        datasets.Dataset.from_dict({"body": [*TEXTS, *extra]}).save_to_disk(tmp_path / name)
        dataset = build_dataset(make_config(tmp_path / name, hf_streaming=streaming, hf_shuffle_buffer=0), 16, 1)
        sizes[name] = [dataset.sample(index).tokens.tolist() for index in range(50)]
    assert sizes["plain"] == sizes["holes"]


def test_split_that_a_saved_dataset_does_not_have_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"body": TEXTS}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="no split 'validation'; there are train"):
        build_dataset(make_config(tmp_path / "saved", hf_split="validation"), 16, 1)
    with pytest.raises(DataError, match="data.hf_revision is given, which a saved dataset has no use for"):
        build_dataset(make_config(tmp_path / "saved", hf_revision="main"), 16, 1)


def test_stream_is_known_by_its_files_and_not_by_where_they_lie(jsonl: Path, tmp_path: Path) -> None:
    first = build_dataset(make_config(jsonl, hf_streaming=True), 16, 1).fingerprint
    moved = tmp_path / "elsewhere" / jsonl.name
    moved.parent.mkdir()
    jsonl.rename(moved)
    assert build_dataset(make_config(moved, hf_streaming=True), 16, 1).fingerprint == first
    moved.write_text(moved.read_text() + json.dumps({"id": 0, "body": "more"}) + "\n")
    assert build_dataset(make_config(moved, hf_streaming=True), 16, 1).fingerprint != first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("cut.jsonl", '{"body": "a"}\n{"body": ', "cut.jsonl cannot be (read|loaded)", id="broken line"),
        pytest.param("none.jsonl", "", "none.jsonl cannot be loaded", id="nothing"),
        pytest.param("half.jsonl", '{"body": "\\ud800"}\n', "cannot be read|surrogate", id="half a surrogate pair"),
    ],
)
def test_damaged_stream_is_one_line(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        build_dataset(make_config(tmp_path / name, hf_streaming=True, hf_shuffle_buffer=0), 16, 1).sample(0)


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
def test_file_with_a_byte_that_is_no_text_is_one_line(streaming: bool, tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    table = pyarrow.table({"body": ["what is to be found " * 4] * 40})
    parquet.write_table(table, file, compression="none")  # so that the text lies in the file as it is
    file.write_bytes(file.read_bytes().replace(b"found", b"f\xffund"))
    with pytest.raises(DataError, match=r"rows.parquet cannot be read (from|after) .* Correct the file"):
        build_dataset(make_config(file, hf_streaming=streaming, hf_shuffle_buffer=0), 16, 1).sample(0)


def test_rows_that_are_formatted_are_read_as_text(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_dict({"body": TEXTS, "n": list(range(len(TEXTS)))})
    saved.with_format("numpy", columns=["n"]).save_to_disk(tmp_path / "saved")
    assert len(build_dataset(make_config(tmp_path / "saved"), 16, 1).sample(0).tokens) == 17


def test_folder_that_is_no_saved_dataset_names_its_files_as_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder, and not one of save_to_disk; name its files: data.path='.*/\*'"):
        build_dataset(make_config(tmp_path, hf_name="json"), 16, 1)


def test_stream_that_an_earlier_version_began_is_known_again(jsonl: Path) -> None:
    dataset = build_dataset(make_config(jsonl, hf_streaming=True), 16, 1)
    parts = [None, None, "train", None, [str(jsonl)], "body", 10_000]  # the identity that 5d29ac9 wrote
    old = hashlib.sha256(repr(parts).encode()).hexdigest()
    key = f"{old} tokenizer {dataset.tokenizer.hash} threshold {dataset.splits[0].threshold} seq_len 16"
    assert dataset.former_fingerprints == [hashlib.sha256(key.encode()).hexdigest()]


def test_what_datasets_puts_into_a_saved_folder_is_no_part_of_the_stream(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"body": TEXTS}).save_to_disk(tmp_path / "saved")
    first = build_dataset(make_config(tmp_path / "saved", hf_streaming=True), 16, 1).fingerprint
    datasets.load_from_disk(str(tmp_path / "saved")).filter(lambda row: len(row["body"]) > 3)
    (tmp_path / "saved" / "cache-1234.arrow").write_text("")
    assert build_dataset(make_config(tmp_path / "saved", hf_streaming=True), 16, 1).fingerprint == first
