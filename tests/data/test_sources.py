"""Sources: what they read, in which order, how they are cut, and the one line that each kind of bad input gets."""

from __future__ import annotations

import json
import os
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from fp8train.data.config import SourceConfig
from fp8train.data.sources import cut_size, plan_pieces, read_piece, source_files, stdlib_files
from fp8train.errors import DataError


def read_all(source: SourceConfig, piece_bytes: int = 1 << 26) -> list[bytes]:
    return [document for piece in plan_pieces(source, piece_bytes) for document in read_piece(source, piece)]


def test_stdlib_is_sorted_real_text_without_tests_and_site_packages() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    names = [file.relative_to(root).as_posix() for file in stdlib_files()]
    assert names == sorted(names)
    assert {"ast.py", "json/decoder.py"} <= set(names)
    assert not {"test", "tests", "site-packages", "dist-packages"} & {
        part for name in names for part in name.split("/")
    }
    # about 11 MB (reference/ecosystem.md 8); builds differ by a few modules
    assert 5e6 < sum((root / name).stat().st_size for name in names) < 20e6


def test_glob_list_and_file_are_read_once_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(f"text of {name}")
    source = SourceConfig(kind="text", path=[str(tmp_path / "*.txt"), str(tmp_path / "b.txt")], document_bytes=100)
    assert read_all(source) == [b"text of a.txt", b"text of b.txt"]


def test_empty_files_of_a_glob_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").touch()
    assert read_all(SourceConfig(kind="text", path=str(tmp_path / "*.txt"), document_bytes=9)) == [b"text"]


@pytest.mark.parametrize("document_bytes", [1, 2, 7, 64, 5000])
def test_cut_files_lose_no_byte_and_split_no_character(document_bytes: int, tmp_path: Path) -> None:
    text = "caf\u00e9 \u6f22\u5b57\U0001f642\nline\n\n" * 40 + "no line end " * 20
    (tmp_path / "a.txt").write_text(text)
    documents = read_all(SourceConfig(kind="text", path=str(tmp_path / "a.txt"), document_bytes=document_bytes))
    assert b"".join(documents) == text.encode()
    assert all(document.decode() for document in documents)
    assert max(map(len, documents)) <= document_bytes + 3  # the rest of a character


def test_few_files_are_cut_and_many_are_not(tmp_path: Path) -> None:
    small, large = tmp_path / "small.txt", tmp_path / "large.txt"
    for file, size in ((small, 20_000), (large, 10**8)):
        file.touch()
        os.truncate(file, size)  # without a block on the disk
    assert cut_size([small]) == 256
    assert cut_size([large] * 31) == 65536
    assert cut_size([large] * 32) is None


@pytest.mark.parametrize("piece_bytes", [1, 17, 100, 10_000])
def test_jsonl_documents_are_the_texts_that_there_are_whatever_the_pieces(piece_bytes: int, tmp_path: Path) -> None:
    texts = [f"text {n} " + "x" * (n * 7 % 50) for n in range(40)]
    lines = [json.dumps({"id": n, "text": text}) for n, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:20], "", '{"text": null}', '{"text": ""}', *lines[20:]]))
    source = SourceConfig(kind="jsonl", path=str(tmp_path / "a.jsonl"))
    assert [document.decode() for document in read_all(source, piece_bytes)] == texts


@pytest.mark.parametrize("piece_bytes", [1, 100, 10_000])
def test_text_documents_do_not_depend_on_the_pieces(piece_bytes: int, tmp_path: Path) -> None:
    for n in range(5):
        (tmp_path / f"{n}.txt").write_text(f"{n}\n" * 100)
    source = SourceConfig(kind="text", path=str(tmp_path / "*.txt"))
    assert read_all(source, piece_bytes) == read_all(source)


def write(name: str, content: bytes) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return make


@pytest.mark.parametrize(
    ("kind", "make", "message"),
    [
        pytest.param("text", lambda folder: None, "data.path: is not given", id="no-path"),
        pytest.param("text", lambda folder: str(folder / "no.txt"), "no.txt does not exist", id="missing"),
        pytest.param("text", lambda folder: str(folder / "*.no"), "matches no file", id="empty-glob"),
        pytest.param("text", lambda folder: str(folder), "is a folder", id="folder"),
        pytest.param("text", write("a.txt", b""), "a.txt is empty", id="empty"),
        pytest.param("text", write("a.txt", b"ab\ncd\xffef"), r"a.txt is not UTF-8 at byte 5 \(0xff\)", id="not-utf8"),
        pytest.param("text", write("a.gz", b"\x1f\x8b\x08"), "looks compressed", id="compressed"),
        pytest.param(
            "jsonl", write("a.jsonl", b'{"text": "a"}\n\n{"text": \n'), "a.jsonl:3 is not JSON", id="not-json"
        ),
        pytest.param(
            "jsonl", write("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n'), "a.jsonl:2 has the keys 'body'", id="key"
        ),
        pytest.param("jsonl", write("a.jsonl", b'"text"\n'), "a.jsonl:1 is a str; needs an object", id="not-an-object"),
        pytest.param("jsonl", write("a.jsonl", b'{"text": 7}\n'), "a.jsonl:1 has a int under 'text'", id="not-text"),
        pytest.param("jsonl", write("a.jsonl", b'{}\n{"text": "\xff"}'), "'text'", id="first-bad-line-wins"),
        pytest.param("jsonl", write("a.jsonl", b'{"text": "\xff"}'), "not UTF-8 at byte 10", id="jsonl-not-utf8"),
        pytest.param(
            "jsonl", write("a.jsonl", b'{"text": "\\ud800"}'), "a.jsonl:1 holds half a surrogate", id="surrogate"
        ),
    ],
)
def test_bad_input_is_one_line(kind: str, make: Callable[[Path], str | None], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_all(SourceConfig(kind=kind, path=make(tmp_path)), piece_bytes=8)
    assert "\n" not in str(caught.value)
    assert re.search(r"\.$", str(caught.value)), "the remedy ends the message"


def test_order_is_that_of_the_paths_as_given_and_a_file_is_read_once(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name, blob in (("a.txt", "zzz"), ("b.txt", "aaa"), ("c.txt", "zzz")):
        (blobs / blob).write_text(blob)
        (tmp_path / name).symlink_to(blobs / blob)
    source = SourceConfig(kind="text", path=[str(tmp_path / "*.txt"), str(tmp_path / "b.txt")])
    assert [file.name for file in source_files(source)] == ["a.txt", "b.txt"]
