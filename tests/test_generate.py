"""`fp8train generate`: reproducible text, in the run's own precision, held to its arguments."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from fp8train import generate as command
from fp8train.arguments import parse_arguments
from fp8train.config import RunConfig
from fp8train.data.config import DataConfig
from fp8train.data.tokenizers import build_tokenizer
from fp8train.errors import CheckpointError, ConfigError
from fp8train.models import ModelConfig, build_model, initialize
from fp8train.recipe import load_recipe

MODEL = ModelConfig(
    name="tiny", vocab_size=257, vocab_multiple=64, hidden_size=128, intermediate_size=128, num_layers=1, num_heads=2,
    num_kv_heads=1, max_seq_len=24, init_std=0.2,
)  # fmt: skip


def checkpoint(recipe: str = "blockwise", model: ModelConfig = MODEL, **data) -> SimpleNamespace:
    """What open_checkpoint returns, without a folder."""
    trained = build_model(model)
    initialize(trained, seed=1)
    return SimpleNamespace(
        config=RunConfig(model=model, data=DataConfig(**data), recipe="unused"),
        recipe_document=load_recipe(recipe).document,
        load_model_state=trained.state_dict,
        step=7,
    )


@pytest.fixture
def opened(monkeypatch):
    monkeypatch.setattr(command, "open_checkpoint", lambda path: checkpoint())


def run(capsys, *arguments: str) -> str:
    assert command.main(["checkpoint=RUN", "device=cpu", *arguments]) == 0
    return capsys.readouterr().out


def test_same_seed_prints_the_same_text_and_another_seed_another(opened, capsys):
    first = run(capsys, "prompt=def f", "max_new_tokens=12", "temperature=1", "seed=3")
    assert first.startswith("def f") and first.endswith("\n") and len(first) > 8
    assert run(capsys, "prompt=def f", "max_new_tokens=12", "temperature=1", "seed=3") == first
    assert run(capsys, "prompt=def f", "max_new_tokens=12", "temperature=1", "seed=4") != first


def test_temperature_zero_and_top_one_take_the_likeliest_token(opened, capsys):
    likeliest = run(capsys, "prompt=ab", "max_new_tokens=10", "temperature=0")
    assert run(capsys, "prompt=ab", "max_new_tokens=10", "top_k=1", "temperature=5", "seed=9") == likeliest


def test_text_may_outgrow_the_context_and_start_from_nothing(opened, capsys):
    assert len(run(capsys, "max_new_tokens=40", "temperature=1")) > 1
    assert len(run(capsys, f"prompt={'x' * 60}", "max_new_tokens=2")) > 60


@pytest.mark.parametrize(("recipe", "precision"), [("bf16", "bf16"), ("blockwise", "fp8"), ("fp32", "fp32")])
def test_model_is_restored_in_the_precision_of_its_run(recipe, precision):
    saved = checkpoint(recipe)
    model = command.restore_model(saved, torch.device("cpu"), "cpu")
    assert model.layers[0].mlp.up_proj.precision.name == precision
    assert model(torch.tensor([[1]])).dtype == (torch.float32 if recipe == "fp32" else torch.bfloat16)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in saved.load_model_state().items())


def test_tied_weights_may_be_stored_once():
    saved = checkpoint(model=dataclasses.replace(MODEL, tie_embeddings=True))
    state = dict(saved.load_model_state())
    del state["lm_head.weight"]
    saved.load_model_state = lambda: state
    model = command.restore_model(saved, torch.device("cpu"), "cpu")
    assert model.lm_head.weight is model.embed_tokens.weight


def test_weights_that_do_not_fit_are_refused():
    saved = checkpoint()
    state = dict(saved.load_model_state())
    del state["norm.weight"]
    saved.load_model_state = lambda: state
    with pytest.raises(CheckpointError, match="norm.weight"):
        command.restore_model(saved, torch.device("cpu"), "cpu")


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
    ids = list("aä€b".encode())
    assert list(command.decode_pieces(ids, build_tokenizer("bytes"))) == ["a", "ä", "€", "b", ""]
    assert "".join(command.decode_pieces([*ids, 0xE2], build_tokenizer("bytes"))) == "aä€b\ufffd"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("max_new_tokens=0", "max_new_tokens: got 0"),
        ("temperature=-1", "temperature: got -1"),
        ("top_k=0", "top_k: got 0"),
        ("device=tpu", "device: got 'tpu'"),
        ("promt=x", "nearest: prompt"),
    ],
)
def test_argument_that_cannot_be_is_refused(argument, message):
    with pytest.raises(ConfigError, match=message):
        parse_arguments(["checkpoint=RUN", argument], command.GenerateArguments)
