"""Settings: upstream's flags, precedence, errors that name the fix, and what is loaded from where."""

import json
import re
from pathlib import Path

import pytest
import yaml

from echo4o.config import (
    ConfigError,
    RunConfig,
    flag_help,
    load_config,
    plan_loading,
    save_resolved,
    split_names,
    split_rates,
    validate,
)
from echo4o.config.arguments import OWN_FLAGS, fields_by_group

ROOT = Path(__file__).resolve().parents[1]

# Upstream's flags, types and defaults, as its argument dataclasses state them.
UPSTREAM = """
model_path str hf/BAGEL-7B-MoT
llm_path str hf/Qwen2.5-0.5B-Instruct/
llm_qk_norm bool True
tie_word_embeddings bool False
layer_module str Qwen2MoTDecoderLayer
vae_path str flux/vae/ae.safetensors
vit_path str hf/siglip-so400m-14-980-flash-attn2-navit/
max_latent_size int 32
latent_patch_size int 2
vit_patch_size int 14
vit_max_num_patch_per_side int 70
connector_act str gelu_pytorch_tanh
interpolate_pos bool False
vit_select_layer int -2
vit_rope bool False
text_cond_dropout_prob float 0.1
vae_cond_dropout_prob float 0.3
vit_cond_dropout_prob float 0.3
dataset_config_file str data/configs/example.yaml
prefetch_factor int 2
num_workers int 4
max_num_tokens_per_sample int 16384
max_num_tokens int 36864
prefer_buffer_before int 16384
max_buffer_size int 50
data_seed int 42
visual_gen bool True
visual_und bool True
results_dir str results
checkpoint_dir str results/checkpoints
wandb_project str bagel
wandb_name str run
wandb_runid str 0
wandb_resume str allow
wandb_offline bool False
global_seed int 4396
auto_resume bool False
resume_from str None
resume_model_only bool False
finetune_from_ema bool False
finetune_from_hf bool False
log_every int 10
save_every int 2000
total_steps int 500000
warmup_steps int 2000
lr_scheduler str constant
lr float 0.0001
min_lr float 1e-07
beta1 float 0.9
beta2 float 0.95
eps float 1e-15
ema float 0.9999
max_grad_norm float 1.0
timestep_shift float 1.0
mse_weight float 1.0
ce_weight float 1.0
ce_loss_reweighting bool False
expected_num_tokens int 32768
num_replicate int 1
num_shard int 8
sharding_strategy str HYBRID_SHARD
backward_prefetch str BACKWARD_PRE
cpu_offload bool False
freeze_llm bool False
freeze_vit bool False
freeze_vae bool True
freeze_und bool False
copy_init_moe bool True
use_flex bool False
gradient_accumulation_steps int 1
peak_device_tflops float 0.0
"""
FLAGS = [line.split() for line in UPSTREAM.strip().splitlines()]

# Not the default, in the flag's type.
OTHER = {"bool": ("False", "True"), "int": ("7", "8"), "float": ("0.25", "0.5"), "str": ("some/where", "else")}


