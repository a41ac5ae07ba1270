"""fp8train explain: the plan that it prints, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from fp8train.backends.selection import PLANNED
from fp8train.config import load_config
from fp8train.convert import convert_model
from fp8train.errors import exit_code
from fp8train.explain import main
from fp8train.models import build_model
from fp8train.recipe import load_recipe
from fp8train.trainer.footprint import footprint
from fp8train.units import bytes_text
from tests.recipe_documents import rows_everywhere

EIGHT_B = ["model=llama3_8b", "recipe=blockwise"]


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 0
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert exit_code(main, list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    return captured.err


def test_eight_billion_parameters_fit_on_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, *EIGHT_B)
    assert "8.03 B parameters, 225 linears" in text
    assert len(text.splitlines()) < 30
    line = next(line for line in text.splitlines() if line.startswith("layers.{0..31}.mlp.gate_proj"))
    cells = [" ".join(cell.split()) for cell in line.split("  ") if cell.strip()]
    # 32 weights [14336, 4096]: 4 bytes an element in the master, 1 + 1 in the codes for fprop and dgrad, 2 * 4 a block
    sizes = ["7.00 GiB", "3.50 GiB", "896 KiB"]
    assert cells[1:] == ["32", "[14336, 4096]", "fp8", "fp8", "fp8", "fp8", "3: *layers.*", "cpu", *sizes]
    assert "x e4m3 1x128 pow2, w e4m3 128x128 pow2" in text
    assert "1 linear: rule 1 '*lm_head' says bf16" in text
    assert "planned in FP8: 93.0 % of the linears' FLOPs" in text


def test_a_gpu_can_be_planned_for_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, *EIGHT_B, "device=sm_90")
    assert "backend triton: own FP8 kernels (planned for sm_90; not tried here)" in text
    assert "layers.{0..31}.input_layernorm -> q_proj, k_proj, v_proj" in text and "has no kernel" not in text
    assert "backend dequant_bf16 as asked" in run(capsys, *EIGHT_B, "device=sm_90", "backend=dequant_bf16")
    for name in ("cpu", "hopper"):
        assert "computes on the CPU" in refusal(capsys, *EIGHT_B, "device=sm_90", f"backend={name}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_not_promised(capsys: pytest.CaptureFixture[str]) -> None:
    assert "finds no CUDA GPU" in refusal(capsys, *EIGHT_B, "device=cuda")


@pytest.mark.parametrize(("moments", "total"), [("fp32", "134 GiB"), ("bf16", "104 GiB")])
def test_bytes_of_a_rank(capsys: pytest.CaptureFixture[str], moments: str, total: str) -> None:
    """8.03e9 parameters: 4 bytes of weight and 4 of gradient, two moments; copies of 2 bytes but for the embedding."""
    per_parameter = {"fp32": 16, "bf16": 12}[moments]
    copies = 2 * (8_030_261_248 - 128256 * 4096 - 65 * 4096) + 4 * (8_030_261_248 - 2 * 128256 * 4096) // 128**2
    assert total == bytes_text(per_parameter * 8_030_261_248 + copies)
    assert f"each rank holds {total} besides activations: 29.9 GiB FP32 weights" in run(
        capsys, *EIGHT_B, f"optim.moments={moments}"
    )


def test_bytes_of_a_rank_that_holds_its_rows_only(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every size is a multiple of 8: an eighth of weights, gradients and BF16 moments, and of the layers' codes."""
    parameters, layer, norms, embedding = 8_030_261_248, 218_112_000, 2 * 4096, 128256 * 4096
    codes = 32 * (layer - norms)
    text = run(capsys, *EIGHT_B, "optim.moments=bf16", "parallel=fsdp", "ranks=8")
    total = bytes_text((12 * parameters + codes) // 8)
    assert f"each of 8 ranks holds {total} besides activations: 3.74 GiB FP32 weights" in text
    weights = 2 * (layer + 3 * norms) + 6 * embedding + 4 * 4096  # codes; FP32 embedding and norms; lm_head in BF16
    gradients = 4 * (parameters - 30 * layer)
    assert f"{bytes_text(weights)} of gathered weights" in text and f"{bytes_text(gradients)} of FP32 gradients" in text
    kept = run(capsys, *EIGHT_B, "parallel=fsdp", "ranks=8", "parallel.reshard_after_forward=false")
    assert f"{bytes_text(weights + 30 * (layer + 3 * norms))} of gathered weights, all of them" in kept
    masters = run(capsys, *EIGHT_B, "optim.moments=bf16", "parallel=fsdp", "ranks=8", "parallel.gather=fp32")
    assert f"holds {bytes_text(12 * parameters // 8 + 2 * embedding)} besides" in masters
    assert f"{bytes_text(gradients)} of gathered weights" in masters
    groups = run(capsys, *EIGHT_B, "optim.moments=bf16", "parallel=fsdp", "ranks=64", "parallel.shard_ranks=8")
    assert groups == text.replace("each of 8 ranks", "each of 64 ranks, sharded over 8,")
    assert "got 8; needs a divisor of the number of ranks, 12" in refusal(
        capsys, *EIGHT_B, "parallel=fsdp", "ranks=12", "parallel.shard_ranks=8"
    )
    recipe = tmp_path / "rows.yaml"
    recipe.write_text(json.dumps(rows_everywhere()), encoding="utf-8")
    head = run(capsys, "model=llama3_8b", f"recipe={recipe}", "parallel=fsdp", "ranks=8")
    assert f"{bytes_text(2 * embedding + 4 * (128256 + 4096))} of copies" in head, "lm_head keeps what its master gives"
    assert "each rank holds" in run(capsys, *EIGHT_B, "parallel=fsdp"), "one rank has nothing to shard"
    assert "ranks is 0; needs at least 1" in refusal(capsys, *EIGHT_B, "ranks=0")


def test_all_prints_every_linear(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, *EIGHT_B, "--all")
    assert sum(line.startswith("layers.") for line in text.splitlines()) == 224
    assert "layers.31.mlp.down_proj" in text


def test_json_holds_the_same_plan(capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(run(capsys, *EIGHT_B, "--json"))
    assert document["model"] == "llama3_8b" and len(document["linears"]) == 225
    assert document["planned_fp8_share"] == pytest.approx(0.930, abs=5e-4)
    assert document["linears"][-1]["bytes"] == {"master": 4 * 128256 * 4096, "codes": 2 * 128256 * 4096, "scales": 0}


def test_quickstart_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys).startswith("model quickstart")


def test_moments_of_the_recipe_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "recipe=deepseek_v3")
    assert "AdamW moments bf16" in text and "x requant" in text


