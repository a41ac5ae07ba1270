"""`fp8train generate`: reproducible text, in the run's own precision, held to its arguments."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fp8train import generate as command
from fp8train.arguments import parse_arguments
from fp8train.checkpoint import TrainingState
from fp8train.config import RunConfig, config_to_dict
from fp8train.data.config import DataConfig
from fp8train.data.tokenizers import FileTokenizer, build_tokenizer
from fp8train.errors import ConfigError, DataError
from fp8train.models import Decoder, ModelConfig, build_model, initialize
from fp8train.recipe import load_recipe
from tests.checkpoint.tiny_checkpoint import save_checkpoint

MODEL = ModelConfig(
    name="tiny", vocab_size=257, vocab_multiple=64, hidden_size=128, intermediate_size=128, num_layers=1, num_heads=2,
    num_kv_heads=1, max_seq_len=24, init_std=0.2,
)  # fmt: skip


def save_run(
    folder: Path, recipe: str | dict = "blockwise", model: ModelConfig = MODEL, progress: dict | None = None, **data
) -> Decoder:
    """A run folder with one checkpoint of a random model, at step 7 of 300."""
    trained = build_model(model)
    initialize(trained, seed=1)
    document = load_recipe(recipe)
    state = TrainingState(
        config=config_to_dict(RunConfig(model=model, data=DataConfig(**data), recipe="not read")),
        recipe_document=document.document,
        recipe_text=document.text,
        recipe_hash=document.hash,
        progress=progress or {},
    )
    save_checkpoint(folder, 7, trained, torch.optim.AdamW(trained.parameters()), state)
    return trained


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command on a checkpoint and returns what it printed."""
    save_run(tmp_path)

    def run(*arguments: str) -> str:
        assert command.main([f"checkpoint={tmp_path}", "device=cpu", *arguments]) == 0
        return capsys.readouterr().out

    return run


def test_same_seed_prints_the_same_text_and_another_seed_another(run):
    first = run("prompt=def f", "max_new_tokens=12", "temperature=1", "seed=3")
    assert first.startswith("def f") and first.endswith("\n") and len(first) > 8
    assert run("prompt=def f", "max_new_tokens=12", "temperature=1", "seed=3") == first
    assert run("prompt=def f", "max_new_tokens=12", "temperature=1", "seed=4") != first


def test_temperature_zero_and_top_one_take_the_likeliest_token(run):
    likeliest = run("prompt=ab", "max_new_tokens=10", "temperature=0")
    assert run("prompt=ab", "max_new_tokens=10", "top_k=1", "temperature=5", "seed=9") == likeliest


def test_text_may_outgrow_the_context_and_start_from_nothing(run):
    assert len(run("max_new_tokens=40", "temperature=1")) > 1
    assert len(run(f"prompt={'x' * 60}", "max_new_tokens=2")) > 60


def test_tokenizer_that_the_model_does_not_know_is_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    save_run(tmp_path / "fewer", model=dataclasses.replace(MODEL, vocab_size=200))
    with pytest.raises(DataError, match="bytes has 257 ids, the model 200; .* Give that as tokenizer=PATH"):
        command.main([f"checkpoint={tmp_path / 'fewer'}"])
    save_run(tmp_path / "run")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(DataError, match=r"\(2 ids\) has other ids than bytes \(257\)"):
        command.main([f"checkpoint={tmp_path / 'run'}", f"tokenizer={tmp_path / 'words.json'}"])


def test_tokenizer_of_the_training_may_have_moved_and_gained_tokens(tmp_path, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    ends = []
    monkeypatch.setattr(command, "generate", lambda *arguments, end, **options: ends.append(end) or iter([]))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "</s>": 1, "<sep>": 2}, unk_token="[UNK]"))
    trained, moved, unreadable = tmp_path / "words.json", tmp_path / "moved.json", tmp_path / "shards"
    words.save(str(trained))
    unreadable.mkdir()
    (unreadable / "index.json").symlink_to("/proc/self/mem")
    save_run(tmp_path / "run", tokenizer=str(trained), separator="<sep>")
    save_run(tmp_path / "shards_run", kind="tokens", path=str(unreadable), separator="<sep>")
    words.add_special_tokens(["<user>"])
    words.save(str(moved))
    for folder in ("run", "shards_run", "run"):
        command.main([f"checkpoint={tmp_path / folder}", f"tokenizer={moved}"])
        assert ends.pop() == 2, "what ended a document in training"
        trained.unlink(missing_ok=True)
    trained.write_bytes(moved.read_bytes().replace(b'"<sep>": 2', b'"<sep>": 3').replace(b'"</s>": 1', b'"</s>": 2'))
    with pytest.raises(DataError, match="words.json is another by now, move it away"):
        command.main([f"checkpoint={tmp_path / 'run'}", f"tokenizer={moved}"])


