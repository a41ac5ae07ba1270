from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fp8train import eval as command
from fp8train import sensitivity
from fp8train.errors import exit_code
from fp8train.metrics import read_metrics
from fp8train.trainer.evaluation import Score
from tests.tiny_run import tiny_text, tiny_train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parent of a finished run."""
    folder = tmp_path_factory.mktemp("eval")
    tiny_train(folder, "steps=4")
    return folder


def score(folder: Path, out: Path, *arguments: str) -> dict:
    assert command.main([f"checkpoint={folder / 'run'}", f"out={out}", *arguments]) == 0
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def own(folder: Path) -> dict:
    """Scores of the run as it is."""
    return score(folder, folder / "own.json")


def test_scores_are_those_that_the_run_logged(folder: Path, own: dict):
    logged = read_metrics(folder / "run" / "metrics.jsonl")[-1]
    keys = ("eval_loss", "eval_loss_bf16", "bits_per_byte", "bits_per_byte_bf16", "eval_tokens", "eval_bytes", "step")
    assert {key: own[key] for key in keys} == {key: logged[key] for key in keys}
    assert own["eval_loss"] != own["eval_loss_bf16"]


def test_a_bare_path_is_the_checkpoint_and_its_scores_are_shown(
    folder: Path, own: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert command.main([str(folder / "run"), f"out={tmp_path / 'again.json'}"]) == 0
    assert json.loads((tmp_path / "again.json").read_text()) == own
    text = capsys.readouterr().out
    assert f"{own['eval_loss']:.4f}" in text and f"{own['eval_loss_bf16']:.4f}" in text and "512 tokens" in text


def test_perplexity_and_bits_follow_from_loss_and_counts(own: dict):
    assert own["perplexity"] == pytest.approx(math.exp(own["eval_loss"]))
    assert own["bits_per_byte"] == pytest.approx(
        own["eval_loss"] * own["eval_tokens"] / math.log(2) / own["eval_bytes"]
    )


def test_micro_batch_does_not_change_the_score(folder: Path, tmp_path: Path):
    one, eight = (score(folder, tmp_path / "out.json", f"micro_batch_samples={size}") for size in (1, 8))
    # the same FP8 codes (1x128 blocks along channels); FP32 sums over 512 tokens in another order
    assert one["eval_loss"] == pytest.approx(eight["eval_loss"], rel=512 * 2**-24)
    assert one["eval_hash"] == eight["eval_hash"]


def test_help_shows_the_values_that_hold(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert command.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "checkpoint=<required>" in text and "  seq_len=256 " in text and "Those are defaults" in text
    assert command.main([f"checkpoint={folder / 'run'}", "--help"]) == 0
    text = capsys.readouterr().out
    assert "  seq_len=64 " in text and f"the values of {folder / 'run'}" in text


def test_number_of_windows_can_be_changed(folder: Path, tmp_path: Path):
    row = score(folder, tmp_path / "out.json", "data.eval_windows=3")
    assert row["eval_tokens"] == 3 * 64


def test_another_recipe_scores_the_same_weights_in_its_arithmetic(folder: Path, own: dict, tmp_path: Path):
    other = score(folder, tmp_path / "out.json", "recipe=bf16")
    assert (own["recipe"], other["recipe"]) == ("blockwise", "bf16")
    assert other["eval_loss"] == other["eval_loss_bf16"] == own["eval_loss_bf16"] != own["eval_loss"]


def test_other_text_is_scored_in_the_runs_tokenizer(folder: Path, tmp_path: Path):
    (tmp_path / "zzz.txt").write_text("\n".join("zq" * 40 for _ in range(200)))
    common = ["data=text", "data.document_bytes=1000", "data.eval_windows=8"]
    same = score(folder, tmp_path / "out.json", f"data.path={tiny_text(folder)}", *common)
    other = [f"data.path={tmp_path / 'zzz.txt'}", "data.holdout_fraction=0.5"]
    strange = score(folder, tmp_path / "out.json", *common, *other)
    assert strange["eval_loss"] > same["eval_loss"] + 0.5
    assert "zzz.txt: " in strange["text"]


def test_text_that_the_run_was_trained_on_is_not_scored_as_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def refusal(*arguments: str) -> str:
        assert exit_code(command.main, [f"checkpoint={tmp_path / 'run'}", *arguments]) == 2
        return capsys.readouterr().err

    tiny_train(tmp_path, "steps=1", "model.max_seq_len=16384")
    trained = "held out 0.05 of this text and was trained on the rest"
    assert trained in refusal("data.holdout_fraction=0.2")
    path = tiny_text(tmp_path)
    assert trained in refusal("data.holdout_fraction=0.2", f"data.path={path.parent}/./{path.name}")
    assert "data.document_bytes is not what the run cut its text with" in refusal("data.document_bytes=2000")
    # a window of 16384 bytes needs more of this text than 5 %
    assert "seq_len=16384 would hold out more of the run's own text" in refusal("seq_len=16384")
    assert score(tmp_path, tmp_path / "out.json", "seq_len=32", "data.holdout_fraction=0.04")["eval_tokens"] > 0
    tiny_train(tmp_path, "steps=1", "data.holdout_fraction=0", run="all")
    (tmp_path / "all").rename(tmp_path / "run2")
    assert exit_code(command.main, [f"checkpoint={tmp_path / 'run2'}"]) == 2
    assert "To go on, score other text: data=text data.path=FILE data.holdout_fraction=0.9" in capsys.readouterr().err


def test_other_text_keeps_document_mask_and_separator(tmp_path: Path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "</s>": 1, "<eos>": 2} | {f"w{number}": 3 + number for number in range(50)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "t.json"))
    lines = [json.dumps({"text": " ".join(f"w{(n * k) % 50}" for k in range(12))}) for n in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    text = ["data=jsonl", f"data.path={tmp_path / 'a.jsonl'}"]
    own = ["data.document_bytes=null", "data.document_mask=true", "data.separator=<eos>", "model.vocab_size=64"]
    tiny_train(tmp_path, *text, *own, f"data.tokenizer={tmp_path / 't.json'}", "steps=1")
    same = score(tmp_path, tmp_path / "out.json")
    assert score(tmp_path, tmp_path / "out.json", *text, "data.eval_windows=8")["eval_hash"] == same["eval_hash"]
    assert same["eval_tokens"] < 8 * 64, "the first token of each document is no target"


def test_text_in_other_ids_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """By eval and by what judges linears on a checkpoint."""
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1, "</s>": 2}, unk_token="[UNK]"))
    words.save(str(tmp_path / "words.json"))
    arguments = [f"checkpoint={folder / 'run'}", f"data.tokenizer={tmp_path / 'words.json'}"]
    for main in (command.main, sensitivity.main):
        assert exit_code(main, arguments) == 2
        assert "(3 ids), the run was trained in bytes (257 ids); needs that one" in capsys.readouterr().err
    assert command.main([f"checkpoint={folder / 'run'}", "data.tokenizer=bytes"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "checkpoint is not given", id="no checkpoint"),
        pytest.param(["checkpoint=/nonexistent"], "/nonexistent", id="no such folder"),
        pytest.param(["checkpoint={run}", "dataa.path=x"], "unknown key 'dataa", id="typo"),
        pytest.param(["checkpoint={run}", "data=txt"], "no file 'txt' in configs/data/; nearest: text", id="choice"),
        pytest.param(["checkpoint={run}", "seq_len=128"], "seq_len is 128", id="windows too long"),
        pytest.param(
            ["checkpoint={run}", "data.holdout_fraction=0"], "needs some text held out", id="nothing held out"
        ),
    ],
)
def test_mistake_exits_2_with_one_line(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
):
    argv = [argument.format(run=folder / "run") for argument in arguments]
    assert exit_code(command.main, argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_score_of_a_uniform_guess_over_bytes_is_eight_bits():
    guess = Score(nats=math.log(256), tokens=1000, bytes=1000)
    assert guess.bits_per_byte == pytest.approx(8.0)
    assert guess.perplexity == pytest.approx(256)
    assert torch.isnan(torch.tensor(Score(nats=1.0, tokens=1, bytes=0).bits_per_byte))
    assert math.isnan(Score(nats=math.nan, tokens=1, bytes=1).perplexity)
    assert Score(nats=1e4, tokens=1, bytes=1).perplexity == math.inf
