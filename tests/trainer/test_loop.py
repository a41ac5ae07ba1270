from __future__ import annotations

import io
import json
import math
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import Tensor, nn

from fp8train.checkpoint import open_checkpoint
from fp8train.config import config_from_dict, load_config
from fp8train.data import Batch
from fp8train.distributed import World
from fp8train.errors import CheckpointError, ConfigError, DataError, DivergedError, TrainingError
from fp8train.metrics import read_metrics
from fp8train.models import build_model, initialize, save_hf
from fp8train.recipe import load_recipe
from fp8train.trainer.assembly import assemble, parameter_hash
from fp8train.trainer.console import Console
from fp8train.trainer.measuring import PeakMemory, Speed, StreamHash
from fp8train.trainer.run_lock import lock_run_folder
from fp8train.trainer.step import train_step
from tests.tiny_run import tiny_arguments, tiny_config, tiny_train


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl") if "loss" in row]


class TestRunFolder:
    def test_metrics_have_the_agreed_fields(self, trained: SimpleNamespace):
        rows = read_metrics(trained.run_dir / "metrics.jsonl")
        steps = [row for row in rows if "loss" in row]
        assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
        assert {"loss", "lr", "grad_norm", "tokens_seen", "tokens_per_second", "step_seconds"} <= set(steps[0])
        assert [row["tokens_seen"] for row in steps] == [512 * step for step in range(1, 7)]
        evals = [row for row in rows if "eval_loss" in row]
        assert [row["step"] for row in evals] == [3, 6]
        assert {"eval_loss_bf16", "bits_per_byte"} <= set(evals[0])

    def test_training_learns(self, trained: SimpleNamespace):
        curve = losses(trained.run_dir)
        assert curve[-1] < curve[0] - 0.5

    def test_configuration_and_recipe_are_those_of_the_run(self, trained: SimpleNamespace):
        saved = config_from_dict(yaml.safe_load((trained.run_dir / "config.yaml").read_text()))
        assert saved.steps == 6 and saved.run_dir == str(trained.run_dir)
        assert load_recipe(trained.run_dir / "recipe.yaml").hash == load_recipe("blockwise").hash

    def test_environment_says_where_it_ran(self, trained: SimpleNamespace):
        environment = json.loads((trained.run_dir / "environment.json").read_text())
        assert environment["torch"] == torch.__version__
        assert environment["torch_threads"] == torch.get_num_threads()
        assert environment["device"]["name"] and environment["command"]
        assert environment["cpu_kernels"] in (True, False) and environment["cpu_kernels_reason"]

    def test_coverage_counts_training_alone(self, trained: SimpleNamespace):
        coverage = json.loads((trained.run_dir / "coverage.json").read_text())
        calls = {row["fqn"]: row["gemms"] for row in coverage["linears"]}
        tokens = 6 * 512
        for gemm in ("fprop", "dgrad", "wgrad"):  # evaluation would add rows to fprop
            assert calls["layers.0.mlp.up_proj"][gemm]["fp8_rows"] == tokens
            assert calls["layers.0.mlp.up_proj"][gemm]["other_rows"] == 0
            assert calls["lm_head"][gemm]["fp8_rows"] == 0
            assert calls["lm_head"][gemm]["other_rows"] == tokens

    def test_share_in_fp8_is_that_of_the_flops(self, trained: SimpleNamespace):
        layer = 4 * 128 * 128 + 3 * 128 * 256
        head = 320 * 128  # 257 ids padded to a multiple of 64
        assert trained.result.fp8_flops_share == pytest.approx(layer / (layer + head), rel=1e-12)

    def test_result_file_is_the_result(self, trained: SimpleNamespace):
        content = json.loads((trained.run_dir / "result.json").read_text())
        assert content["finished"] is True and content["tokens_seen"] == 6 * 512
        assert content["final_train_loss"] == losses(trained.run_dir)[-1] == trained.result.final_train_loss
        assert all(content[key] for key in ("model_hash", "tokenizer_hash", "data_hash", "stream_hash", "eval_hash"))

    def test_bits_per_byte_follow_from_exact_counts(self, trained: SimpleNamespace):
        row = trained.result.evals[-1]
        assert row["eval_tokens"] == 8 * 64
        nats = row["eval_loss"] * row["eval_tokens"]
        assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / row["eval_bytes"], rel=1e-12)
        assert row["eval_bytes"] <= row["eval_tokens"]  # a byte tokenizer: one byte a token, none for a separator

    def test_console_shows_each_step_and_the_end(self, trained: SimpleNamespace):
        assert "step 6/6 (100.0%) loss" in trained.output
        assert trained.output.splitlines()[-1].startswith("finished 6 steps")