def stated(values: dict, folder: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def values_of(config: RunConfig) -> dict:
    return dict(config.items())


def valid(tmp_path: Path, **values) -> RunConfig:
    data = tmp_path / "data.yaml"
    data.write_text("multi_ref: {}\n")
    return load_config([], {"dataset_config_file": str(data), **values})


def test_upstream_has_71_flags_and_all_are_here_with_type_and_default():
    assert len(FLAGS) == 71
    defaults = values_of(RunConfig())
    assert set(defaults) == {name for name, *_ in FLAGS} | OWN_FLAGS
    for name, kind, default in FLAGS:
        value = defaults[name]
        assert str(value) == default, name
        assert value is None or type(value).__name__ == kind, name


@pytest.mark.parametrize("dashes", [False, True])
def test_every_upstream_flag_is_accepted(dashes):
    argv, expected = [], {}
    for name, kind, default in FLAGS:
        text = next(value for value in OTHER[kind] if value != default)
        argv += [f"--{name.replace('_', '-') if dashes else name}", text]
        expected[name] = {"bool": lambda t: t == "True", "int": int, "float": float, "str": str}[kind](text)
    config = load_config(argv)
    assert {name: value for name, value in values_of(config).items() if name in expected} == expected
    assert set(config.given) == set(expected)


def test_upstream_fine_tuning_command():
    command = (
        "--dataset_config_file ./data/configs/example.yaml --model_path hf/B --layer_module Qwen2MoTDecoderLayer "
        "--max_latent_size 64 --resume-from hf/B --finetune_from_hf True --auto_resume True --resume-model-only True "
        "--finetune-from-ema True --log_every 1 --lr 2e-5 --num_worker 1 --expected_num_tokens 10240 "
        "--max_num_tokens 11520 --max_num_tokens_per_sample 10240"
    )
    config = load_config(command.split())
    assert config.data.num_workers == 1
    assert config.training.lr == 2e-5
    assert config.training.resume_model_only is True
    assert config.given_architecture() == {"layer_module": "Qwen2MoTDecoderLayer", "max_latent_size": 64}


def test_defaults_yaml_flags(tmp_path):
    path = stated({"lr": 3e-5, "model": {"max_latent_size": 64}, "training": {"warmup_steps": 5}}, tmp_path)
    config = load_config([str(path), "--warmup_steps", "9", "--no-visual-und", "--auto_resume"])
    assert config.training.lr == 3e-5
    assert config.model.max_latent_size == 64
    assert config.training.warmup_steps == 9
    assert config.training.visual_und is False
    assert config.training.auto_resume is True
    assert config.training.beta2 == 0.95
    assert config.given == {
        "lr": str(path),
        "max_latent_size": str(path),
        "warmup_steps": "command line",
        "visual_und": "command line",
        "auto_resume": "command line",
    }
    assert load_config(path, {"lr": 1}).training.lr == 1.0


def test_yaml_scientific_notation_without_a_dot(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lr: 2e-5\ntotal_steps: 1e3\nresume_from: null\n")
    config = load_config(path)
    assert (config.training.lr, config.training.total_steps, config.training.resume_from) == (2e-5, 1000, None)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lrr", "1"], "Did you mean lr"),
        (["--max_latentsize", "1"], "Did you mean max_latent_size"),
        (["--resume", "x"], "ambiguous: resume_from, resume_model_only"),
        (["--lr", "fast"], "lr must be a finite number, not 'fast' (command line)"),
        (["--num_workers", "1.5"], "num_workers must be a whole number"),
        (["--visual_und", "maybe"], "visual_und must be True or False"),
        (["--lr", "inf"], "lr must be a finite number, not 'inf'"),
        (["--ce_weight", "nan"], "ce_weight must be a finite number"),
        (["--timestep_shift", "1e999"], "timestep_shift must be a finite number"),
        (["--lr"], "expected one argument"),
        (["--lr", "1", "2"], "'2'"),
        (["no_such.yaml"], "cannot read the config no_such.yaml"),
        (["a.yaml", "b.yaml"], "one YAML file"),
    ],
)
def test_wrong_command_lines(argv, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_latent_sise: 64", "Did you mean max_latent_size"),
        ("training: {lr: 1, lrs: 2}", "unknown setting 'lrs'"),
        ("lr: 1\ntraining: {lr: 2}", "sets lr twice"),
        ("- lr", "must hold `name: value` lines"),
        ("lr: [", "not valid YAML"),
        ("lr: [1]", "lr must be a finite number"),
        ("lr: .inf", "lr must be a finite number"),
        ("visual_und: 0.0", "visual_und must be True or False"),
        ("num_workers: true", "num_workers must be a whole number"),
        ("results_dir: {a: 1}", "results_dir must be text"),
        ("lr: null", "lr must be a finite number, not None"),
        ("lora: {rnk: 4}", "unknown setting 'rnk' of lora"),
        ("lora: {rnk: 4}", "Did you mean rank?"),
        ("lora: {rank: 4}\nlora_rank: 4", "sets lora_rank twice"),
        ("train_only: [1]", "train_only must list names or patterns, not 1"),
        ("train_only: ['a{1,2}']", "a comma separates entries"),
        ("lora_targets: {gen: 1}", "lora_targets must be text"),
    ],
)
def test_wrong_yaml(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        load_config(path)
    assert str(path) in str(error.value)


def test_saved_settings_repeat_the_run(tmp_path):
    config = load_config(["--lr", "2.5e-5", "--max_latent_size", "64", "--wandb_runid", "007", "--eps", "1e-15"])
    save_resolved(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    assert values_of(again) == values_of(config)
    # What the model folder decides is not frozen into the file.
    assert again.given_architecture() == {"max_latent_size": 64}


@pytest.mark.parametrize("nested", [False, True])
def test_lora_block_lists_and_mappings_become_flags(tmp_path, nested):
    settings = {
        "lora": {"rank": 16, "alpha": 32, "dropout": 0.05, "targets": ["gen", "connector"]},
        "train_only": ["heads", r"layers\.1\."],
        "lr_groups": {"lora_B": "1e-4", "vit": 2e-5},
    }
    path = stated({"training": settings} if nested else settings, tmp_path)
    training = load_config(path).training
    assert (training.lora_rank, training.lora_alpha, training.lora_dropout) == (16, 32.0, 0.05)
    assert training.lora_targets == "gen,connector"
    assert training.train_only == r"heads,layers\.1\."
    assert training.lr_groups == "lora_B=1e-4,vit=2e-05"
    assert split_rates(training.lr_groups) == {"lora_B": 1e-4, "vit": 2e-5}
    assert split_names(training.train_only) == ("heads", r"layers\.1\.")
    flags = load_config(["--lora_targets", "gen, connector", "--train_only", r"heads, layers\.1\."]).training
    assert (flags.lora_targets, flags.train_only) == (training.lora_targets, training.train_only)
    save_resolved(load_config(path), tmp_path / "config.yaml")
    assert values_of(load_config(tmp_path / "config.yaml")) == values_of(load_config(path))


def test_default_limits_follow_a_smaller_pack_and_stated_ones_are_checked(tmp_path):
    config = valid(tmp_path, max_num_tokens=2048)
    assert (config.training.expected_num_tokens, config.data.max_num_tokens_per_sample) == (2048, 2048)
    with pytest.raises(ConfigError, match="Lower expected_num_tokens or raise max_num_tokens"):
        validate(valid(tmp_path, max_num_tokens=2048, expected_num_tokens=4096))
    with pytest.raises(ConfigError, match="Lower max_num_tokens_per_sample"):
        validate(valid(tmp_path, max_num_tokens=2048, max_num_tokens_per_sample=4096))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vae_cond_dropout_prob": 1.5}, "vae_cond_dropout_prob is 1.5 (command line); it must lie between 0 and 1"),
        ({"attention_kernel": "fast"}, "choose one of auto, sdpa, flex, flash"),
        ({"sharding_strategy": "SHARD"}, "FULL_SHARD"),
        ({"layer_module": "Llama"}, "Qwen2MoTDecoderLayer"),
        ({"lr_scheduler": "linear"}, "constant, cosine"),
        ({"ema": 1.0}, "less than 1"),
        ({"lr": 0}, "greater than 0"),
        ({"num_workers": -1}, "must not be negative"),
        ({"device": "gpu"}, "auto, cpu, cuda or cuda:N"),
        ({"visual_gen": False, "visual_und": False}, "nothing is left to train"),
        ({"freeze_und": True, "layer_module": "Qwen2DecoderLayer"}, "separate experts"),
        ({"dataset_config_file": "nowhere.yaml"}, "nowhere.yaml (command line), which is not a file"),
        ({"lr_scheduler": "cosine", "lr": 1e-8}, "Lower min_lr"),
        ({"lr_groups": "vit"}, "lr_groups has the entry 'vit'; expected pattern=lr"),
        ({"lr_groups": "vit=0"}, "expected pattern=lr with lr greater than 0"),
        ({"lr_groups": "(=1e-4"}, "lr_groups has the pattern '(', which is not a regular expression"),
        ({"train_only": "q[", "lora_targets": "*"}, "train_only has the pattern 'q['"),
        ({"optimizer": "adamw_8bit", "engine": "deepspeed"}, "Use optimizer adamw, or engine fsdp"),
        ({"optimizer": "adamw_8bit", "cpu_offload": True}, "Use optimizer adamw, or cpu_offload False"),
        ({"optimizer": "adamw_8bit", "device": "cpu"}, "needs a GPU"),
        ({"engine": "deepspeed", "deepspeed_config": "no.json"}, "deepspeed_config is no.json, which is not a file"),
        ({"lora_rank": 8, "freeze_und": True, "lora_targets": "gen,vit"}, "lora_targets has vit (command line)"),
        ({"lora_rank": 8, "lora_targets": ""}, "lora_targets names nothing"),
    ],
)
def test_values_that_cannot_work(tmp_path, values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(valid(tmp_path, **values))


def test_everything_wrong_is_reported_at_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        validate(valid(tmp_path, lr=-1, dtype="half", log_every=0))
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({"use_flex": True}, "use_flex: no effect"),
        ({"num_shard": 4, "cpu_offload": True, "device": "cpu"}, "num_shard, cpu_offload: no effect"),
        ({"sharding_strategy": "FULL_SHARD", "num_shard": 4, "cpu_offload": True}, "num_shard: no effect"),
        ({"reduce_dtype": "bfloat16"}, "reduce_dtype: no effect, one process trains"),
        ({"zero_stage": 2}, "zero_stage: no effect without --engine deepspeed"),
        ({"engine": "deepspeed", "num_shard": 4}, "num_shard: no effect with engine deepspeed"),
        ({"lora_dropout": 0.1, "lora_targets": "gen"}, "lora_dropout, lora_targets: no effect without --lora_rank"),
        ({"lora_rank": 8, "freeze_vit": True}, "freeze_vit: no effect with lora_rank"),
        ({"ema_offload": True, "cpu_offload": True}, "ema_offload: no effect"),
        ({"keep_every": 100}, "keep_every: no effect with keep_last_n 0"),
        ({"freeze_vae": False}, "freeze_vae False: no effect"),
        ({"wandb_name": "x"}, "no effect without --wandb True"),
        ({"freeze_vit": True, "visual_und": False}, "freeze_vit: no effect with visual_und False"),
        ({"min_lr": 1e-6}, "min_lr: no effect with lr_scheduler constant"),
        ({"total_steps": 100}, "warmup_steps 2000 is not less than total_steps 100"),
        ({"total_steps": 5000}, "ema 0.9999 averages over about 10,000 steps"),
    ],
)
def test_settings_without_effect_say_so(tmp_path, values, note):
    assert any(note in line for line in validate(valid(tmp_path, **values)))