class Fixed(torch.nn.Module):
    """Logits that prefer id `after[last token]`."""

    def __init__(self, after: dict[int, int]) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_seq_len=4)
        self.weight = torch.nn.Parameter(torch.zeros(8, 8))
        self.longest = 0
        with torch.no_grad():
            for token, following in after.items():
                self.weight[token, following] = 5.0

    def forward(self, tokens):
        self.longest = max(self.longest, tokens.shape[1])
        return self.weight[tokens]


def test_text_ends_at_the_end_token_and_context_at_its_limit():
    chain = Fixed({0: 1, 1: 2, 2: 3, 3: 4, 4: 5, 5: 7})
    assert list(command.generate(chain, [0], max_new_tokens=20, temperature=0, end=7)) == [1, 2, 3, 4, 5]
    assert chain.longest == 4
    assert list(command.generate(chain, [0], max_new_tokens=2, temperature=0)) == [1, 2]


def test_draws_follow_the_softmax():
    model = Fixed({})
    with torch.no_grad():
        model.weight[:] = torch.tensor([2.0, 1.0, 0, 0, 0, 0, 0, 0])
    drawn = torch.tensor(list(command.generate(model, [0], max_new_tokens=2000, temperature=2.0, seed=5)))
    wanted = torch.softmax(model.weight[0] / 2.0, dim=0)
    # the share of 2000 draws has the deviation sqrt(p (1 - p) / 2000) <= 0.0112; four of them
    assert ((drawn.bincount(minlength=8) / 2000) - wanted).abs().max() < 0.045
    some = set(command.generate(model, [0], max_new_tokens=200, temperature=2.0, top_k=2, seed=5))
    assert some == {0, 1}


def test_a_character_is_printed_when_its_last_byte_is_there():
    ids = list("a\u00e4\u20acb".encode())
    assert list(command.decode_pieces(ids, build_tokenizer("bytes"))) == ["a", "\u00e4", "\u20ac", "b", ""]
    assert "".join(command.decode_pieces([*ids, 0xE2], build_tokenizer("bytes"))) == "a\u00e4\u20acb\ufffd"


def test_space_between_prompt_and_text_is_kept_by_tokenizers_that_leave_out_the_first():
    tokenizers = pytest.importorskip("tokenizers")
    words = {"\u2581the": 0, "\u2581model": 1, "\u2581is": 2, "s": 3, "</s>": 4, "<unk>": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    decode = tokenizers.decoders
    tokenizer.decoder = decode.Sequence([decode.Replace("\u2581", " "), decode.Fuse(), decode.Strip(" ", 1, 0)])
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    ours = FileTokenizer(tokenizer, name="t", path=None, separator=4, files=files)
    assert "".join(command.decode_pieces([2, 0], ours, ours.encode_prompt("the model"))) == " is the"
    assert "".join(command.decode_pieces([1], ours, [4])) == "model", "a text of its own begins without"


def test_special_tokens_of_a_prompt_are_themselves_and_those_of_a_document_are_text():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"<": 0, "e": 1, ">": 2, "a": 3}, []))
    tokenizer.add_special_tokens(["<e>"])
    ours = FileTokenizer(tokenizer, name="t", path=None, separator=4, files={"tokenizer.json": b""})
    assert ours.encode("a<e>a") == [3, 0, 1, 2, 3] and ours.encode_prompt("a<e>a") == [3, 4, 3]
    assert ours.encode("a<e>a") == [3, 0, 1, 2, 3], "as before"


def test_prompt_may_hold_what_configurations_read_as_a_reference():
    for prompt in ("${HOME}/x", "echo $x \\${y}"):
        assert parse_arguments(["checkpoint=RUN", f"prompt={prompt}"], command.GenerateArguments).prompt == prompt


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("max_new_tokens=0", "max_new_tokens: got 0"),
        ("temperature=-1", "temperature: got -1"),
        ("top_k=0", "top_k: got 0"),
        ("prompt=abc\udcff", "prompt: is not UTF-8 at character 3"),
        ("seed=99999999999999999999", "seed: got 99999999999999999999; needs a number of 64 bits"),
        ("device=tpu", "device: got 'tpu'"),
        ("promt=x", "nearest: prompt"),
    ],
)
def test_argument_that_cannot_be_is_refused(argument, message):
    with pytest.raises(ConfigError, match=message):
        parse_arguments(["checkpoint=RUN", argument], command.GenerateArguments)