class TestComparability:
    def test_evaluation_does_not_disturb_training(self, trained: SimpleNamespace, tmp_path: Path):
        tiny_train(tmp_path, "eval.every=1", f"data.path={trained.folder / 'text.txt'}")
        assert losses(tmp_path / "run") == losses(trained.run_dir)

    def test_recipes_share_initial_weights_data_and_order(self, trained: SimpleNamespace, tmp_path: Path):
        other = tiny_train(tmp_path, "recipe=bf16")
        for key in ("init_hash", "stream_hash", "data_hash", "eval_hash", "model_hash", "tokenizer_hash"):
            assert getattr(other, key) == getattr(trained.result, key), key
        assert other.fp8_flops_share == 0
        assert other.evals[-1]["eval_loss"] == other.evals[-1]["eval_loss_bf16"]
        assert losses(tmp_path / "run") != losses(trained.run_dir)

    def test_another_seed_is_another_start_and_another_order(self, trained: SimpleNamespace, tmp_path: Path):
        other = tiny_train(tmp_path, "seed=2", "steps=1")
        assert other.init_hash != trained.result.init_hash
        assert other.stream_hash != trained.result.stream_hash
        assert other.eval_hash == trained.result.eval_hash

    def test_fp32_recipe_runs_in_fp32_throughout(self, tmp_path: Path):
        assert tiny_train(tmp_path, "recipe=fp32", "steps=1", "eval.bf16=false").finished

    @pytest.mark.parametrize("choice", ["full", "selective"])
    def test_activation_checkpointing_does_not_change_the_losses(
        self, choice: str, trained: SimpleNamespace, tmp_path: Path
    ):
        tiny_train(tmp_path, f"activation_checkpointing={choice}", "steps=6", "eval.bf16=false")
        assert losses(tmp_path / "run") == losses(trained.run_dir)


class TestAssembly:
    def test_weights_come_from_a_hugging_face_folder(self, tmp_path: Path):
        options = ("model.vocab_multiple=1", "steps=1", "eval.bf16=false")
        config = tiny_config(tmp_path, *options)
        model = build_model(config.model)
        initialize(model, seed=99)
        save_hf(model.state_dict(), config.model, tmp_path / "hf", "float32")
        options += ("data.tokenizer=bytes",)
        result = tiny_train(tmp_path, *options, f"model.init_from={tmp_path / 'hf'}")
        assert result.init_hash == parameter_hash(model)
        bare = [argument for argument in tiny_arguments(tmp_path, *options) if not argument.startswith("model.")]
        assert load_config([*bare, "model=hf", f"model.init_from={tmp_path / 'hf'}"]).model.hidden_size == 128

    def test_compile_compiles_the_model_in_place(self, tmp_path: Path):
        for wanted in (True, False):
            model = assemble(tiny_config(tmp_path, f"compile={wanted}"), torch.device("cpu")).model
            assert (model._compiled_call_impl is not None) == wanted
            assert not any("_orig_mod" in name for name in model.state_dict())

    def test_memory_is_told_by_kind(self, trained: SimpleNamespace):
        kinds, weights = trained.result.memory_bytes, 4 * trained.result.parameters
        assert kinds["weights"] == kinds["gradients"] == weights
        assert 2 * weights <= kinds["moments"] < 2.01 * weights  # and a step counter for each tensor
        assert trained.result.peak_memory_bytes > sum(kinds.values())


class TestResume:
    def test_finished_run_says_so_and_does_nothing(self, trained: SimpleNamespace):
        before = (trained.run_dir / "metrics.jsonl").read_bytes()
        stream = io.StringIO()
        result = tiny_train(trained.folder, "checkpoint.every=3", "eval.every=3", console=Console(stream=stream))
        assert "is finished: 6 steps" in stream.getvalue()
        assert result == trained.result
        assert (trained.run_dir / "metrics.jsonl").read_bytes() == before

    def test_never_refuses_a_folder_that_is_not_empty(self, trained: SimpleNamespace):
        with pytest.raises(ConfigError, match="not empty and resume=never"):
            tiny_train(trained.folder, "resume=never")

    def test_folder_in_use_is_refused(self, tmp_path: Path):
        with lock_run_folder(tmp_path / "run"), pytest.raises(CheckpointError, match="in use"):
            tiny_train(tmp_path)

    def test_checkpoint_of_another_folder_starts_a_new_one(self, copied: Path):
        source = copied / "run" / "checkpoints" / "step_00000003"
        result = tiny_train(copied, f"resume={source}", run="branch")
        assert result.finished and losses(copied / "branch") == losses(copied / "run")[3:]
        with pytest.raises(ConfigError, match="belongs to another run"):
            tiny_train(copied, f"resume={copied / 'run'}", run="branch")


