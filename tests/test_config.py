from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from fp8train.arguments import OTHER_NAMES, _dotted_keys, _field_names, describe, parse_arguments
from fp8train.bench import Turn
from fp8train.benchmarks.timing import BenchArguments
from fp8train.calibration_setup import CalibrationArguments
from fp8train.config import RunConfig, config_from_dict, config_to_dict, load_config
from fp8train.errors import ConfigError, UserError
from fp8train.eval import EvalArguments
from fp8train.explain import ExplainArguments
from fp8train.export import ExportArguments
from fp8train.generate import GenerateArguments
from fp8train.optim import OptimConfig
from fp8train.prepare import PrepareConfig
from fp8train.recipe import load_recipe
from fp8train.replay import ReplayArguments


@dataclass(kw_only=True, slots=True)
class Inner:
    """Inner.

    rate: how fast
    """

    rate: float = 0.5


@dataclass(kw_only=True, slots=True)
class Arguments:
    """Arguments of a command.

    folder: where it is
    """

    folder: str
    count: int = 4
    names: list[str] = field(default_factory=list)
    note: str | None = None
    place: Path | None = None
    inner: Inner = field(default_factory=Inner)


class TestParseArguments:
    def test_values_get_the_type_of_their_field(self):
        given = parse_arguments(["folder=3", "count=7", "names=[a,b]", "note=x: y", "inner.rate=1e-3"], Arguments)
        assert given == Arguments(folder="3", count=7, names=["a", "b"], note="x: y", inner=Inner(rate=1e-3))

    def test_text_keeps_its_equals_signs_and_commas(self):
        assert parse_arguments(["folder=/a=b,c d"], Arguments).folder == "/a=b,c d"

    def test_number_is_decimal_whatever_zeros_it_begins_with(self):  # as in a sweep over seed=$(printf %03d $n)
        assert [parse_arguments(["folder=x", f"count={text}"], Arguments).count for text in ("008", "010")] == [8, 10]

    def test_tilde_that_begins_a_path_is_the_home_folder(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("HOME", "/home/me")
        for text, path in (("~/a b", "/home/me/a b"), ("~nobody9/a", "~nobody9/a"), ("'~/a'", "~/a"), ("010", "010")):
            given = parse_arguments(["folder=~/a", f"place={text}"], Arguments)
            assert (given.folder, given.place) == ("~/a", Path(path))

    @pytest.mark.parametrize(
        ("kind", "keys"),
        [
            (EvalArguments, ["checkpoint", "out"]), (ExportArguments, ["checkpoint", "out"]),
            (GenerateArguments, ["checkpoint"]), (ReplayArguments, ["path", "out"]),
            (CalibrationArguments, ["checkpoint", "out"]), (BenchArguments, ["out"]), (Turn, ["lock"]),
            (ExplainArguments, ["hf"]), (PrepareConfig, ["out"]),
        ],
    )  # fmt: skip
    def test_commands_take_paths_as_paths(self, kind: type, keys: list[str]):
        given = parse_arguments([f"{key}=~/a" for key in keys], kind)
        assert [getattr(given, key) for key in keys] == [Path.home() / "a"] * len(keys)

    def test_null_is_none(self):
        assert parse_arguments(["folder=x", "note=null"], Arguments).note is None

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            pytest.param(["fodler=x"], "unknown key 'fodler'; nearest: folder", id="typo"),
            pytest.param(["folder=x", "inner.rat=1"], "unknown key 'inner.rat'; nearest: inner.rate", id="typo below"),
            pytest.param(
                ["folder=x", "rate=1"], "unknown key 'rate'; nearest: inner.rate", id="right name, wrong level"
            ),
            pytest.param(["folder=x", "count=many"], "count: .*'many'.*; needs int", id="wrong type"),
            pytest.param(["folder=x", "count=1.5"], "count: .*needs int", id="fraction for an integer"),
            pytest.param(["folder=x", "count=1:30"], "count: got '1:30'; needs int", id="sexagesimal"),
            pytest.param(["count=1"], "folder is not given.*folder=VALUE", id="required"),
            pytest.param(["folder"], "got 'folder'; needs key=value", id="no equals sign"),
            pytest.param(["folder=x", "place="], "place is empty; needs a path. Give place=PATH", id="empty path"),
        ],
    )
    def test_mistake_is_one_line_that_names_the_remedy(self, argv: list[str], message: str):
        with pytest.raises(ConfigError, match=message) as caught:
            parse_arguments(argv, Arguments)
        assert "\n" not in str(caught.value)

    def test_help_lists_every_key_with_its_meaning(self, capsys: pytest.CaptureFixture[str]):
        with pytest.raises(SystemExit) as caught:
            parse_arguments(["--help"], Arguments)
        assert caught.value.code == 0
        text = capsys.readouterr().out
        assert text == describe(Arguments)
        assert "folder=<required>" in text and "where it is" in text and "inner.rate=0.5" in text and "how fast" in text


