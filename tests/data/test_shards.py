"""Token shards: the same samples as the text they came from, and one line for what is foreign or damaged."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fp8train.data import DataConfig, build_dataset, check_vocabulary
from fp8train.data import shards as shards_module
from fp8train.errors import DataError
from fp8train.prepare import PrepareConfig, prepare


@pytest.fixture
def folder(text_file: Path, tmp_path: Path) -> Path:
    """Byte shards of the text file, several of them."""
    for n in range(4):
        (tmp_path / f"more_{n}.txt").write_text("".join(f"{n} {k} more text to read\n" for k in range(300)))
    data = DataConfig(kind="text", path=str(tmp_path / "*.txt"))
    prepare(PrepareConfig(out=tmp_path / "shards", workers=1, shard_bytes=9000, data=data))
    return tmp_path / "shards"


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_shards_give_the_samples_of_their_text(tokenizer: str, tmp_path: Path, text_file: Path, bpe_file: Path) -> None:
    name = "bytes" if tokenizer == "bytes" else str(bpe_file)
    data = DataConfig(kind="text", path=str(text_file), tokenizer=name)
    prepare(PrepareConfig(out=tmp_path / "out", workers=1, data=data))
    from_text = build_dataset(data, 32, seed=3)
    from_shards = build_dataset(DataConfig(kind="tokens", path=str(tmp_path / "out")), 32, seed=3)
    assert from_shards.fingerprint == from_text.fingerprint
    assert from_shards.tokenizer.hash == from_text.tokenizer.hash
    for index in (0, 7, 1000):
        assert np.array_equal(from_shards.sample(index).tokens, from_text.sample(index).tokens)
    for a, b in zip(from_shards.eval_samples(), from_text.eval_samples(), strict=True):
        assert np.array_equal(a.tokens, b.tokens)


def test_shards_are_mapped_not_read(folder: Path) -> None:
    dataset = build_dataset(DataConfig(kind="tokens", path=str(folder)), 32, seed=1)
    segments = dataset.corpus.segments  # type: ignore[attr-defined]
    assert len(segments) > 2
    assert all(isinstance(segment, np.memmap) and segment.dtype == np.uint16 for segment in segments)


def test_several_folders_are_one_corpus(folder: Path, tmp_path: Path) -> None:
    one = build_dataset(DataConfig(kind="tokens", path=str(folder)), 32, seed=1)
    shutil.copytree(folder, tmp_path / "copy")
    paths = [str(folder), str(tmp_path / "copy"), f"{folder}/../{folder.name}"]  # the last is the first again
    both = build_dataset(DataConfig(kind="tokens", path=paths), 32, seed=1)
    assert both.corpus.tokens == 2 * one.corpus.tokens  # type: ignore[attr-defined]


def test_damage_in_a_middle_block_is_found_by_verify_and_does_not_reach_the_model(
    monkeypatch: pytest.MonkeyPatch, text_file: Path, tmp_path: Path
) -> None:
    """The quick check leaves the middle out; reading an id that was never written is refused with a remedy."""
    monkeypatch.setattr(shards_module, "BLOCK_BYTES", 4096)
    prepare(PrepareConfig(out=tmp_path / "out", workers=1, data=DataConfig(kind="text", path=str(text_file))))
    data = tmp_path / "out" / "shard_00000.bin"
    content = bytearray(data.read_bytes())
    content[4096 : len(content) - 4096] = b"\xff" * (len(content) - 8192)
    data.write_bytes(content)
    dataset = build_dataset(DataConfig(kind="tokens", path=str(tmp_path / "out")), 32, 1)
    with pytest.raises(DataError, match="token id 65535, index.json says at most 256.*data.verify=true"):
        for index in range(dataset.samples_per_epoch):  # type: ignore[attr-defined]
            dataset.sample(index)
    with pytest.raises(DataError, match="differs from its checksum in block 1 "):
        build_dataset(DataConfig(kind="tokens", path=str(tmp_path / "out"), verify=True), 32, 1)


def truncate(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-2])

    return damage


def flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[0] ^= 255
        (folder / name).write_bytes(content)

    return damage


def unfinish(folder: Path) -> None:
    (folder / "index.json").unlink()


def rewrite_index(**values: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps(index | values))

    return damage


def shorter_document(folder: Path) -> None:
    """As a program would write it that counts the first document without its separator."""
    index = json.loads((folder / "index.json").read_text())
    side = folder / "shard_00000.idx"
    content = bytearray(side.read_bytes())
    content[:4] = (int.from_bytes(content[:4], "little") - 1).to_bytes(4, "little")
    side.write_bytes(content)
    index["shards"][0]["idx_crc32"] = zlib.crc32(content)
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(truncate("shard_00001.bin"), r"shard_00001.bin has \d+ bytes; needs", id="truncated-bin"),
        pytest.param(truncate("shard_00001.idx"), r"shard_00001.idx has \d+ bytes; needs", id="truncated-idx"),
        pytest.param(lambda folder: (folder / "shard_00000.bin").unlink(), "shard_00000.bin is missing", id="missing"),
        pytest.param(flip("shard_00000.bin"), "shard_00000.bin differs from its checksum in block 0", id="damaged-bin"),
        pytest.param(flip("shard_00000.idx"), "shard_00000.idx differs from its checksum", id="damaged-idx"),
        pytest.param(truncate("index.json"), "index.json is damaged", id="damaged-index"),
        pytest.param(rewrite_index(format="other"), "needs fp8train-tokens version 1", id="foreign-index"),
        pytest.param(rewrite_index(version=2), "'version': 2.*needs fp8train-tokens version 1", id="later-version"),
        pytest.param(rewrite_index(dtype="int16"), r"damaged \(dtype missing or odd\)", id="other-dtype"),
        pytest.param(rewrite_index(max_token_id=None), r"damaged \(max_token_id missing", id="no-number"),
        pytest.param(rewrite_index(shards=[{"name": "x"}]), r"damaged \(shards missing or odd\)", id="half-a-shard"),
        pytest.param(shorter_document, r"00.idx divides \d+ tokens; shard_00000.bin has \d+ ", id="other-lengths"),
        pytest.param(unfinish, "is not finished .* `fp8train prepare` again", id="unfinished"),
    ],
)  # fmt: skip
def test_damaged_folder_is_one_line(damage: Callable[[Path], None], message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        build_dataset(DataConfig(kind="tokens", path=str(folder)), 32, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "data.path: is not given"),
        ("nowhere", "does not exist"),
        ("nothing_*", "matches no folder"),
        ("text.txt", "is a file"),
        (".", "has no index.json"),
    ],
)
def test_foreign_path_is_one_line(path: str | None, message: str, text_file: Path) -> None:
    where = None if path is None else str(text_file.parent / path)
    with pytest.raises(DataError, match=message):
        build_dataset(DataConfig(kind="tokens", path=where), 32, 1)


def test_another_tokenizer_than_that_of_the_shards_is_refused(folder: Path, bpe_file: Path) -> None:
    with pytest.raises(DataError, match=r"another tokenizer \(bytes, 257 ids\) than .* \(300 ids\)"):
        build_dataset(DataConfig(kind="tokens", path=str(folder), tokenizer=str(bpe_file)), 32, 1)


def test_vocabulary_is_checked_from_the_index(folder: Path) -> None:
    dataset = build_dataset(DataConfig(kind="tokens", path=str(folder)), 32, 1)
    with pytest.raises(DataError, match="token id 256 is beyond the vocabulary of the model .100"):
        check_vocabulary(dataset, 100)
