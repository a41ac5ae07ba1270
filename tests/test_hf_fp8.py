"""FP8 weights in Hugging Face folders: what is written is what fprop multiplies, and what is read is what it means."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fp8train import export as command
from fp8train.config import load_config
from fp8train.convert import convert_model
from fp8train.distributed import World
from fp8train.errors import CheckpointError, ConfigError
from fp8train.hf_fp8 import packing_of
from fp8train.models import build_model, initialize, load_hf, read_config_json
from fp8train.recipe import load_recipe
from fp8train.trainer import Trainer
from fp8train.trainer.console import Console
from tests.test_generate import MODEL, save_run
from tests.tiny_run import tiny_arguments

WIDE = dataclasses.replace(
    MODEL, hidden_size=256, intermediate_size=384, num_layers=2, num_heads=4, num_kv_heads=1, activations="float32"
)  # k and v have 64 rows: half a block


def export(folder: Path, *arguments: str, out: str = "hf") -> Path:
    assert command.main([f"checkpoint={folder}", f"out={folder / out}", "dtype=fp8", *arguments]) == 0
    return folder / out


def decoded(tensors: dict[str, Tensor], name: str) -> Tensor:
    """By the format's own words: each block of 128x128 codes times its scale."""
    codes, scales = tensors[name].float(), tensors[f"{name}_scale_inv"]
    rows, cols = (torch.arange(size) // 128 for size in codes.shape)
    return codes * scales[rows][:, cols]


def train_from(folder: Path, tmp_path: Path, *overrides: str) -> None:
    """One step of a run that starts from the weights of a folder."""
    shaped = [a for a in tiny_arguments(tmp_path) if a.startswith(("model.", "optim.", "steps="))]
    arguments = [argument for argument in tiny_arguments(tmp_path) if argument not in shaped]
    config = load_config(
        [*arguments, "model=hf", f"model.init_from={folder}", "data.tokenizer=bytes", "steps=1", *overrides]
    )
    Trainer(config, World(), Console(enabled=False)).run()


def left_out(folder: Path) -> list[str]:
    return read_config_json(folder)["quantization_config"]["modules_to_not_convert"]


def test_codes_and_scales_are_those_that_training_multiplies(tmp_path, capsys):
    trained = save_run(tmp_path, model=WIDE)
    tensors = load_file(export(tmp_path) / "model.safetensors")
    assert "in FP8: 14 of 15 linears, e4m3 128x128 pow2; the rest in bfloat16" in capsys.readouterr().out
    assert left_out(tmp_path / "hf") == ["lm_head"]
    masters = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    convert_model(trained, "blockwise", "cpu_torch", fused="never")
    for name, linear in trained.named_modules():
        if name.endswith("_proj"):
            codes, scales = linear.provider.operands(linear)[0].tensors()
            assert torch.equal(tensors[f"model.{name}.weight"].view(torch.uint8), codes.view(torch.uint8)), name
            assert torch.equal(tensors[f"model.{name}.weight_scale_inv"], scales), name
            del masters[f"{name}.weight"]
    for name, master in masters.items():
        written = tensors[name if name == "lm_head.weight" else f"model.{name}"]
        assert torch.equal(written, master[: written.shape[0]].bfloat16()), name
    assert len(tensors) == len(masters) + 2 * 14


def test_transformers_reads_the_weights_that_the_codes_mean(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    save_run(tmp_path, model=WIDE)
    tensors = load_file(export(tmp_path) / "model.safetensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16).state_dict()
    for name in [name.removesuffix("_scale_inv") for name in tensors if name.endswith("_scale_inv")]:
        if theirs[name].dtype is torch.float8_e4m3fn:  # on a GPU it keeps them
            assert torch.equal(theirs[name].cpu().view(torch.uint8), tensors[name].view(torch.uint8)), name
        else:  # E4M3 times a power of two is exact in BF16
            assert torch.equal(theirs[name].float(), decoded(tensors, name)), name


@pytest.mark.parametrize("scale", ["pow2", "fp32"])
def test_folder_is_read_back_as_its_codes_mean(tmp_path, scale):
    save_run(tmp_path, recipe="blockwise" if scale == "pow2" else "deepseek_v3", model=WIDE)
    folder = export(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    model = build_model(WIDE)
    with pytest.raises(ConfigError, match="the weights are quantised .*'fp8'"):
        load_hf(model, folder)
    load_hf(model, folder, packing_of(read_config_json(folder), folder))
    for name, parameter in model.named_parameters():
        theirs = name if name == "lm_head.weight" else f"model.{name}"
        wanted = decoded(tensors, theirs) if f"{theirs}_scale_inv" in tensors else tensors[theirs].float()
        assert torch.equal(parameter[: wanted.shape[0]], wanted), name


def test_training_starts_from_fp8_weights_and_exports_the_same_numbers(tmp_path):
    small = dataclasses.replace(MODEL, num_heads=1, num_kv_heads=1, max_seq_len=64, activations="auto")
    save_run(tmp_path, model=small)
    first = export(tmp_path)
    train_from(first, tmp_path, "optim.lr=1e-30")
    assert command.main([f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'again'}", "dtype=fp8"]) == 0
    one, two = (load_file(folder / "model.safetensors") for folder in (first, tmp_path / "again"))
    assert one.keys() == two.keys()
    for name in one:
        if f"{name}_scale_inv" in one:
            # rounded again, a block's largest code may be 224, which is then 448 with half the scale: the same numbers
            assert torch.equal(decoded(one, name), decoded(two, name)), name
        elif not name.endswith("_scale_inv"):
            assert torch.equal(one[name], two[name]), name


def test_linears_that_the_run_had_put_in_bf16_stay_there(tmp_path, capsys):
    fqn = "layers.1.self_attn.k_proj"
    trained = save_run(tmp_path, model=WIDE, progress={"watchers": {"alarm": {"demoted": {fqn: "an alarm"}}}})
    tensors = load_file(export(tmp_path) / "model.safetensors")
    assert left_out(tmp_path / "hf") == [f"model.{fqn}", "lm_head"]
    assert torch.equal(tensors[f"model.{fqn}.weight"], trained.state_dict()[f"{fqn}.weight"].bfloat16())
    said = capsys.readouterr()
    assert "in FP8: 13 of 15" in said.out and f"model.{fqn}, model.layers.1.self_attn.q_proj" in said.err
    schedule = load_recipe("blockwise").document | {
        "schedule": [{"at": 0.01, "use": "bf16"}]
    }  # step 7 of 300 is behind
    save_run(tmp_path / "scheduled", recipe=schedule, model=WIDE)
    with pytest.raises(ConfigError, match="has no linear in FP8 here"):
        export(tmp_path / "scheduled")


def test_another_recipe_says_what_to_round(tmp_path):
    trained = save_run(tmp_path, recipe="bf16", model=WIDE)
    with pytest.raises(ConfigError, match="has no linear in FP8 here; needs one. Give recipe=blockwise"):
        export(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    pow2, exact = (
        load_file(export(tmp_path, f"recipe={recipe}", out=recipe) / "model.safetensors")
        for recipe in ("blockwise", "deepseek_v3")
    )
    assert torch.equal(pow2[f"{name}_scale_inv"].log2() % 1, torch.zeros(3, 2))
    block = trained.layers[0].mlp.up_proj.weight[:128, :128].abs().max()
    assert exact[f"{name}_scale_inv"][0, 0] == block / 448


def test_what_the_format_cannot_hold_is_refused(tmp_path):
    save_run(tmp_path / "rows", recipe="rowwise", model=WIDE)
    with pytest.raises(
        ConfigError, match="rounds the weight of layers.0.self_attn.q_proj as e4m3 row pow2; needs e4m3 1"
    ):
        export(tmp_path / "rows")
    save_run(tmp_path / "ragged", model=dataclasses.replace(WIDE, intermediate_size=200))
    with pytest.raises(
        ConfigError, match=r"layers.0.mlp.gate_proj is \[200, 256\]; needs sides up to 128 or multiples"
    ):
        export(tmp_path / "ragged")
    document = load_recipe("blockwise").document
    head = document | {"rules": [{"match": "lm_head", "use": "fp8"}, *document["rules"][1:]]}
    save_run(tmp_path / "tied", recipe=head, model=dataclasses.replace(WIDE, tie_embeddings=True))
    with pytest.raises(ConfigError, match="the weight of lm_head is that of the embedding too"):
        export(tmp_path / "tied")
    with pytest.raises(ConfigError, match="recipe: is given, and dtype is bfloat16; needs dtype=fp8"):
        export(tmp_path / "rows", "dtype=bfloat16", "recipe=blockwise")
    assert sorted(path.name for path in tmp_path.glob("*/hf")) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"quant_method": "gptq"}, "quant_method 'gptq'", id="method"),
        pytest.param({"fmt": "e5m2"}, "fmt 'e5m2'", id="format"),
        pytest.param({"weight_block_size": None}, "weight_block_size None", id="no blocks"),
        pytest.param({"weight_block_size": [0, 128]}, r"weight_block_size \[0, 128\]", id="empty block"),
    ],
)
def test_folders_quantised_in_another_way_are_refused_before_the_run(tmp_path, change, message):
    save_run(tmp_path, model=WIDE)
    config = export(tmp_path) / "config.json"
    document = json.loads(config.read_text())
    document["quantization_config"] |= change
    config.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=message):
        train_from(tmp_path / "hf", tmp_path)
    assert not (tmp_path / "run").exists()


def test_damaged_scales_are_refused(tmp_path):
    save_run(tmp_path, model=WIDE)
    folder = export(tmp_path)
    packing, file = packing_of(read_config_json(folder), folder), folder / "model.safetensors"
    whole, name = load_file(file), "model.layers.0.mlp.up_proj.weight_scale_inv"
    model = build_model(WIDE)
    initialize(model, seed=5)
    for damaged, message in (
        (
            whole | {name: whole[name][:2].contiguous()},
            r"up_proj.weight_scale_inv has shape \[2, 2\]; .* needs \[3, 2\]",
        ),
        (whole | {name: whole[name].to(torch.int32)}, "up_proj.weight_scale_inv is I32; needs BF16 or F16 or F32"),
        ({key: tensor for key, tensor in whole.items() if key != name}, "up_proj.weight is F8_E4M3; needs BF16 or"),
    ):
        save_file(damaged, file)
        before = model.norm.weight.clone()
        with pytest.raises(CheckpointError, match=message):
            load_hf(model, folder, packing)
        assert torch.equal(model.norm.weight, before)


def test_scales_in_bf16_are_read(tmp_path):
    save_run(tmp_path, model=WIDE)
    folder = export(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: t.bfloat16() if name.endswith("_inv") else t for name, t in tensors.items()},
        folder / "model.safetensors",
    )
    model = build_model(WIDE)
    load_hf(model, folder, packing_of(read_config_json(folder), folder))
    name = "layers.0.mlp.up_proj.weight"
    assert torch.equal(model.state_dict()[name], decoded(tensors, f"model.{name}")), "powers of two are exact in BF16"
