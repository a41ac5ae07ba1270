"""Memory of a step as it is found on the meta device, against steps that run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fp8train.config import RunConfig
from fp8train.convert import convert_model
from fp8train.models import build_model
from fp8train.recipe import load_recipe
from fp8train.trainer.accumulation import accumulate_in_place, accumulating_linears
from fp8train.trainer.assembly import assemble, resolve_activations
from fp8train.trainer.step_memory import LiveBytes, StepMemory, held_copies, step_memory
from tests.hardware import requires_gpu
from tests.tiny_run import tiny_config

CPU = torch.device("cpu")
SHAPE = ("model.num_layers=2", "model.num_kv_heads=1")
CASES = {
    "bf16": ("recipe=bf16",),
    "fp32": ("recipe=fp32",),
    "fp8": ("recipe=blockwise",),
    "fused": ("recipe=blockwise", "fused=always"),
    "one copy": ("recipe=blockwise", "weight_copies=one"),
    "fp32 scales": ("recipe=deepseek_v3",),
    "wgrad in bf16": ("recipe=wgrad_bf16",),
    "rowwise": ("recipe=rowwise",),
    "selective": ("recipe=blockwise", "activation_checkpointing=selective"),
    "full": ("recipe=blockwise", "fused=always", "activation_checkpointing=full"),
    "documents": ("recipe=blockwise", "data.document_mask=true"),
    "tied": ("recipe=blockwise", "model.tie_embeddings=true"),
    "biases": ("recipe=blockwise", "model.qkv_bias=true"),
}


def found(
    config: RunConfig, micro_batches: int, device_type: str = "cpu", shape: tuple[int, int] = (4, 64)
) -> StepMemory:
    """What the meta device says."""
    recipe = load_recipe(config.recipe)
    model = build_model(resolve_activations(config.model, recipe), "meta")
    convert_model(model, recipe, device_type=device_type, fused=config.fused, weight_copies=config.weight_copies)
    model.checkpointing = config.activation_checkpointing
    masked = config.data.document_mask
    return step_memory(model, shape, micro_batches, device_type=device_type, document_mask=masked)


@pytest.mark.parametrize(("case", "micro_batches"), [("fused", 1), *((case, 2) for case in CASES)])
def test_is_that_of_a_step_on_a_cpu(case: str, micro_batches: int, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, *SHAPE, *CASES[case])
    model = assemble(config, CPU).model
    tokens = torch.randint(0, 257, (4, 64))
    documents = torch.zeros_like(tokens) if config.data.document_mask else None
    given = [tokens] if documents is None else [tokens, documents]
    live = LiveBytes([*given, *model.parameters(), *held_copies(model)])
    with live:
        for number in range(micro_batches):
            begun = live.bytes
            with accumulate_in_place(accumulating_linears(model) if number else []):
                loss = model(tokens, tokens, documents)
                kept = live.bytes - begun
                loss.backward()
            del loss
    assert found(config, micro_batches) == StepMemory(kept=kept, peak=live.peak)
    assert kept > 4 * 64 * 128 * 2 and live.peak > live.bytes >= 4 * sum(p.numel() for p in model.parameters())


def test_gradients_of_a_sharded_model_do_not_stay(tmp_path: Path) -> None:
    model = build_model(tiny_config(tmp_path, *SHAPE).model, "meta")
    convert_model(model, "blockwise", device_type="cpu")
    most = [step_memory(model, (4, 64), 2, device_type="cpu", keep_gradients=keep).peak for keep in (True, False)]
    gradients = 4 * sum(parameter.numel() for parameter in model.parameters())
    largest = 4 * max(parameter.numel() for parameter in model.parameters())
    assert gradients - largest <= most[0] - most[1] <= gradients
    assert all(parameter.grad is None and not parameter._post_accumulate_grad_hooks for parameter in model.parameters())


@requires_gpu()
@pytest.mark.parametrize("case", ["bf16", "fused", "full", "documents"])
def test_is_that_of_a_step_on_a_gpu(case: str, tmp_path: Path) -> None:
    """But for cuBLAS's workspaces, of at most 32 MiB each on two handles, and 512 bytes by which sizes are rounded."""
    size = ("model.hidden_size=1024", "model.num_heads=8", "model.num_layers=4", "model.intermediate_size=4096")
    config = tiny_config(tmp_path, *CASES[case], *size, "model.max_seq_len=2048", "fused=auto")
    device = torch.device("cuda", 0)
    model = assemble(config, device).model
    tokens = torch.randint(0, 257, (8, 2048), device=device)
    documents = torch.zeros_like(tokens) if config.data.document_mask else None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for number in range(2):
        with accumulate_in_place(accumulating_linears(model) if number else []):
            model(tokens, tokens, documents).backward()
    measured = torch.cuda.max_memory_allocated() - before
    expected = found(config, 2, "cuda", (8, 2048)).peak
    assert expected > 1 << 30 and abs(measured - expected) <= 2 * (32 << 20) + (1 << 20)
