from __future__ import annotations

from fp8train.data import Batcher, build_dataset
from fp8train.distributed import World
from fp8train.trainer.evaluation import EvalSet
from tests.tiny_run import tiny_config


def test_held_out_windows_are_all_that_is_read(tmp_path, monkeypatch):
    """Not a training batch: a stream would begin, and begin again at the first step."""
    config = tiny_config(tmp_path)
    dataset = build_dataset(config.data, config.seq_len, config.seed)
    monkeypatch.setattr(dataset, "sample", lambda index: 1 / 0)
    eval_set = EvalSet(Batcher(dataset, config.global_batch_samples, 4), World())
    assert eval_set.tokens == config.data.eval_windows * config.seq_len


class LongerWorld(World):
    """Another rank has five micro-batches more."""

    def all_max(self, value):
        return value + 5


def test_a_rank_with_fewer_windows_has_some_that_do_not_count(tmp_path):
    config = tiny_config(tmp_path)
    dataset = build_dataset(config.data, config.seq_len, config.seed)
    eval_set = EvalSet(Batcher(dataset, config.global_batch_samples, 4), LongerWorld())
    assert len(eval_set._idle) == 5 and eval_set._idle[0].tokens.shape == (1, config.seq_len)
    assert eval_set.tokens == config.data.eval_windows * config.seq_len