def test_what_a_recipe_does_beside_its_rules_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    more = {
        "schedule": [{"at": 0.9, "use": "bf16"}],
        "swiglu": {"smooth": True, "clamp": 50.0},
        "alarm": {"on": ["nonfinite", "spike"], "at_most": 3},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(load_recipe("blockwise").document | more))
    assert exit_code(main, ["model=quickstart", f"recipe={tmp_path / 'recipe.yaml'}"]) == 0
    text = capsys.readouterr().out
    assert "schedule: from 90% of the steps on, linears whose rule quantises are in bf16" in text
    assert "if each sees every token, until the schedule changes it" in text
    assert "swiglu: the input of *down_proj is clamped to 50 and its channels scaled to alike size" in text
    assert "alarm: on nonfinite or spike the worst linear goes to BF16, at most 3 times" in text
    sharded = run(capsys, f"recipe={tmp_path / 'recipe.yaml'}", "parallel=fsdp", "ranks=2")
    assert "swiglu: the input of" in sharded and "a step takes at most" in sharded


def test_hugging_face_folder(capsys: pytest.CaptureFixture[str], hf_folder: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    text = run(capsys, f"hf={hf_folder}", "recipe=deepseek_v3", "ranks=7")
    line = next(line for line in text.splitlines() if line.startswith("model.layers.{0..2}.self_attn.o_proj"))
    assert "fp8_pow2_x" in line and "[32, 32]" in line


def test_modules_out_of_reach_are_named(capsys: pytest.CaptureFixture[str], hf_folder: Path) -> None:
    """Hugging Face keeps the experts of a mixture in one parameter, which no nn.Linear rule can reach."""
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    config = json.loads((hf_folder / "config.json").read_text())
    config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4}
    (hf_folder / "config.json").write_text(json.dumps(config))
    text = run(capsys, f"hf={hf_folder}")
    assert "not reached: model.layers.*.mlp.experts (MixtralExperts), " in text