class TestLoadConfig:
    def test_default_is_the_quickstart(self):
        assert load_config(["run_dir=x"]) == load_config(["experiment=quickstart", "run_dir=x"])

    def test_a_model_brings_its_own_experiment_or_none(self):
        assert load_config(["model=llama_125m"]) == load_config(["experiment=llama_125m"])
        assert load_config(["model=llama_125m", "data=text"]).data.kind == "text"
        bare = load_config(["model=qwen25_7b"])  # of another size there is one, but not of this
        assert (bare.seq_len, bare.steps, bare.optim.lr) == (256, 300, OptimConfig().lr)
        assert load_config(["model=llama_125m", "experiment=quickstart"]).seq_len == load_config([]).seq_len

    @pytest.mark.parametrize(
        ("arguments", "lr"), [([], "1.5e-3"), (["model=llama3_8b"], "3.0e-4"), (["experiment=llama_125m"], "6.0e-4")]
    )
    def test_help_has_the_values_of_what_is_chosen(self, arguments: list[str], lr: str, capsys):
        with pytest.raises(SystemExit):
            load_config([*arguments, "--help"])
        text = capsys.readouterr().out
        config = load_config(arguments)
        assert config.optim.lr == float(lr) and f"  optim.lr={config.optim.lr} " in text
        assert f"  seq_len={config.seq_len} " in text and f"  model.name={config.model.name} " in text

    def test_arguments_beat_experiment_beats_group(self):
        config = load_config(["experiment=quickstart", "optim.lr=0.5", "model.num_layers=2"])
        assert (config.optim.lr, config.model.num_layers, config.steps) == (0.5, 2, 300)
        assert load_config(["optim.betas=[0.8,0.9]"]).optim.betas == (0.8, 0.9)
        assert load_config(["profile.steps=[010,020]"]).profile.steps == [10, 20]  # YAML 1.1 has 8 and 16
        assert load_config(["data=text", "data.path=[010,on]"]).data.path == ["010", "on"]
        assert load_config(["experiment=null"]).optim.lr != load_config([]).optim.lr

    def test_run_dir_is_a_function_of_the_configuration(self):
        assert load_config(["seed=7", "recipe=bf16"]).run_dir == "runs/quickstart-bf16-seed7"
        assert load_config([], "compare").run_dir == "runs/compare-quickstart-blockwise"

    def test_tilde_is_the_home_folder(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("HOME", "/home/me")
        config = load_config(["run_dir=~/a b", "resume=~/runs/a", "data=text", "data.path=[~/b,~nobody9/c]"])
        assert (config.run_dir, config.resume) == ("/home/me/a b", "/home/me/runs/a")
        assert config.data.paths == ["/home/me/b", "~nobody9/c"]
        with pytest.raises(ConfigError, match="^recipe '/home/me/r.yaml' does not exist"):
            load_recipe("~/r.yaml")
        with pytest.raises(UserError, match="^/home/me/llama"):
            load_config(["model=hf", "model.init_from=~/llama"])

    def test_what_others_call_a_key_leads_to_one_that_is_there(self):
        assert set(OTHER_NAMES) <= set(_dotted_keys(RunConfig))
        assert not {name for theirs in OTHER_NAMES.values() for name in theirs.split()} & set(_field_names(RunConfig))

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            pytest.param(["stepz=3"], "unknown key 'stepz'; nearest: steps", id="key"),
            pytest.param(["optim.warmup_step=3"], "nearest: optim.warmup_steps", id="key of a section"),
            pytest.param(["lr=3"], "unknown key 'lr'; nearest: optim.lr", id="key at the wrong level"),
            pytest.param(["seeds=3"], "unknown key 'seeds'; nearest: compare.seeds", id="one much like another"),
            pytest.param(["optim.learning_rate=3"], "'optim.learning_rate'; nearest: optim.lr. Correct", id="theirs"),
            pytest.param(
                ["batch_size=8"], "nearest: global_batch_tokens, micro_batch_samples. Correct", id="two of theirs"
            ),
            pytest.param(["eval_every=3"], "unknown key 'eval_every'; nearest: eval.every", id="no dot"),
            pytest.param(["modle=quickstart"], "nearest: model", id="group"),
            pytest.param(
                ["data=mix", "data.mix=[{kind: stdlib}, {kind: text, pth: x}]"],
                "data.mix\\[1\\]: unknown key 'pth'; nearest: path",
                id="key of an entry of a list",
            ),
            pytest.param(
                ["data=mix", "data.mix=[{kind: stdlib, weight: heavy}]"],
                "data.mix\\[0\\]: weight: got 'heavy'; needs float",
                id="type in an entry of a list",
            ),
            pytest.param(
                ["model=quikstart"], "no file 'quikstart' in configs/model/; nearest: quickstart", id="choice"
            ),
            pytest.param(["experiment=zzz"], "experiment: no file 'zzz'.*choices: .*llama3_8b", id="experiment"),
            pytest.param(["optim.betas=[0.9,x]"], "optim.betas\\[1\\]: got 'x'; needs float", id="type in a list"),
            pytest.param(["profile.steps=[1,x]"], "profile.steps\\[1\\]: got 'x'; needs int", id="in a list or null"),
            pytest.param(
                ["run_dir=${oc.env:FP8TRAIN_UNSET}"], "run_dir: got .*'FP8TRAIN_UNSET' not found", id="no such variable"
            ),
            pytest.param(["run_dir=lr-${optim.rate}"], "run_dir: got .*'optim.rate' not found", id="no such reference"),
            pytest.param(["steps=many"], "steps: .*'many'.*needs int", id="type"),
            pytest.param(["model.hidden_size=wide"], "model.hidden_size: .*needs int", id="type in a section"),
            pytest.param(["steps=0"], "steps: got 0; needs at least 1", id="range"),
            pytest.param(["run"], "got 'run'; needs key=value", id="no equals sign"),
            pytest.param(["--resolve"], "got '--resolve'; needs key=value", id="unknown option"),
            pytest.param(["--multirun"], "got '--multirun'; needs the keys of one run.*for lr in", id="sweep"),
            pytest.param(["hydra/launcher=joblib"], "got 'hydra/launcher=joblib'; needs the keys of", id="launcher"),
            pytest.param(["--config-dir=/nonexistent"], "--config-dir got '/nonexistent'", id="no such folder"),
            pytest.param(["--config-dir="], "--config-dir got ''; needs an existing folder", id="empty folder name"),
            pytest.param(["parallel.shard_ranks=8"], "got 8 with parallel=ddp, .* needs parallel=fsdp", id="shard ddp"),
            pytest.param(
                ["parallel=fsdp", "parallel.shard_ranks=1"], "got 1; needs at least 2.*parallel=ddp", id="shard over 1"
            ),
            pytest.param(["log.wandb=onlin"], "log.wandb: got 'onlin'; nearest: online", id="one of"),
            pytest.param(["profile.steps=[3,1]"], "profile.steps: got \\[3, 1\\]", id="profile window"),
        ],
    )
    def test_mistake_is_one_line_that_names_the_nearest(self, overrides: list[str], message: str):
        with pytest.raises(ConfigError, match=message) as caught:
            load_config(overrides)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            pytest.param(["global_batch_tokens=1000"], "multiple of seq_len x ranks = 96 x 1.*=960", id="batch"),
            pytest.param(["micro_batch_samples=3"], "divisor of the 8 sequences.*1, 2, 4, 8", id="micro-batch"),
            pytest.param(["seq_len=512"], "seq_len: got 512, the model takes at most 256", id="seq_len"),
            pytest.param(["optim.warmup_steps=300"], "got 300; needs fewer than steps=300", id="warmup"),
            pytest.param(
                ["optim=adamw_wsd", "optim.warmup_steps=200", "optim.decay_steps=200"], "both to fit", id="decay"
            ),
        ],
    )
    def test_values_that_contradict_each_other_are_refused(self, overrides: list[str], message: str):
        with pytest.raises(ConfigError, match=message):
            load_config(overrides)

    def test_batch_must_divide_over_the_ranks(self):
        config = load_config(["seq_len=256", "global_batch_tokens=768"])
        config.check(world_size=3)
        with pytest.raises(ConfigError, match="256 x 2 = 512. Nearest: global_batch_tokens=1024"):
            config.check(world_size=2)

    def test_ranks_must_divide_into_groups(self):
        config = load_config(["parallel=fsdp", "parallel.shard_ranks=4", "global_batch_tokens=98304"])
        for world_size in (4, 8):
            config.check(world_size)
        for world_size, remedy in ((6, "2 or 3 or 6 or null"), (1, "null")):
            with pytest.raises(ConfigError, match=f"got 4; needs a divisor .* ranks, {world_size}, .*={remedy}, or"):
                config.check(world_size)

    @pytest.mark.parametrize("experiment", ["quickstart", "llama_125m", "llama3_1b", "llama3_8b", "qwen25_1_5b"])
    def test_shipped_experiment_is_consistent_on_one_and_eight_ranks(self, experiment: str):
        config = load_config([f"experiment={experiment}"])
        for world_size in (1, 8):
            config.check(world_size)
            assert config.global_batch_samples % (config.micro_batch(world_size) * world_size) == 0

    def test_micro_batch_is_the_largest_divisor_within_the_limit(self):
        config = load_config(["seq_len=256", "global_batch_tokens=51200"])  # 200 sequences; 64 of 256 tokens fit 16384
        assert config.micro_batch(1) == 50
        assert config.micro_batch(2) == 50
        assert load_config(["seq_len=128", "global_batch_tokens=51200", "micro_batch_samples=4"]).micro_batch(1) == 4

    def test_resolved_configuration_survives_yaml(self):
        config = load_config(
            ["experiment=quickstart", "data=text", "data.path=[a,b]", "profile.steps=[3,5]", "log.wandb=off"]
        )
        assert config_from_dict(yaml.safe_load(yaml.safe_dump(config_to_dict(config)))) == config

    def test_saved_configuration_with_an_unknown_key_is_refused(self):
        values = config_to_dict(load_config([]))
        values["optim"]["momentum"] = 0.9
        with pytest.raises(ConfigError, match="config.yaml: unknown key 'optim.momentum'"):
            config_from_dict(values)

    def test_cfg_job_prints_what_would_run(self, capsys: pytest.CaptureFixture[str]):
        with pytest.raises(SystemExit) as caught:
            load_config(["seed=5", "--cfg", "job"])
        assert caught.value.code == 0
        assert config_from_dict(yaml.safe_load(capsys.readouterr().out)) == load_config(["seed=5"])

    def test_help_names_groups_choices_and_keys(self, capsys: pytest.CaptureFixture[str]):
        with pytest.raises(SystemExit):
            load_config(["--help"])
        text = capsys.readouterr().out
        assert "llama3_8b" in text and "checkpoint.keep_last=2" in text and "newest checkpoints" in text

    def test_folder_of_the_users_own_adds_choices(self, tmp_path):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", **SHAPE}))
        assert load_config([f"--config-dir={tmp_path}", "model=mine"]).model.name == "mine"

    @pytest.mark.parametrize(
        ("group", "text", "message"),
        [
            pytest.param("experiment", "steps: 7", "Begin it with the line `# @package _global_`", id="package"),
            pytest.param("optim", "lr: [1", 'configs: .*optim/mine.yaml", line 1', id="no YAML"),
        ],
    )
    def test_file_of_the_users_own_that_does_not_serve_is_refused_with_the_remedy(self, tmp_path, group, text, message):
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config([f"--config-dir={tmp_path}", f"{group}=mine"])


SHAPE = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "max_seq_len": 256,
}
