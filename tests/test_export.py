"""`fp8train export`: transformers loads what it writes and computes the same logits."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from fp8train import export as command
from fp8train.data.tokenizers import ByteTokenizer
from fp8train.errors import CheckpointError, ConfigError, DataError
from fp8train.models import build_model, initialize, save_hf
from fp8train.recipe import load_recipe
from tests.test_generate import MODEL, save_run


def test_transformers_computes_our_logits_from_the_export(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    trained, out = save_run(tmp_path / "run"), tmp_path / "hf"
    assert command.main([f"checkpoint={tmp_path / 'run'}", f"out={out}", "dtype=float32"]) == 0
    # 2 x 257 x 128 embedding and head; 128x128 q, o, 64x128 k, v, 3 x 128x128 MLP, 3 norms of 128
    said = capsys.readouterr().out
    assert "tiny of step 7, 164,480 parameters in float32, without tokenizer files" in said
    # 320 - 257 rows of 128, twice
    assert "left out: 16,128 of the 180,608 parameters trained, rows 257 to 319 of the embedding and lm_head" in said
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    ours = build_model(dataclasses.replace(MODEL, activations="float32"))
    ours.load_state_dict(trained.state_dict())
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        difference = ours(tokens) - theirs(tokens).logits
        # one layer: about 10 dependent FP32 sums over at most 128 terms, each worth sqrt(128) * 2^-24
        assert difference.norm() <= 10 * 11.3 * 2**-24 * ours(tokens).norm()


def test_transformers_ends_a_text_where_training_ended_documents(tmp_path):
    transformers = pytest.importorskip("transformers")
    save_run(tmp_path / "run")
    out = tmp_path / "hf"
    command.main([f"checkpoint={tmp_path / 'run'}", f"out={out}", "dtype=float32"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == ByteTokenizer.separator == 256
    with torch.no_grad():  # a head that prefers it after any token
        theirs.lm_head.weight.zero_()
        theirs.lm_head.weight[256] = theirs.model(torch.tensor([[1]])).last_hidden_state[0, 0]
    found = theirs.generate(torch.tensor([[1]]), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert found.tolist() == [[1, 256]], "generate stops at once"
    command.main([f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'none'}", "tokenizer=none"])
    assert json.loads((tmp_path / "none" / "config.json").read_text())["eos_token_id"] is None


def test_nothing_is_said_of_padding_where_there_is_none(tmp_path, capsys):
    save_run(tmp_path / "run", model=dataclasses.replace(MODEL, vocab_multiple=1))
    command.main([f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'hf'}"])
    assert "parameters in bfloat16" in (said := capsys.readouterr().out) and "left out" not in said


def test_bfloat16_is_the_master_rounded_to_nearest(tmp_path):
    trained = save_run(tmp_path / "run")
    command.main([f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'hf'}"])
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    for name, master in trained.state_dict().items():
        written = tensors[name if name == "lm_head.weight" else f"model.{name}"]
        assert torch.equal(written, master[: written.shape[0]].to(torch.bfloat16)), name
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_tokenizer_of_the_run_goes_along(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    file = tmp_path / "tokenizer.json"
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1, "</s>": 2}, unk_token="[UNK]"))
    words.save(str(file))
    save_run(tmp_path / "run", tokenizer=str(file))
    command.main([f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'with'}"])
    assert (tmp_path / "with" / "tokenizer.json").read_bytes() == file.read_bytes()
    assert json.loads((tmp_path / "with" / "config.json").read_text())["eos_token_id"] == 2, "</s>, as in training"
    command.main([f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'without'}", "tokenizer=none"])
    assert not (tmp_path / "without" / "tokenizer.json").exists()


def test_what_the_first_folder_says_of_generation_goes_along_with_a_copy_of_its_tokenizer(tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1, "</s>": 2}, unk_token="[UNK]"))
    first = tmp_path / "first"
    save_hf(build_model(MODEL, "cpu").state_dict(), dataclasses.replace(MODEL, init_std=0.1), first)
    document = json.loads((first / "config.json").read_text()) | {"bos_token_id": 3, "eos_token_id": [1, 2]}
    (first / "config.json").write_text(json.dumps(document))
    (first / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    words.save(str(first / "tokenizer.json"))
    words.save(str(tmp_path / "copy.json"))  # as shards keep one
    model = dataclasses.replace(MODEL, init_from=str(first))
    save_run(tmp_path / "run", model=model, tokenizer=str(tmp_path / "copy.json"))
    save_run(tmp_path / "bytes", model=model)
    for run in ("run", "bytes"):
        command.main([f"checkpoint={tmp_path / run}", f"out={tmp_path / 'hf' / run}"])
    written = json.loads((tmp_path / "hf" / "run" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"], written["initializer_range"]) == (3, [1, 2], 0.1)
    assert (tmp_path / "hf" / "run" / "generation_config.json").read_text() == '{"eos_token_id": [1, 2]}'
    other = json.loads((tmp_path / "hf" / "bytes" / "config.json").read_text())
    assert (other["bos_token_id"], other["eos_token_id"]) == (None, 256), "trained with another tokenizer"
    assert not (tmp_path / "hf" / "bytes" / "generation_config.json").exists()
    first.rename(tmp_path / "gone")
    command.main([f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'later'}"])
    assert "first is gone: its bos, pad and further eos token ids" in capsys.readouterr().err
    assert json.loads((tmp_path / "later" / "config.json").read_text())["eos_token_id"] == 2


def test_tokenizer_with_other_ids_or_more_of_them_is_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    save_run(tmp_path / "run")
    vocabulary = {"[UNK]": 0, "</s>": 1} | {f"w{number}": 2 + number for number in range(1000)}
    for size, message in ((3, r"\(3 ids\) has other ids than bytes \(257\)"), (1002, "has 1002 ids, the model 2")):
        part = {word: number for word, number in vocabulary.items() if number < size}
        file = tmp_path / f"{size}.json"
        tokenizers.Tokenizer(tokenizers.models.WordLevel(part, unk_token="[UNK]")).save(str(file))
        with pytest.raises(DataError, match=message):
            command.main([f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'hf'}", f"tokenizer={file}"])
    assert not (tmp_path / "hf").exists()


def test_what_cannot_be_written_is_refused(tmp_path):
    save_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="dtype: got 'fp16'"):
        command.main([f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'hf'}", "dtype=fp16"])
    with pytest.raises(ConfigError, match="out is not given"):
        command.main([f"checkpoint={tmp_path / 'run'}"])
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="not empty"):
        command.main([f"checkpoint={tmp_path / 'run'}", f"out={tmp_path}"])
    with pytest.raises(CheckpointError, match="cannot be written"):
        command.main([f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'file' / 'hf'}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


def test_channel_scales_of_the_recipe_are_folded_without_changing_the_function():
    recipe = load_recipe(load_recipe("blockwise").document | {"swiglu": {"smooth": True, "clamp": 50}})
    model = build_model(dataclasses.replace(MODEL, activations="float32"))
    initialize(model, seed=3)
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[4] *= 2.0**12
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        before = model(tokens)
        state, notes = command.fold_remedies(model.state_dict(), recipe)
        assert state["layers.0.mlp.up_proj.weight"].abs().amax() < model.layers[0].mlp.up_proj.weight.abs().amax() / 100
        model.load_state_dict(state)
        assert torch.equal(model(tokens), before)  # powers of two
    assert len(notes) == 2 and "left out" in notes[0]
