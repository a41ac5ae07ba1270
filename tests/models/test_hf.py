"""Hugging Face folders: same logits as transformers on the same weights, bit-equal round trips, one-line refusals."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8train.errors import CheckpointError, ConfigError
from fp8train.models import ModelConfig, build_model, config_from_hf, initialize, load_hf, resolve_config, save_hf

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama_with_scaled_rope": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_untied": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}


@pytest.fixture(params=MODELS)
def family(request) -> str:
    return request.param


def reference_model(family: str, dtype: torch.dtype = torch.float32):
    """A random model of transformers whose every parameter differs from its default."""
    name, extra = MODELS[family]
    config = getattr(transformers, f"{name}Config")(**SIZES, **extra, attn_implementation="eager")
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            center = 1.0 if "norm" in path else 0.0
            parameter.copy_(center + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def write_reference(family: str, folder: Path, dtype: torch.dtype = torch.float32, **options) -> Path:
    reference_model(family, dtype).save_pretrained(folder, **options)
    return folder


def read_model(folder: Path):
    config = dataclasses.replace(config_from_hf(folder), activations="float32")
    model = build_model(config)
    load_hf(model, folder)
    return model


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_close_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    # Two layers are about 20 dependent operations that differ only in the order of FP32 sums over at most 128 terms,
    # each worth at most sqrt(128) * 2^-24 of the result: 20 * 11.3 * 6e-8 = 1.3e-5 (found: 8e-7). Twice the rope_theta,
    # or the scaling of RoPE left out, changes the logits by more than 0.3.
    assert (ours - theirs).norm() <= 1.3e-5 * theirs.norm()


def test_logits_equal_those_of_transformers(family, tmp_path):
    theirs = reference_model(family)
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(0, 101, (2, 100), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert_close_logits(read_model(tmp_path)(tokens), theirs(tokens).logits)


def test_what_we_write_transformers_loads_with_our_logits(family, tmp_path):
    model = read_model(write_reference(family, tmp_path / "in"))
    save_hf(model.state_dict(), model.config, tmp_path / "out", "float32")
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float32
    tokens = torch.randint(0, 101, (2, 100), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert_close_logits(model(tokens), theirs(tokens).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_export_of_what_was_loaded_is_bit_equal(family, dtype, tmp_path):
    source = write_reference(family, tmp_path / "in", getattr(torch, dtype))
    model = read_model(source)
    save_hf(model.state_dict(), model.config, tmp_path / "out", dtype)
    before, after = weights(source), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    found, wanted = config_from_hf(tmp_path / "out"), config_from_hf(source)
    assert dataclasses.replace(found, name="") == dataclasses.replace(wanted, name="")


def test_weights_may_be_read_by_whoever_may_read_the_config(tmp_path):
    model = read_model(write_reference("llama", tmp_path / "in"))
    before = os.umask(0o027)
    try:
        save_hf(model.state_dict(), model.config, tmp_path / "out", "float32")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o640} and "model.safetensors" in modes


def test_shards_are_read_and_written(tmp_path):
    source = write_reference("qwen3", tmp_path / "in", max_shard_size="100KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    model = read_model(source)
    save_hf(model.state_dict(), model.config, tmp_path / "out", "float32", max_shard_bytes=100_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 110_000 for file in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights(source).values())
    assert {name: file for file in files for name in load_file(file)}.keys() == index["weight_map"].keys()
    again = read_model(tmp_path / "out")
    for (name, left), right in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(left, right), name
    snapshot = tmp_path / "cache" / "snapshots"  # as the hub's own programs keep a model: links into another folder
    (snapshot / "below").mkdir(parents=True)
    for file in (tmp_path / "out").iterdir():
        (snapshot / ("below" if file in files else "") / file.name).symlink_to(file)
    index["weight_map"] = {name: f"below/{file}" for name, file in index["weight_map"].items()}
    (snapshot / "model.safetensors.index.json").unlink()
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_model(snapshot / ".." / "snapshots").state_dict().keys() == model.state_dict().keys()


def test_config_of_transformers_4_is_read_like_that_of_5(tmp_path):
    source = write_reference("llama_with_scaled_rope", tmp_path)
    wanted = config_from_hf(source)
    document = json.loads((source / "config.json").read_text())
    rope = document.pop("rope_parameters")
    document |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (source / "config.json").write_text(json.dumps(document))
    assert config_from_hf(source) == wanted
    assert wanted.rope_scaling.factor == 8.0 and wanted.rope_theta == 5000.0


def test_padding_rows_are_zero_in_the_model_and_absent_from_the_folder(tmp_path):
    source = write_reference("llama", tmp_path / "in")
    config = dataclasses.replace(config_from_hf(source), vocab_multiple=64, activations="float32")
    model = build_model(config)
    load_hf(model, source)
    assert model.embed_tokens.weight.shape[0] == 128
    assert not model.embed_tokens.weight[101:].any() and not model.lm_head.weight[101:].any()
    assert model(torch.tensor([[1, 2]])).shape[-1] == 101
    save_hf(model.state_dict(), config, tmp_path / "out", "float32")
    assert torch.equal(weights(tmp_path / "out")["lm_head.weight"], weights(source)["lm_head.weight"])


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters is .* and rope_scaling is .*yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "needs one of the two"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "only if it was added for longer inference"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "Within the original length it changes nothing"),
        ({"rope_parameters": "x"}, "rope_parameters is 'x'; needs a dict"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None; needs a number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; needs a bool"),
        ({"head_dim": "16"}, "head_dim is '16'; needs a whole number"),
        ({"model_type": ["llama"]}, "architecture"),
        ({"model_type": "x", "architectures": 5}, "architecture 5; needs one of"),
        ({"layer_types": 3}, "layer_types is 3; needs a list"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"hidden_size": None}, "hidden_size"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_folder_of_another_kind_is_refused(changes, message, tmp_path):
    write_reference("llama", tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        config_from_hf(tmp_path)


def unreadable(name: str):
    """Another file in its place, whose reading fails for root too."""
    return lambda folder: ((folder / name).unlink(missing_ok=True), (folder / name).symlink_to("/proc/self/mem"))


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edited(change):
    return lambda folder: edit(folder, change)


def indexed(*files: object):
    """An index over these files, beside which lies one more with a tensor of other values."""

    def damage(folder: Path) -> None:
        save_file({NORM: torch.zeros(64)}, folder / "more.safetensors")
        index = {"weight_map": {str(number): file for number, file in enumerate(files)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


NORM = "model.norm.weight"
DAMAGES = {
    "twice": (indexed("model.safetensors", "more.safetensors"), f"has {NORM}, as another file has"),
    "outside": (
        lambda folder: indexed(f"../{folder.name}/model.safetensors")(folder),
        r"/\.\./.*/model.safetensors: is no file of this folder",
    ),
    "elsewhere": (indexed("/etc/model.safetensors"), "/etc/model.safetensors: is no file of this folder"),
    "number": (indexed(5), "/5: is no file of this folder"),
    "no_file": (lambda folder: (folder / "model.safetensors").unlink(), "is no file of this folder"),
    "cut_off": (lambda folder: os.truncate(folder / "model.safetensors", 5000), "damaged, cut off or"),
    "unreadable": (unreadable("model.safetensors"), "unreadable"),
    "unreadable_index": (unreadable("model.safetensors.index.json"), r"no weight_map .*Input/output error"),
    "missing": (edited(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")), "lacks 1 .*layers.1.mlp.up_proj"),
    "unexpected": (edited(lambda t: t.update({"model.extra": torch.ones(1)})), "model.extra"),
    "shape": (edited(lambda t: t.update({NORM: torch.ones(63)})), r"norm.weight has shape \[63\]"),
    "dtype": (edited(lambda t: t.update({NORM: torch.ones(64).to(torch.float8_e4m3fn)})), "norm.weight is F8_E4M3"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_refused_and_nothing_is_loaded(damage, tmp_path):
    write_reference("llama", tmp_path)
    apply, message = DAMAGES[damage]
    apply(tmp_path)
    model = build_model(dataclasses.replace(config_from_hf(tmp_path), activations="float32"))
    initialize(model, seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_hf(model, tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_tied_folder_whose_head_differs_is_refused(tmp_path):
    write_reference("qwen2_tied", tmp_path)
    model = build_model(config_from_hf(tmp_path))
    embedding = weights(tmp_path)["model.embed_tokens.weight"]
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    load_hf(model, tmp_path)
    assert torch.equal(model.lm_head.weight, embedding)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        load_hf(model, tmp_path)


@pytest.mark.parametrize(
    ("document", "message"),
    [(None, "no config.json"), ("{", "read as JSON"), ("[]", "needs an object"), ("[" * 10**5, "read as JSON")],
    ids=lambda text: str(text)[:20],
)
def test_unreadable_config_is_refused(document, message, tmp_path):
    if document is not None:
        (tmp_path / "config.json").write_text(document)
    with pytest.raises(CheckpointError, match=message):
        config_from_hf(tmp_path)


def test_weights_of_another_rope_are_refused(tmp_path):
    write_reference("llama", tmp_path)
    model = build_model(dataclasses.replace(config_from_hf(tmp_path), rope_theta=500000.0))
    with pytest.raises(ConfigError, match=r"model.rope_theta is 500000.0; .* has 10000.0"):
        load_hf(model, tmp_path)


def test_shape_comes_from_the_folder_where_none_is_given(tmp_path):
    write_reference("qwen3", tmp_path)
    config = resolve_config(ModelConfig(init_from=str(tmp_path), residual="bfloat16", max_seq_len=64))
    assert (config.hidden_size, config.head_dim, config.qk_norm, config.residual) == (64, 32, True, "bfloat16")
    assert (config.max_seq_len, config.init_from) == (64, str(tmp_path))
    assert resolve_config(config) is config
    with pytest.raises(ConfigError, match="model.rope_theta is 77.0"):
        resolve_config(ModelConfig(init_from=str(tmp_path), rope_theta=77.0))
    with pytest.raises(ConfigError, match="model.num_layers is 3"):
        resolve_config(dataclasses.replace(config, num_layers=3))


def tiny_state() -> tuple[dict[str, torch.Tensor], ModelConfig]:
    config = ModelConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, max_seq_len=32
    )  # fmt: skip
    model = build_model(config)
    initialize(model, seed=1)
    return model.state_dict(), config


def test_folder_in_use_is_refused_and_left_alone(tmp_path):
    state, config = tiny_state()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        save_hf(state, config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    state, config = tiny_state()

    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fp8train.models.hf.save_file", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_hf(state, config, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_of_two_that_write_one_folder_the_first_to_end_leaves_it_whole(tmp_path, monkeypatch):
    state, config = tiny_state()

    def while_another_writes(*arguments, **options):
        monkeypatch.undo()
        save_hf(state, config, tmp_path / "out")
        save_file(*arguments, **options)

    monkeypatch.setattr("fp8train.models.hf.save_file", while_another_writes)
    with pytest.raises(CheckpointError, match="out: cannot be written"):
        save_hf(state, config, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_state_of_another_model_is_refused(tmp_path):
    state, config = tiny_state()
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, such as norm.weight"):
        save_hf({name: tensor for name, tensor in state.items() if name != "norm.weight"}, config, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"norm.weight has shape \[3\]"):
        save_hf(state | {"norm.weight": torch.ones(3)}, config, tmp_path / "out")
    with pytest.raises(ConfigError, match="dtype is 'float16'"):
        save_hf(state, config, tmp_path / "out", "float16")
    assert not list(tmp_path.iterdir())


def test_model_that_no_family_has_is_refused(tmp_path):
    _, config = tiny_state()
    config = dataclasses.replace(config, qkv_bias=True, qk_norm=True)
    with pytest.raises(ConfigError, match="qkv_bias=True with qk_norm=True"):
        save_hf(build_model(config).state_dict(), config, tmp_path / "out")


def test_tokenizer_files_and_token_ids_travel_along(tmp_path):
    state, config = tiny_state()
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "model.safetensors").write_bytes(b"not copied")
    (source / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    save_hf(state, config, tmp_path / "out", tokenizer_dir=source)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    assert document["eos_token_id"] == 7 and document["bos_token_id"] is None
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        save_hf(state, config, tmp_path / "other", tokenizer_dir=tmp_path / "nowhere")