def test_sharding_settings_count_where_there_are_several_processes(tmp_path):
    config = valid(tmp_path, num_shard=4, sharding_strategy="FULL_SHARD", cpu_offload=True, reduce_dtype="bfloat16")
    assert validate(config, world_size=4) == []
    assert any("num_shard" in note for note in validate(config))


def test_defaults_need_no_note(tmp_path):
    assert validate(valid(tmp_path)) == []


# ------------------------------------------------------------ what is loaded


@pytest.fixture
def folders(tmp_path):
    for name in ("bagel", "checkpoint", "newest", "complete"):
        (tmp_path / name).mkdir()
    for name in ("bagel", "complete"):
        (tmp_path / name / "llm_config.json").write_text(json.dumps({}))
    return {path.name: str(path) for path in tmp_path.iterdir()}


PARTS = ("hf/Qwen2.5-0.5B-Instruct/", "hf/siglip-so400m-14-980-flash-attn2-navit/", "flux/vae/ae.safetensors")


@pytest.mark.parametrize(
    ("flags", "newest", "expected"),
    [
        # upstream: assembled from parts
        ("", None, (None, None, None, None, PARTS)),
        # upstream's documented fine-tuning, before and after the first checkpoint
        (
            "--model_path {bagel} --resume_from {bagel} --finetune_from_hf True --auto_resume True "
            "--resume_model_only True --finetune_from_ema True",
            None,
            ("{bagel}", "ema", None, "{bagel}", None),
        ),
        (
            "--model_path {bagel} --resume_from {bagel} --finetune_from_hf True --auto_resume True "
            "--resume_model_only True --finetune_from_ema True",
            "{newest}",
            (None, None, "{newest}", "{newest}", None),
        ),
        # an upstream checkpoint holds weights only: configs come from the base model or from the parts
        (
            "--model_path {bagel} --finetune_from_hf True --resume_from {checkpoint} --resume_model_only True",
            None,
            ("{checkpoint}", "model", None, "{bagel}", None),
        ),
        ("--resume_from {checkpoint} --resume_model_only True", None, ("{checkpoint}", "model", None, None, PARTS)),
        ("--resume_from {complete} --resume_model_only True", None, ("{complete}", "model", None, "{complete}", None)),
        # exact resume; auto_resume off ignores the newest
        ("--resume_from {checkpoint}", "{newest}", (None, None, "{checkpoint}", "{checkpoint}", None)),
        # upstream would train random weights
        ("--model_path {bagel} --finetune_from_hf True", None, ("{bagel}", None, None, "{bagel}", None)),
        # our verbs
        ("--init_from {bagel}", None, ("{bagel}", None, None, "{bagel}", None)),
        ("--init_from {bagel} --init_weights model", None, ("{bagel}", "model", None, "{bagel}", None)),
        ("--init_from {bagel} --init_weights random", None, (None, None, None, "{bagel}", None)),
        ("--init_from {bagel} --auto_resume True", "{newest}", (None, None, "{newest}", "{newest}", None)),
    ],
)
def test_loading_flags_become_two_verbs(folders, flags, newest, expected):
    plan = plan_loading(load_config(flags.format(**folders).split()), newest and newest.format(**folders))
    expected = tuple(item.format(**folders) if isinstance(item, str) else item for item in expected)
    assert (plan.init_from, plan.init_weights, plan.resume_from, plan.configs_from, plan.from_parts) == expected
    source = plan.init_from or plan.resume_from or plan.configs_from or PARTS[0]
    assert source in plan.describe().splitlines()[0]


