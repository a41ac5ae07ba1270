"""The decoder as a whole: names, dtypes, causality, documents, tying, checkpointing, conversion, compilation."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fp8train.convert import convert_model
from fp8train.errors import ConfigError
from fp8train.models import Decoder, ModelConfig, RopeScaling, build_model, initialize
from fp8train.models.recompute import CHOICES

CONFIG = ModelConfig(
    vocab_size=100, vocab_multiple=64, hidden_size=128, intermediate_size=192, num_layers=2, num_heads=4,
    num_kv_heads=2, max_seq_len=64, activations="float32", qkv_bias=True, qk_norm=True,
)  # fmt: skip


def make(recipe: str | None = None, **changes) -> Decoder:
    model = build_model(dataclasses.replace(CONFIG, **changes))
    initialize(model, seed=3)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(4))
    if recipe is not None:
        convert_model(model, recipe, backend="cpu")
    return model


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed))


def test_module_names_are_those_of_hugging_face():
    names = set(make().state_dict())
    layer = {name.removeprefix("layers.1.") for name in names if name.startswith("layers.1.")}
    assert layer == {
        "input_layernorm.weight", "post_attention_layernorm.weight",
        *(f"self_attn.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")),
        "self_attn.o_proj.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight",
        "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
    }  # fmt: skip
    assert {name for name in names if not name.startswith("layers.")} == {
        "embed_tokens.weight", "norm.weight", "lm_head.weight",
    }  # fmt: skip


def test_fresh_model_is_as_uncertain_as_its_vocabulary():
    loss = make()(tokens(2, 64), tokens(2, 64, seed=1)) / 128
    # hidden states of norm sqrt(128) against weights of 0.02 spread the logits by 0.23: ln(100) + 0.23^2 / 2 on average
    assert loss.item() == pytest.approx(4.605 + 0.026, abs=0.1)


def test_logits_leave_the_padding_out_and_agree_with_the_loss():
    model, ids, targets = make(), tokens(2, 20), tokens(2, 20, seed=1)
    logits = model(ids)
    assert logits.shape == (2, 20, 100)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert model(ids, targets).item() == pytest.approx(loss.item(), rel=40 * 2**-24)


def test_a_token_changes_nothing_before_it_and_everything_after():
    model, ids = make(), tokens(1, 30)
    changed = ids.clone()
    changed[0, 12] = (ids[0, 12] + 1) % 100
    with torch.no_grad():
        difference = (model(ids) - model(changed))[0].abs().amax(-1)
    assert not difference[:12].any()
    assert (difference[12:] > 0).all()


def test_packed_documents_give_the_losses_of_each_alone():
    model, ids, targets = make(), tokens(1, 48), tokens(1, 48, seed=1)
    lengths = [5, 1, 30, 12]
    documents = torch.repeat_interleave(torch.arange(4, dtype=torch.int32), torch.tensor(lengths))[None]
    packed = model(ids, targets, documents)
    alone = [model(i, t) for i, t in zip(ids.split(lengths, 1), targets.split(lengths, 1), strict=True)]
    # RoPE is relative: a document may start anywhere. Angles are rounded at 48 * 2^-24, and weigh into logits below 1.
    assert packed.item() == pytest.approx(sum(alone).item(), rel=48 * 2**-24 * 4)
    assert packed.item() != pytest.approx(model(ids, targets).item(), rel=1e-4)


def dtype_of(out):
    return tuple(map(dtype_of, out)) if isinstance(out, tuple) else out.dtype


@pytest.mark.parametrize("residual", ["float32", "bfloat16"])
@pytest.mark.parametrize("activations", ["float32", "bfloat16", "auto"])
def test_linears_norms_and_stream_compute_in_their_dtypes(activations, residual):
    model = make("bf16", activations=activations, residual=residual)
    seen: dict[str, tuple[torch.dtype, torch.dtype]] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _m, args, out, name=name: seen.__setitem__(name, (args[0].dtype, dtype_of(out)))
        )
    model(tokens(1, 8), tokens(1, 8)).backward()
    inner = torch.float32 if activations == "float32" else torch.bfloat16
    stream = getattr(torch, residual)
    assert seen["layers.0"][1] == seen["layers.1"][0] == stream
    assert seen["layers.1.input_layernorm"] == seen["layers.1.post_attention_layernorm"] == (stream, (stream, inner))
    assert seen["norm"] == (stream, inner)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "self_attn.k_norm", "mlp.down_proj"):
        assert seen[f"layers.1.{name}"] == (inner, inner), name
    assert seen["lm_head"] == (inner, inner)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_tied_weight_is_one_parameter_after_to_empty_and_copies():
    model = build_model(dataclasses.replace(CONFIG, tie_embeddings=True), "meta")
    convert_model(model, "blockwise", backend="cpu")
    model.to_empty(device="cpu")
    initialize(model, seed=1)
    for one in (model, copy.deepcopy(model), model.float()):
        assert one.lm_head.weight is one.embed_tokens.weight
    model(tokens(1, 8), tokens(1, 8)).backward()
    assert model.embed_tokens.weight.grad.norm() > 0
    assert len(list(model.parameters())) == len(list(make().parameters())) - 1


@pytest.mark.parametrize("attention", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
def test_attention_computes_in_its_own_dtype(attention, masked, monkeypatch):
    model = make("bf16", activations="bfloat16", attention=attention)
    plain = torch.nn.functional.scaled_dot_product_attention
    seen = []

    def watched(*operands, **options):
        seen.append({tensor.dtype for tensor in (*operands, options.get("attn_mask")) if tensor is not None})
        return plain(*operands, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    documents = torch.arange(12)[None] // 5 if masked else None
    model(tokens(1, 12), tokens(1, 12), documents).backward()
    assert seen == 2 * [{torch.float32 if attention == "float32" else torch.bfloat16}]


class MatrixMultiplications(TorchDispatchMode):
    """Counts operations that multiply matrices, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.gemms = self.attentions = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation)
        self.gemms += name.startswith(("fp8train.mm", "fp8train.scaled_mm"))
        self.attentions += "attention" in name and "backward" not in name
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", ["bf16", "blockwise", "deepseek_v3"])
def test_checkpointing_changes_what_is_computed_again_and_no_bit_of_the_gradients(recipe):
    model = make(recipe, activations="bfloat16")
    gradients, counts = {}, {}
    for choice in CHOICES:
        model.checkpointing = choice
        model.zero_grad()
        with MatrixMultiplications() as counted:
            model(tokens(2, 32), tokens(2, 32, seed=1)).backward()
        gradients[choice] = {name: p.grad.clone() for name, p in model.named_parameters()}
        counts[choice] = counted.gemms, counted.attentions
    for choice in ("selective", "full"):
        for name, gradient in gradients["none"].items():
            assert torch.equal(gradient, gradients[choice][name]), (choice, name)
    assert counts["none"] == (3 * 15, 2)  # 7 linears in 2 layers and lm_head, three GEMMs each
    assert counts["selective"] == counts["none"]
    assert counts["full"][0] > counts["none"][0] and counts["full"][1] == 4


