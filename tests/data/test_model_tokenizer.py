"""A model that starts from a folder is trained in the folder's ids, or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fp8train import prepare
from fp8train.data import DataConfig, SourceConfig, build_dataset, check_model_tokenizer, covers, with_model_tokenizer
from fp8train.data.tokenizers import build_tokenizer
from fp8train.errors import DataError


@pytest.fixture
def model_folder(bpe_file: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder as far as its tokenizer goes."""
    (tmp_path / "hf").mkdir()
    shutil.copy(bpe_file, tmp_path / "hf" / "tokenizer.json")
    return tmp_path / "hf"


def with_a_further_token(bpe_file: Path, folder: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(bpe_file))
    tokenizer.add_tokens(["zzyzx"])
    tokenizer.save(str(folder / "more.json"))
    return folder / "more.json"


def test_auto_is_the_tokenizer_of_the_folder_that_the_model_starts_from(model_folder: Path) -> None:
    data = DataConfig(kind="text", path="a.txt")
    assert with_model_tokenizer(data, str(model_folder)).tokenizer == str(model_folder)
    assert with_model_tokenizer(data, None) is data
    for own in (
        DataConfig(kind="text", path="a.txt", tokenizer="bytes"),
        DataConfig(kind="tokens", path="shards"),
        DataConfig(kind="mix", mix=[SourceConfig(kind="tokens", path="shards", weight=1.0)]),
    ):
        assert with_model_tokenizer(own, str(model_folder)) is own


def test_folder_without_a_tokenizer_leaves_the_choice_to_the_user(tmp_path: Path) -> None:
    data, text = DataConfig(kind="text", path="a.txt"), build_tokenizer("bytes")
    assert with_model_tokenizer(data, str(tmp_path)) is data
    with pytest.raises(DataError, match="holds no tokenizer .*needs that of the model. Set data.tokenizer"):
        check_model_tokenizer(text, data, str(tmp_path))
    check_model_tokenizer(text, DataConfig(kind="text", path="a.txt", tokenizer="bytes"), str(tmp_path))
    check_model_tokenizer(text, DataConfig(kind="tokens", path="shards"), str(tmp_path))


def test_shards_of_another_tokenizer_are_refused_unless_they_are_asked_for(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text to be read\n" * 400)
    for name in ("bytes", str(model_folder)):
        out = tmp_path / Path(name).name / "shards"
        assert (
            prepare.main(["data=text", f"data.path={tmp_path / 'a.txt'}", f"data.tokenizer={name}", f"out={out}"]) == 0
        )
        data = DataConfig(kind="tokens", path=str(out), holdout_fraction=0.0)
        tokenizer = build_dataset(data, 16, 1).tokenizer
        check_model_tokenizer(tokenizer, data, None)
        if name == "bytes":
            with pytest.raises(
                DataError, match=r"tokenizer bytes \(257 ids\), the model .*Prepare them with data.token"
            ):
                check_model_tokenizer(tokenizer, data, str(model_folder))
            data.tokenizer = "bytes"
        check_model_tokenizer(tokenizer, data, str(model_folder))


def test_a_tokenizer_with_further_tokens_covers_the_one_without(bpe_file: Path, tmp_path: Path) -> None:
    one, more = build_tokenizer(str(bpe_file)), build_tokenizer(str(with_a_further_token(bpe_file, tmp_path)))
    assert covers(one, one) and covers(more, one) and not covers(one, more)
    text = build_tokenizer("bytes")
    assert covers(text, text) and not covers(text, one) and not covers(one, text)