def test_contradictory_or_missing_starts_are_refused(folders):
    with pytest.raises(ConfigError, match="both init_from"):
        plan_loading(load_config(["--init_from", folders["bagel"], "--resume_from", folders["checkpoint"]]))
    with pytest.raises(ConfigError, match=r"init_from is no/where \(command line\), which is not a folder"):
        plan_loading(load_config(["--init_from", "no/where"]))


@pytest.mark.parametrize("flags", ["--init_weights random --init_from {bagel}", ""])
def test_lora_needs_weights_in_a_folder(folders, flags):
    with pytest.raises(ConfigError, match="Name a BAGEL folder with --init_from"):
        plan_loading(load_config([*flags.format(**folders).split(), "--lora_rank", "4"]))


@pytest.mark.parametrize(
    ("in_yaml", "flag"), [("init_from", "resume_from"), ("resume_from", "init_from")], ids=["resume", "init"]
)
def test_a_start_on_the_command_line_gives_way_to_none_of_the_yaml(folders, tmp_path, in_yaml, flag):
    path = stated({in_yaml: folders["bagel"]}, tmp_path)
    config = load_config([str(path), f"--{flag}", folders["complete"]])
    plan = plan_loading(config)
    assert {"init_from": plan.init_from, "resume_from": plan.resume_from} == {flag: folders["complete"], in_yaml: None}
    assert f"{in_yaml} of {path} gives way to the command line's {flag}" in plan.describe()
    # The saved settings start the same run.
    save_resolved(config, tmp_path / "config.yaml")
    assert getattr(plan_loading(load_config(tmp_path / "config.yaml")), flag) == folders["complete"]