class SignallingConsole(Console):
    """Sends this process a signal while a step is being shown."""

    def __init__(self, number: signal.Signals, at_step: int) -> None:
        self.lines = io.StringIO()
        super().__init__(6, stream=self.lines)
        self._number, self._at_step = number, at_step

    def step(self, row, eta_seconds) -> None:
        if row["step"] == self._at_step:
            os.kill(os.getpid(), self._number)
        super().step(row, eta_seconds)


class TestStopping:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
    def test_signal_finishes_the_step_saves_and_goes_on_later(
        self, number: signal.Signals, trained: SimpleNamespace, tmp_path: Path
    ):
        console = SignallingConsole(number, at_step=2)
        handler = signal.getsignal(number)
        stopped = tiny_train(tmp_path, console=console)
        assert (stopped.finished, stopped.stopped_by, stopped.steps) == (False, number.name, 3)
        assert f"stopped by {number.name} after step 3 of 6" in console.lines.getvalue()
        assert open_checkpoint(tmp_path / "run").step == 3
        assert signal.getsignal(number) is handler
        resumed = tiny_train(tmp_path)
        assert resumed.finished and losses(tmp_path / "run") == losses(trained.run_dir)
        assert resumed.stream_hash == trained.result.stream_hash
        rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
        assert [row["process_step"] for row in rows if "loss" in row] == [1, 2, 3, 1, 2, 3], "of each process"

    def test_time_limit_stops_after_a_step_and_saves(self, tmp_path: Path):
        result = tiny_train(tmp_path, "time_limit_seconds=1e-6")
        assert (result.finished, result.steps) == (False, 1) and "time limit" in str(result.stopped_by)
        assert open_checkpoint(tmp_path / "run").step == 1

    def test_runaway_loss_ends_the_run_after_the_allowed_steps(self, tmp_path: Path):
        with pytest.raises(TrainingError, match="2 steps in a row had a loss .* not finite.*optim.lr"):
            tiny_train(
                tmp_path, "optim.lr=1e38", "optim.clip_grad_norm=null", "optim.max_nonfinite_steps=2", "steps=30"
            )
        rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
        assert [row["loss"] for row in rows[-2:]] == [None, None]
        assert all(row["nonfinite"] and row["skipped"] for row in rows[-2:])

    def test_run_that_diverged_says_where_in_its_result_and_can_be_tried_again(self, tmp_path: Path):
        wild = ("optim.lr=1e38", "optim.clip_grad_norm=null", "optim.max_nonfinite_steps=2", "steps=30")
        with pytest.raises(DivergedError, match="try recipe=bf16") as caught:
            tiny_train(tmp_path, *wild)
        rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
        result = json.loads((tmp_path / "run" / "result.json").read_text())
        first = next(row["step"] for row in rows if row.get("skipped"))
        assert result["diverged"] == {"step": first, "reason": caught.value.reason} and first == rows[-1]["step"] - 1
        assert (result["finished"], result["steps"], result["stopped_by"]) == (False, rows[-1]["step"], None)
        assert re.match("(loss|gradient norm) is (nan|inf)", caught.value.reason)
        assert tiny_train(tmp_path, "steps=4").finished
        assert json.loads((tmp_path / "run" / "result.json").read_text())["diverged"] is None

    def test_run_in_bf16_that_diverged_is_not_told_to_try_bf16(self, tmp_path: Path):
        with pytest.raises(DivergedError, match=r"needs finite ones\. Lower optim.lr or look at the data\.$"):
            tiny_train(tmp_path, "recipe=bf16", "optim.lr=1e38", "optim.max_nonfinite_steps=2", "steps=30")


class TestRefusals:
    def test_bad_data_leaves_no_folder_behind(self, tmp_path: Path):
        with pytest.raises(DataError):
            tiny_train(tmp_path, f"data.path={tmp_path / 'missing.txt'}")
        assert not (tmp_path / "run").exists()

    def test_small_vocabulary_is_refused_before_anything_is_written(self, tmp_path: Path):
        with pytest.raises(DataError, match="vocab"):
            tiny_train(tmp_path, "model.vocab_size=200")
        assert not (tmp_path / "run").exists()

    def test_run_dir_that_is_a_file_is_refused(self, tmp_path: Path):
        (tmp_path / "run").write_text("mine")
        with pytest.raises(CheckpointError, match="is a file"):
            tiny_train(tmp_path)
        assert (tmp_path / "run").read_text() == "mine"


def test_profile_window_leaves_a_trace_and_a_table(tmp_path: Path):
    tiny_train(tmp_path, "profile.steps=[2,2]", "steps=3")
    assert {path.name for path in (tmp_path / "run" / "profile").iterdir()} == {"rank0.json", "rank0.txt"}


