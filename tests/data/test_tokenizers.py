"""Tokenizers: ids and back, exact byte counts, separators that no text can forge, one-line errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fp8train.data.tokenizers import ByteTokenizer, FileTokenizer, build_tokenizer
from fp8train.errors import DataError

UNICODE_TEXT = "na\u00efve caf\u00e9 \u6f22\u5b57 \U0001f642 <|endoftext|> x\n"


def test_bytes_round_trip_and_separator_is_outside_text() -> None:
    tokenizer = build_tokenizer("bytes")
    ids = tokenizer.encode(UNICODE_TEXT)
    assert tokenizer.decode(ids) == UNICODE_TEXT
    assert max(ids) < tokenizer.separator < tokenizer.vocab_size == 257


def test_bytes_of_counts_neither_separators_nor_masked_targets() -> None:
    assert ByteTokenizer().bytes_of([104, 105, 256, -100, 33]) == 3


@pytest.mark.parametrize("fixture", ["bpe_file", "sentencepiece_file"])
def test_file_tokenizer_counts_utf8_bytes_exactly(fixture: str, request: pytest.FixtureRequest) -> None:
    tokenizer = build_tokenizer(str(request.getfixturevalue(fixture)))
    text = "a caf\u00e9 \u6f22\u5b57 \U0001f642 of text\n"
    assert tokenizer.bytes_exact
    stream = [tokenizer.separator, *tokenizer.encode(text), tokenizer.separator, -100, *tokenizer.encode("x")[1:]]
    assert tokenizer.bytes_of(stream) == len(text.encode()) + len(tokenizer.encode("x")[1:])


@pytest.mark.parametrize("fixture", ["bpe_file", "sentencepiece_file"])
def test_file_tokenizer_round_trip(fixture: str, request: pytest.FixtureRequest) -> None:
    tokenizer = build_tokenizer(str(request.getfixturevalue(fixture)))
    text = "def caf\u00e9(x): return \u6f22\u5b57"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_cannot_forge_a_separator(bpe_file: Path) -> None:
    tokenizer = build_tokenizer(str(bpe_file))
    ids = tokenizer.encode(UNICODE_TEXT)
    assert tokenizer.separator not in ids
    assert tokenizer.decode(ids) == UNICODE_TEXT


def test_truncation_in_the_file_is_switched_off(bpe_file: Path) -> None:
    assert json.loads(bpe_file.read_text())["truncation"] is not None
    assert len(build_tokenizer(str(bpe_file)).encode("abcdefghij " * 9)) > 4


def test_batch_encoding_equals_single_encoding(bpe_file: Path) -> None:
    tokenizer = build_tokenizer(str(bpe_file))
    texts = ["def f(x):", UNICODE_TEXT, "\n"]
    batch = tokenizer.encode_documents([text.encode() for text in texts])
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]


def test_folder_takes_separator_of_its_configuration(bpe_file: Path, tmp_path: Path) -> None:
    document = json.loads(bpe_file.read_text())
    document["added_tokens"].append(document["added_tokens"][0] | {"id": 300, "content": "<|done|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|done|>"}}))
    tokenizer = build_tokenizer(str(tmp_path))
    assert isinstance(tokenizer, FileTokenizer)
    assert (tokenizer.separator, tokenizer.separator_token, tokenizer.vocab_size) == (300, "<|done|>", 301)
    assert build_tokenizer(str(tmp_path), "<|endoftext|>").hash != tokenizer.hash


def test_vocabulary_with_holes_ends_after_the_largest_id(bpe_file: Path, tmp_path: Path) -> None:
    document = json.loads(bpe_file.read_text())
    document["added_tokens"].append(document["added_tokens"][0] | {"id": 400, "content": "<|far|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    size = build_tokenizer(str(tmp_path)).vocab_size
    # `tokenizers` may renumber an added token; whatever it gives must lie below vocab_size
    assert size == 1 + max(build_tokenizer(str(tmp_path))._tokenizer.get_vocab().values())


def test_equal_files_have_equal_hashes(bpe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.json").write_bytes(bpe_file.read_bytes())
    assert build_tokenizer(str(bpe_file)).hash == build_tokenizer(str(tmp_path / "copy.json")).hash


def test_slow_tokenizer_folder_is_converted(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {token: n for n, token in enumerate([*sorted(ByteLevel.alphabet()), "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"})
    )
    tokenizer = build_tokenizer(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode("hi there")) == "hi there"
    assert tokenizer.bytes_of(np.asarray(tokenizer.encode("hi there"))) == 8


def test_code_in_a_tokenizer_folder_is_neither_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("builtins.input", lambda _: "y")  # transformers would ask, and wait, on every rank
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Own\n"
    )
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match="custom code"):
        build_tokenizer(str(tmp_path))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda folder, bpe: "nowhere.json", "is not there", id="missing"),
        pytest.param(lambda folder, bpe: "/proc/self/mem", "mem cannot be read .Input/output", id="unreadable"),
        pytest.param(
            lambda folder, bpe: _write(folder / "t.json", b"{}"), "is not a tokenizer.json", id="not-a-tokenizer"
        ),
        pytest.param(
            lambda folder, bpe: _write(folder / "t.json", b"\xff\xfe"), "is not a tokenizer.json", id="binary"
        ),
        pytest.param(lambda folder, bpe: _without_special(folder, bpe), "no end-of-text token", id="no-separator"),
        pytest.param(lambda folder, bpe: str(folder), "holds no tokenizer", id="empty-folder"),
        pytest.param(lambda folder, bpe: _with_settings(folder, bpe, b'{"eos'), "config.json cannot be read", id="cut"),
        pytest.param(lambda folder, bpe: _with_settings(folder, bpe, b"3"), "needs a JSON object", id="no-object"),
    ],
)
def test_bad_tokenizer_is_one_line(make: object, message: str, tmp_path: Path, bpe_file: Path) -> None:
    with pytest.raises(DataError, match=message):
        build_tokenizer(make(tmp_path, bpe_file))  # type: ignore[operator]


def test_missing_package_says_what_to_install(bpe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install 'fp8train\[hf\]'"):
        build_tokenizer(str(bpe_file))


def _write(file: Path, content: bytes) -> str:
    file.write_bytes(content)
    return str(file)


def _with_settings(folder: Path, bpe: Path, settings: bytes) -> str:
    _write(folder / "tokenizer.json", bpe.read_bytes())
    _write(folder / "tokenizer_config.json", settings)
    return str(folder)


def _without_special(folder: Path, bpe: Path) -> str:
    document = json.loads(bpe.read_text())
    document["added_tokens"] = []
    document["model"]["vocab"] = {
        ("plain" if token == "<|endoftext|>" else token): n for token, n in document["model"]["vocab"].items()
    }
    return _write(folder / "t.json", json.dumps(document).encode())