def test_two_starts_in_one_place_are_refused_and_the_message_says_how_to_clear_one(folders, tmp_path):
    path = stated({"init_from": folders["bagel"], "resume_from": folders["complete"]}, tmp_path)
    with pytest.raises(ConfigError, match="--resume_from none or --init_from none"):
        plan_loading(load_config(path))
    assert plan_loading(load_config([str(path), "--init_from", "none"])).resume_from == folders["complete"]


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        ("--finetune_from_ema True", "finetune_from_ema does nothing"),
        ("--model_path {bagel}", "model_path does nothing"),
        ("--resume_model_only True", "resume_model_only does nothing"),
        ("--init_from {bagel} --finetune_from_ema True", "finetune_from_ema does nothing beside init_from"),
        ("--init_from {bagel} --resume_model_only True", "resume_model_only does nothing beside init_from"),
        ("--init_from {bagel} --model_path {complete}", "model_path does nothing beside init_from"),
        ("--init_from {bagel} --finetune_from_hf True", "finetune_from_hf does nothing beside init_from"),
        ("--init_from {bagel} --llm_path x --copy_init_moe False", "llm_path, copy_init_moe: no effect"),
        ("--resume_from {complete} --init_weights ema", "init_weights: no effect"),
        ("--init_from {bagel} --resume_data False", "resume_data False: no effect"),
    ],
)
def test_loading_flags_that_do_nothing_say_so(folders, flags, note):
    assert plan_loading(load_config(flags.format(**folders).split())).describe().count(note) == 1


