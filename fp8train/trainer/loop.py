"""The training loop: build, resume, step, log, evaluate, save, stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fp8train.checkpoint import Checkpoint, content_of, find_resume
from fp8train.checkpoint.random_state import random_state
from fp8train.config import RunConfig
from fp8train.data import Batcher
from fp8train.distributed import World
from fp8train.distributed.agreement import on_every_rank, on_main
from fp8train.errors import DivergedError
from fp8train.metrics import Metrics
from fp8train.models import count_parameters
from fp8train.optim import build_optimizer, checkpoint_bytes, learning_rate, set_learning_rate
from fp8train.trainer.agreement import agreed_assembly, agreed_dataset, check_same_command
from fp8train.trainer.assembly import Assembly, CoverageLog, agreed_hash, memory_by_kind, model_hash, spread
from fp8train.trainer.console import Console, ending, introduction
from fp8train.trainer.determinism import deterministic_algorithms
from fp8train.trainer.divergence import check_diverged, count_step
from fp8train.trainer.environment import device_name
from fp8train.trainer.evaluation import EvalSet, evaluate, score_text
from fp8train.trainer.footprint import check_memory
from fp8train.trainer.measuring import PeakMemory, Speed, StreamHash, step_row
from fp8train.trainer.out_of_memory import told_when_out_of_memory
from fp8train.trainer.profiling import ProfileWindow
from fp8train.trainer.progress import Progress, saved_progress
from fp8train.trainer.run_folder import (
    RunResult,
    check_folder,
    finished_result,
    lost_rows,
    open_metrics,
    saved_evals,
    set_aside,
    write_result,
    write_run_files,
)
from fp8train.trainer.run_lock import claimed
from fp8train.trainer.same_run import changes_since, check_same_run, data_facts, resume_mode
from fp8train.trainer.saver import Saver
from fp8train.trainer.saving import SaveClock, check_room, retention, return_point, training_state
from fp8train.trainer.shared_folder import check_same_checkpoint
from fp8train.trainer.step import StepResult, train_step
from fp8train.trainer.stopping import StopRequest, told_when_aborted
from fp8train.trainer.watcher import RollBack, Watcher
from fp8train.trainer.watchers import NOTED, after_step, build_watchers


class Trainer:
    """Trains one model as its configuration says; every rank has one.

    Args:
        config: checked against world here.
        world: the ranks that train together.
        console: None writes to standard output on rank 0.
        runs_on_device: of a comparison, how many train on its device at a time.
    """

    def __init__(
        self, config: RunConfig, world: World, console: Console | None = None, *, runs_on_device: int = 1
    ) -> None:
        assert config.run_dir is not None, "load_config gives every run a folder"
        check_same_command(config, world)
        config.check(world.world_size)
        self.config = config
        self.world = world
        self.run_dir = Path(config.run_dir)
        self.runs_on_device = runs_on_device
        self.console = console or Console(config.steps, enabled=world.main, print_every=config.log.print_every)
        self.progress = Progress()
        self.metrics: Metrics | None = None
        self.evals: list[dict[str, Any]] = []

    def run(self, asked: Callable[[], str | None] | None = None) -> RunResult:
        """Train to the last step, or until a signal, the time limit or `asked`; a finished run is only reported.

        Args:
            asked: who asks to stop after the current step; None while nobody does.

        Raises:
            UserError: the configuration, data, folder or machine does not serve; nothing has been written then.
            DivergedError: too many steps were not finite (check_diverged); result.json says so.
            TrainingError: strict coverage found a GEMM outside FP8, or metrics.jsonl cannot be written.
        """
        started = time.monotonic()
        config, world = self.config, self.world
        self.resume: str = on_main(world, lambda: resume_mode(self.run_dir, config), patient=True)
        on_main(world, lambda: check_folder(self.run_dir, self.resume))
        done = on_main(world, lambda: finished_result(self.run_dir, config) if self.resume == "auto" else None)
        if done is not None:
            self.console.info(
                f"{self.run_dir} is finished: {done.steps} steps. Raise steps to go on, or give another run_dir."
            )
            return done
        with (
            told_when_aborted(self.run_dir, self.console.info),
            told_when_out_of_memory(config, world, lambda: self.progress.step),
            claimed(self.run_dir, world) as self.check_claim,
            deterministic_algorithms(config.deterministic),
            Saver(self.run_dir, world, config.checkpoint.background, self.console.warn) as self.saver,
            StopRequest(
                config.time_limit_seconds, tell=world.main, asked=lambda: self.saver.failed or (asked and asked())
            ) as stop,
        ):
            self._open(self._build())
            try:
                stopped_by = self._train(stop)
                return self._finish(stopped_by, started)
            except DivergedError as error:
                self.coverage.pause()
                result = self._result(None, started, diverged={"step": error.step, "reason": error.reason})
                on_main(world, lambda: write_result(result))
                raise
            finally:
                self.console.close()
                if self.metrics is not None:
                    self.metrics.close()

    def _build(self) -> Checkpoint | None:
        """Data, model, optimizer, what to go on from; the cheapest first: a mistake shows early. Writes nothing."""
        config, world = self.config, self.world
        torch.manual_seed(config.seed)
        dataset = agreed_dataset(config, world)
        size = config.micro_batch(world.world_size)
        self.batcher = Batcher(dataset, config.global_batch_samples, size, world.rank, world.world_size)
        self.eval_set = EvalSet(self.batcher, world) if config.data.holdout_fraction > 0 else None
        self.memory = PeakMemory(world.device)
        check_memory(config, world)
        found = on_main(world, lambda: find_resume(self.run_dir, self.resume, recover=True), patient=True)
        first = found is None  # else weights come from there: they are not drawn, nor read from model.init_from
        self.assembly: Assembly = agreed_assembly(config, world, self.eval_set, first_weights=first)
        self.model = self.assembly.model
        self.replica: nn.Module = spread(self.model, config, world, first_weights=first)
        if first:
            self.progress.init_hash = agreed_hash(self.model, world)
        self.optimizer = build_optimizer(self.model, config.optim, self.assembly.recipe.moments)
        self.watchers: list[Watcher] = build_watchers(config, self.assembly, world, self.run_dir, self.console)
        self.console.info(introduction(config, world, self.assembly.report, self.batcher))
        return found

    def _restore(self, found: Checkpoint) -> None:
        """Put everything back as the checkpoint has it."""
        config, world = self.config, self.world
        for line in found.skipped:
            self.console.warn(line)
        check_same_checkpoint(found, world)
        found.check_recipe(self.assembly.recipe, allow_change=config.checkpoint.allow_recipe_change)
        check_same_run(config, data_facts(self.batcher.dataset, self.eval_set), found)
        cost = self._take_back(found)
        for watcher in self.watchers:
            watcher.load_state(self.progress.watchers.get(watcher.name, {}))
        self.console.info(f"resumed from {found.path} at step {found.step}; {cost}")
        if self.resume == "auto" and config.resume == found.state.config.get("resume") != "auto":
            self.console.info(f"this run has gone on from {config.resume}; delete the checkpoints since to do so again")
        for line in changes_since(config, self.assembly.recipe, found, world.world_size, self.eval_set):
            self.console.info(line)

    def _take_back(self, found: Checkpoint) -> str:
        """Weights, moments, counters and position in the data as saved; says what it cost."""
        found.restore(self.model, self.optimizer, self.world.rank)
        self.progress = saved_progress(found.state)
        streams = found.state.data_position.get("streams", ())  # read again up to there: not as long on every rank
        return on_every_rank(self.world, lambda: self.batcher.skip_to(found.step, streams), patient=True)

    def _roll_back(self, request: RollBack) -> None:
        """Go on from the checkpoint that an alarm goes back to, as if the steps since had not been."""
        self.saver.settle()
        found, newest = on_main(self.world, lambda: return_point(self.run_dir, self.progress.return_step), patient=True)
        self.console.warn(f"step {self.progress.step}: {request.reason}; rolled back to step {found.step}")
        spent = self.progress.train_seconds
        self._take_back(found)
        self.progress.train_seconds = spent  # undone or not, the steps since have taken their time
        for watcher in self.watchers:
            watcher.roll_back(found.step, self.progress.watchers.get(watcher.name, {}))
        self.coverage.go_on(self.progress.coverage)
        self.stream = StreamHash(self.progress.stream_sum if self.world.main else 0)
        self.evals = [row for row in self.evals if row["step"] <= found.step]
        self._open_metrics()
        if not newest:
            self._save()  # or a resume would take a newer one, of the steps that are undone
            self.saver.settle()  # before there are rows of other steps in their place

    def _save(self, *, by_clock: bool = False) -> None:
        """Checkpoint of this step; by_clock: the hour asked for it, or a stop, and no alarm goes back to it."""
        config, recipe, progress = self.config, self.assembly.recipe, self.progress
        progress.return_step = progress.return_step if by_clock else progress.step
        progress.stream_sum = self.stream.total(self.world)
        progress.watchers = {watcher.name: watcher.state() for watcher in self.watchers}
        progress.coverage = self.coverage.counts()
        states = self.world.all_gather_object(random_state())
        state = training_state(config, recipe, progress, data_facts(self.batcher.dataset, self.eval_set), states)

        def keep_rows() -> None:
            self.check_claim()
            if self.metrics is not None:
                self.metrics.sync()

        on_main(self.world, keep_rows, patient=True)
        content = content_of(self.model, self.optimizer)
        self.saver.save(progress.step, content, state, retention(config, recipe, progress))
        self.clock.restart()

    def _open(self, found: Checkpoint | None) -> None:
        """Go on from a checkpoint, if there is one to go on from, and open the run folder for writing."""
        config, world = self.config, self.world
        if found is not None:
            self._restore(found)
        alarm = self.assembly.recipe.alarm is not None
        on_main(world, lambda: check_room(self.run_dir, config, self.progress, checkpoint_bytes(self.optimizer), alarm))
        self.coverage = CoverageLog(self.assembly.report, world.world_size)
        own = found is not None and self.run_dir.resolve() in found.path.resolve().parents  # else of another run
        self.coverage.go_on(self.progress.coverage if own else {})
        self.speed = Speed(config.log.skip_steps)
        self.stream = StreamHash(self.progress.stream_sum if world.main else 0)
        self.profile = ProfileWindow(config.profile.steps, self.run_dir, world, self.console.info)
        facts = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "world_size": world.world_size,
            "runs_on_device": self.runs_on_device,
            "resumed_step": self.progress.step,
            "init_hash": self.progress.init_hash,
            "data_hash": self.batcher.dataset.fingerprint,
            "recipe_hash": self.assembly.recipe.hash,
        }
        self._keep_record(own)
        on_main(world, lambda: write_run_files(self.run_dir, config, self.assembly.recipe, world.device, facts, found))
        self._open_metrics()
        for line in on_main(world, lambda: lost_rows(self.run_dir, found if own else None)):
            self.console.warn(line)
        self.evals = on_main(world, lambda: saved_evals(self.run_dir))

    def _keep_record(self, own: bool) -> None:
        """Keep what an earlier attempt wrote where no step of it is gone on from; own: not from another run's."""
        kept = None if own and self.progress.step else on_main(self.world, lambda: set_aside(self.run_dir))
        if kept is not None:
            begun = "" if own else f"no checkpoint in {self.run_dir}: starts at step {self.progress.step}; "
            self.console.warn(f"{begun}the earlier metrics.jsonl is kept as {kept}")

    def _open_metrics(self) -> None:
        """Open the sinks on rank 0, without the rows after this step; an error is every rank's."""

        def build() -> None:
            if self.metrics is not None:
                self.metrics.close()
            self.metrics = open_metrics(self.run_dir, self.config, self.progress.step, self.console.warn)

        on_main(self.world, build)

    def _write(self, row: dict[str, Any], sync: bool = False) -> None:
        """Give a row to the sinks on rank 0; an error is every rank's, or the others would wait for it."""
        metrics = self.metrics
        on_main(self.world, lambda: None if metrics is None else metrics.write(row, sync))

    def _train(self, stop: StopRequest) -> str | None:
        """Steps until the last, or until some rank is asked to stop; returns why it stopped early."""
        config = self.config
        self.clock = SaveClock(config.checkpoint.minutes)
        begun = self.progress.step
        if self.assembly.recipe.alarm is not None and (begun == 0 or self.resume != "auto"):
            self._save()  # an alarm before the next one goes back here
        # a process may have been killed while it scored the text at this step, whose checkpoint was there
        due = _due(begun, config.eval.every) and self.resume == "auto" if begun else config.eval.first
        if due and begun < config.steps and not (self.evals and self.evals[-1]["step"] == begun):
            self._evaluate()
        while (progress := self.progress).step < config.steps:
            self.profile.before(progress.step + 1)
            try:
                result = self._step(stop.reason is not None)
            except RollBack as request:
                self._roll_back(request)
                continue
            self.profile.after(progress.step)
            if progress.step == config.steps:
                break
            by_steps = _due(progress.step, config.checkpoint.every)
            # not amid steps that are not finite: its weights may be why, and older checkpoints would go for it
            if result.stop or ((by_steps or result.save) and not progress.nonfinite_in_a_row):
                self._save(by_clock=not by_steps)
            if result.stop:
                self.saver.settle()  # whoever asks to stop may not wait for the scores
            if _due(progress.step, config.eval.every):
                self._evaluate()
            if result.stop:
                return next(reason for reason in self.world.all_gather_object(stop.reason) if reason is not None)
        return None

    def _step(self, stop: bool) -> StepResult:
        """One optimizer step, its row in the metrics and its line on the console."""
        config, progress = self.config, self.progress
        lr = learning_rate(config.optim, progress.step, config.steps)
        set_learning_rate(self.optimizer, lr)
        begin = time.perf_counter()
        batches = self.batcher.micro_batches(progress.step)
        self.stream.add(batches)
        data_seconds = time.perf_counter() - begin
        for watcher in self.watchers:
            watcher.before_step(progress.step + 1, batches)
        clip = config.optim.clip_grad_norm
        save = self.clock.due
        result = train_step(self.replica, self.optimizer, batches, self.world, clip=clip, stop=stop, save=save)
        seconds = time.perf_counter() - begin
        progress.step += 1
        progress.train_seconds += seconds
        count_step(progress, result, self.console.warn)
        self.speed.add(config.global_batch_tokens, seconds)
        self._log(result, lr, seconds, data_seconds)
        check_diverged(progress, result, config.optim, fp8=not self.assembly.all_bf16)
        return result

    def _log(self, result: StepResult, lr: float, seconds: float, data_seconds: float) -> None:
        """Row of a finished step; a step that was skipped always has one."""
        config, progress = self.config, self.progress
        row = step_row(config, self.world, progress.step, result, lr, seconds)
        row |= {"process_step": self.speed.process_step, "data_seconds": data_seconds}
        row["memory_bytes"] = self.memory.bytes()
        if not result.updated:
            row |= {"skipped": True, "skipped_steps": progress.skipped_steps}
        request = after_step(self.watchers, progress.step, result, row)
        self.console.step(row, self.speed.eta_seconds(config.steps - progress.step))
        if _due(progress.step, config.log.every) or not result.updated or not row.keys().isdisjoint(NOTED):
            self._write(row)
        if request is not None:
            raise request

    def _evaluate(self) -> None:
        """Score the held-out windows, in the run's own precision and in BF16."""
        if self.eval_set is None:
            return
        begin = time.perf_counter()
        self.coverage.pause()
        scores = evaluate(self.model, self.eval_set, bf16=self.config.eval.bf16, all_bf16=self.assembly.all_bf16)
        share = self.coverage.total()["fp8_flops_share"]
        self.coverage.resume()
        seconds = time.perf_counter() - begin
        row = {"step": self.progress.step, **scores, "fp8_flops_share": share, "eval_seconds": seconds}
        self.evals.append(row)
        self.console.info(f"eval at step {row['step']}: {score_text(row)}")
        self._write(row, sync=True)  # result.json may stand for it before another checkpoint does

    def _finish(self, stopped_by: str | None, started: float) -> RunResult:
        """Last checkpoint and evaluation, result.json, and the line that says how it ended."""
        self.profile.close()
        if stopped_by is None:
            self._save()
            if not (self.evals and self.evals[-1]["step"] == self.progress.step):
                self._evaluate()
        self.saver.settle()
        self.coverage.pause()
        result = self._result(stopped_by, started)
        on_main(self.world, lambda: write_result(result))
        self.console.info(ending(self.config, self.progress, stopped_by, self.saver.saved, result.fp8_flops_share))
        return result

    def _result(self, stopped_by: str | None, started: float, diverged: dict[str, Any] | None = None) -> RunResult:
        config, progress, dataset, world = self.config, self.progress, self.batcher.dataset, self.world
        coverage = self.coverage.total()
        return RunResult(
            run_dir=str(self.run_dir),
            finished=stopped_by is None and diverged is None,
            stopped_by=stopped_by,
            diverged=diverged,
            device=device_name(world.device),
            world_size=world.world_size,
            steps=progress.step,
            tokens_seen=progress.step * config.global_batch_tokens,
            epochs=dataset.epochs(progress.step * config.global_batch_samples),
            skipped_steps=progress.skipped_steps,
            final_train_loss=progress.loss,
            evals=self.evals,
            tokens_per_second=self.speed.tokens_per_second,
            peak_memory_bytes=int(world.all_max(float(self.memory.bytes()))),
            memory_bytes=memory_by_kind(self.assembly, self.optimizer),
            train_seconds=progress.train_seconds,
            save_seconds=self.saver.seconds,
            seconds=time.monotonic() - started,
            fp8_flops_share=coverage["fp8_flops_share"],
            parameters=count_parameters(config.model),
            coverage=coverage,
            model_hash=model_hash(config.model),
            tokenizer_hash=dataset.tokenizer.hash,
            data_hash=dataset.fingerprint,
            eval_hash="none" if self.eval_set is None else self.eval_set.hash,
            init_hash=progress.init_hash,
            stream_hash=f"{self.stream.total(world):016x}",
        )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