def test_deterministic_is_on_inside_and_off_again_after(tmp_path: Path):
    seen: list[bool] = []

    class Watching(Console):
        def step(self, row, eta_seconds) -> None:
            seen.append(torch.are_deterministic_algorithms_enabled())

    tiny_train(tmp_path, "deterministic=true", "steps=1", console=Watching(enabled=False))
    assert seen == [True] and not torch.are_deterministic_algorithms_enabled()


class Toy(nn.Module):
    """Summed loss of one weight: w * sum of the tokens that are not masked; NaN where a token is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[2.0]]))

    def forward(self, tokens: Tensor, targets: Tensor, document_ids: Tensor | None) -> Tensor:
        kept = tokens[targets != -100].float()
        return (self.weight * kept.masked_fill(kept < 0, math.nan)).sum()


def batch(tokens: list[int], masked: int = 0) -> Batch:
    row = torch.tensor([tokens])
    targets = row.clone()
    targets[:, :masked] = -100
    return Batch(tokens=row, targets=targets, document_ids=None, sample_ids=[0])


class TestTrainStep:
    def step(self, model: nn.Module, batches: list[Batch], **options):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        return train_step(model, optimizer, batches, World(), **{"clip": None, **options})

    def test_loss_is_the_mean_over_all_valid_tokens_whatever_the_split(self):
        whole, split = Toy(), Toy()
        one = self.step(whole, [batch([1, 2, 3, 4, 5, 6], masked=1)])
        two = self.step(split, [batch([1, 2], masked=1), batch([3, 4, 5, 6])])
        assert one.valid_tokens == two.valid_tokens == 5
        assert one.loss == two.loss == 2.0 * (2 + 3 + 4 + 5 + 6) / 5
        assert one.grad_norm == pytest.approx(4.0) and whole.weight.item() == pytest.approx(2.0 - 4.0)
        assert split.weight.item() == pytest.approx(whole.weight.item(), rel=1e-6)

    def test_gradient_is_clipped_and_reported_before_clipping(self):
        model = Toy()
        result = self.step(model, [batch([4])], clip=1.0)
        assert result.grad_norm == pytest.approx(4.0)
        assert model.weight.item() == pytest.approx(1.0)

    @pytest.mark.parametrize("where", [0, 1], ids=["first micro-batch", "last micro-batch"])
    def test_non_finite_step_changes_neither_weights_nor_moments(self, where: int):
        model = Toy()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        train_step(model, optimizer, [batch([1]), batch([1])], World(), clip=None)
        before = (model.weight.item(), {key: value.clone() for key, value in optimizer.state[model.weight].items()})
        batches = [batch([1]), batch([1])]
        batches[where] = batch([-1])
        result = train_step(model, optimizer, batches, World(), clip=1.0)
        assert not result.updated and not math.isfinite(result.loss)
        assert model.weight.item() == before[0] and model.weight.grad is None
        assert all(torch.equal(before[1][key], value) for key, value in optimizer.state[model.weight].items())

    def test_request_to_stop_comes_back(self):
        assert self.step(Toy(), [batch([1])], stop=True).stop
        assert not self.step(Toy(), [batch([1])]).stop


class TestMeasuring:
    def test_first_steps_do_not_count(self):
        speed = Speed(skip_steps=2)
        for seconds in (10.0, 10.0, 1.0, 2.0, 1.0):
            speed.add(100, seconds)
        assert speed.tokens_per_second == 100
        assert speed.eta_seconds(3) == pytest.approx(3 * 4 / 3)

    def test_no_rate_before_a_step_counts(self):
        speed = Speed(skip_steps=2)
        speed.add(100, 1.0)
        assert speed.tokens_per_second is None and speed.eta_seconds(5) is None

    def test_stream_hash_does_not_depend_on_the_split_but_on_the_order(self):
        def rows(ids: list[int], tokens: list[list[int]]) -> Batch:
            held = torch.tensor(tokens)
            return Batch(tokens=held, targets=held, document_ids=None, sample_ids=ids)

        whole, split, swapped = StreamHash(), StreamHash(), StreamHash()
        whole.add([rows([0, 1], [[1, 2], [3, 4]])])
        split.add([rows([1], [[3, 4]]), rows([0], [[1, 2]])])
        swapped.add([rows([0, 1], [[3, 4], [1, 2]])])
        assert whole.total(World()) == split.total(World()) != swapped.total(World())

    def test_peak_memory_is_of_this_run_alone(self):
        large = torch.ones(64 << 20, dtype=torch.uint8)
        del large
        memory = PeakMemory(torch.device("cpu"))
        before = memory.bytes()
        held = torch.ones(32 << 20, dtype=torch.uint8)
        assert 24 << 20 <= memory.bytes() - before <= 48 << 20
        assert held.sum() == 32 << 20