@pytest.mark.parametrize("size", ["num_layers", "vocab_size", "intermediate_size", "head_dim"])
def test_model_beyond_every_machine_is_refused_before_it_is_laid_out(size):
    with pytest.raises(ConfigError, match=r"its sizes come to .* parameters; needs at most 1e\+13"):
        build_model(dataclasses.replace(CONFIG, **{size: 10**12}), "meta")


def test_unknown_checkpointing_is_refused():
    with pytest.raises(ConfigError, match="activation_checkpointing is 'some'; needs one of none, selective, full"):
        make().checkpointing = "some"


def test_whole_model_is_one_graph():
    """With documents, selective checkpointing and a loss in chunks: each is a way to break the graph."""
    model = make("blockwise", activations="bfloat16", num_layers=1)
    ids, targets = tokens(4, 64), tokens(4, 64, seed=1)
    documents = torch.arange(64)[None].expand(4, 64) // 10
    wanted = model(ids, targets, documents)
    wanted.backward()
    gradient = model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    model.checkpointing = "selective"
    model.logits_per_chunk = 1  # two chunks of 128 tokens
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(ids, targets, documents)
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=256 * 2**-24)
    found = model.layers[0].mlp.up_proj.weight.grad
    # the chunked loss sums in another order; FP8 and BF16 roundings of nearly equal numbers rarely fall apart
    assert (found - gradient).norm() <= 2**-9 * gradient.norm()


@pytest.mark.parametrize("choice", CHOICES)
def test_compiled_step_computes_the_rope_tables_once(choice):
    """By an operator that inductor, whose partition of forward and backward this is, cannot fuse into the rotations."""
    # here, for they import torch._dynamo: 6 s in every process that collects this file
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    seen: dict[str, Counter[str]] = {"forward": Counter(), "backward": Counter()}

    def record(direction: str):
        def compile_graph(graph, _inputs):
            seen[direction].update(str(node.target) for node in graph.graph.nodes)
            return make_boxed_func(graph.forward)

        return compile_graph

    backend = aot_autograd(
        fw_compiler=record("forward"),
        bw_compiler=record("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    model, ids = make(), tokens(2, 16)
    model.checkpointing = choice
    wanted = model(ids)
    torch.compiler.reset()
    logits = torch.compile(model, fullgraph=True, backend=backend)(ids)
    logits.sum().backward()
    assert torch.equal(logits, wanted)
    tables = "fp8train.rope_tables.default"
    assert (seen["forward"][tables], seen["backward"][tables]) == (1, 0)
    assert not {"aten.cos.default", "aten.sin.default", "aten.pow.Scalar"} & set(seen["forward"] + seen["backward"])


def test_compiled_decoder_takes_any_sequence_length():
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=32)
    model = make(rope_scaling=scaling)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for seq_len in (16, 9, 64):
            ids = tokens(2, seq_len)
            assert torch.equal(compiled(ids), model(ids)), seq_len