def test_configs_beside_init_from_come_from_a_given_model_path_only(folders):
    flags = ["--init_from", folders["checkpoint"], "--finetune_from_hf", "True"]
    assert plan_loading(load_config(flags)).configs_from == folders["checkpoint"]
    plan = plan_loading(load_config([*flags, "--model_path", folders["bagel"]]))
    assert (plan.init_from, plan.configs_from) == (folders["checkpoint"], folders["bagel"])


# ------------------------------------------------------------ files and documentation


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_are_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert validate(load_config(path), world_size=processes_of(path)) == []


def processes_of(path: Path) -> int:
    """``…_2x40gb.yaml`` is for two processes."""
    found = re.search(r"_(\d+)x\d+gb", path.stem)
    return int(found[1]) if found else 1


def test_help_lists_every_flag_once_and_training_guide_holds_the_same_table():
    names = [setting.name for _, group in fields_by_group() for _, setting in group]
    assert sorted(names) == sorted(values_of(RunConfig()))
    text = flag_help()
    assert all(text.count(f"--{name} ") == 1 for name in names)
    assert flag_help(markdown=True) in (ROOT / "TRAIN.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "meant"), [("learning_rate", "lr"), ("output_dir", "results_dir"), ("lr_schedular", "lr_scheduler")]
)
def test_unknown_settings_name_the_one_that_was_meant(name, meant) -> None:
    with pytest.raises(ConfigError, match=f"Did you mean {meant}\\?"):
        load_config([f"--{name}", "1"])