def test_help_names_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "--help")
    assert "  hf=null " in text and "  device=auto " in text and "--all" in text and "--json" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["recipe=blokwise"], "nearest: blockwise", id="recipe"),
        pytest.param(["model=llama9"], "llama", id="model"),
        pytest.param(["recip=blockwise"], "recipe", id="key"),
        pytest.param(["backend=abacus"], "'abacus' is not known", id="backend"),
        pytest.param(["hf=/nowhere"], "has no config.json", id="no folder"),
        pytest.param(["hf=a", "model=quickstart"], "both name a model", id="folder and preset"),
        pytest.param(["--al"], "--al", id="flag"),
        pytest.param(["device=tpu"], "needs one of auto, cpu, cuda, sm_90", id="device"),
        pytest.param(["rank=2"], "unknown key 'rank'; nearest: ranks", id="key of its own"),
        pytest.param(["rankz.x=2"], "explain: unknown key 'rankz", id="below a key of its own"),
    ],
)
def test_bad_arguments_exit_with_2_and_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refusal(capsys, *arguments)


def test_folder_of_another_kind_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    assert "needs a causal language model" in refusal(capsys, f"hf={tmp_path}")
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refusal(capsys, f"hf={tmp_path}")


def test_recipe_that_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("version: 1\nrules:\n  - {match: '*q_prj', use: bf16}\n  - {match: '*', use: bf16}\n")
    error = refusal(capsys, f"recipe={path}")
    assert "mine.yaml: rule 1 '*q_prj' matches none" in error and "q_proj" in error


def test_rotary_embeddings_are_named_with_what_rotates(capsys: pytest.CaptureFixture[str]) -> None:
    kernel = run(capsys, *EIGHT_B, "device=sm_90")
    assert (
        "rotated by a kernel in eager runs, by the formula in compiled ones:\n  layers.{0..31}.self_attn.rope" in kernel
    )
    formula = run(capsys, *EIGHT_B, "device=cpu", "backend=reference", "fused=always")
    why = "backend reference has no kernel for it"
    assert f"rotated by the formula:\n  32, e.g. layers.0.self_attn.rope: {why}" in formula


def test_memory_of_a_step_is_what_is_held_and_what_comes_and_goes(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["model=llama_125m", "device=sm_90", "micro_batch_samples=4"]
    step = json.loads(run(capsys, *arguments, "--json"))["step_memory"]
    assert 0 < step["kept"] < step["peak"]
    line = run(capsys, *arguments).splitlines()[-1]
    most = re.search(r"keeps (.*) for backward, and a step takes at most (.*) in all if it is not compiled$", line)
    assert most is not None and most[1] == bytes_text(step["kept"])
    model = build_model(load_config(["model=llama_125m"]).model, "meta")
    report = convert_model(model, "blockwise", device_type=PLANNED)
    held = footprint(model, "fp32", copies=report.copy_bytes())
    assert most[2] == bytes_text(held.total - held.weights + step["peak"])  # whose gradients are in the peak
    assert run(capsys, *arguments, "recipe=bf16").splitlines()[-1] != line


def test_replicated_ranks_have_room_for_all_gradients_at_all_times(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(["model=llama_125m"])
    found = []
    for ranks in (1, 2):  # each with one micro-batch, whose peak comes before the first gradient
        batch = f"global_batch_tokens={ranks * config.micro_batch(1) * config.seq_len}"
        text = run(capsys, "model=llama_125m", "device=sm_90", batch, f"ranks={ranks}", "--json")
        found.append(json.loads(text)["step_memory"])
    alone, together = found
    gradients = 4 * sum(parameter.numel() for parameter in build_model(config.model, "meta").parameters())
    assert together == {"kept": alone["kept"], "peak": alone["peak"] + gradients}


def test_ranks_that_do_not_divide_the_batch_are_refused_as_train_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert "global_batch_tokens: got" in refusal(capsys, "model=llama_125m", "ranks=7")
