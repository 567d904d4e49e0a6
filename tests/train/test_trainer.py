"""Whole runs on the example data: outputs, wrong settings, failures on the way."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import yaml

from echo4o.checkpoint import folders, writer
from echo4o.config import ConfigError
from echo4o.model import Bagel, BagelConfig
from echo4o.model.vae import AutoEncoder
from echo4o.train import trainer as trainer_module
from echo4o.train.engine import SingleProcessEngine
from echo4o.train.metrics import MetricsFile, read_metrics
from echo4o.train.trainer import NonFiniteError, RunError, train
from tests.train.tiny_run import DATA, run_config, tiny_config, write_bagel, write_tokenizer


@pytest.fixture(scope="module")
def bagel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bagel(tmp_path_factory.mktemp("model") / "bagel")


def test_run_leaves_everything(bagel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    train(run_config(bagel, out, tensorboard=True, keep_last_n=1, total_steps=4))
    records = read_metrics(out / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for name in (
        "loss",
        "mse",
        "lr",
        "grad_norm",
        "tokens_per_sec",
        "mfu",
        "data_wait_share",
        "fill_ratio",
        "peak_memory_gb",
    ):
        assert records[-1][name] is not None
    assert any(name.startswith("mse/t_") for name in records[-1])
    assert any(name.startswith("mse/example") for name in records[-1])
    assert (out / "loss.png").exists() and (out / "config.yaml").exists() and list((out / "tensorboard").iterdir())
    text = capsys.readouterr().out
    for words in (
        str(bagel / "model.safetensors"),
        "generation experts",
        "tokens per step",
        "memory, estimated",
        "rows",
    ):
        assert words in text

    checkpoint = folders.latest(out / "checkpoints")
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [".lock", "0000004", "latest"]
    trained = Bagel.from_pretrained(checkpoint, weights="model").state_dict()
    start = Bagel.from_pretrained(bagel).state_dict()
    assert not torch.equal(trained["llm2vae.weight"], start["llm2vae.weight"])
    assert BagelConfig.from_pretrained(checkpoint) == BagelConfig.from_pretrained(bagel)
    AutoEncoder.from_pretrained(checkpoint)
    for name in ("tokenizer.json", "config.yaml", "ema.safetensors"):
        assert (checkpoint / name).exists()
    # A checkpoint is a model folder: the next run starts from it.
    train(run_config(checkpoint, tmp_path / "next", total_steps=1, init_weights="ema"))
    assert f"weights from {checkpoint / 'ema.safetensors'}" in capsys.readouterr().out


def test_all_kinds_of_data_and_every_branch(bagel: Path, tmp_path: Path) -> None:
    config = run_config(
        bagel,
        tmp_path,
        dataset_config_file=str(DATA / "dataset_mixed.yaml"),
        expected_num_tokens=500,
        max_num_tokens=700,
        gradient_accumulation_steps=2,
        ce_loss_reweighting=True,
        activation_checkpointing="selective",
        total_steps=2,
        freeze_und=True,
    )
    train(config)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["ce"] > 0 and last["mse"] > 0
    assert last["loss"] == pytest.approx(last["ce"] + last["mse"])
    # freeze_und: the understanding experts are where they were, the generation experts are not.
    before = Bagel.from_pretrained(bagel).state_dict()
    after = Bagel.from_pretrained(folders.latest(tmp_path / "checkpoints"), weights="model").state_dict()
    layer = "language_model.model.layers.0.self_attn.q_proj"
    assert torch.equal(before[f"{layer}.weight"], after[f"{layer}.weight"])
    assert not torch.equal(before[f"{layer}_moe_gen.weight"], after[f"{layer}_moe_gen.weight"])


@pytest.mark.parametrize("branch", ["visual_gen", "visual_und"])
def test_one_branch_alone(bagel: Path, tmp_path: Path, branch: str) -> None:
    data = tmp_path / "one.yaml"
    text = (DATA / "dataset_mixed.yaml").read_text().replace("data_dir: ", f"data_dir: {DATA}/")
    text = text.replace("jsonl_path: ", f"jsonl_path: {DATA}/").replace("_path: edit", f"_path: {DATA}/edit")
    head, multi_ref, t2i, edit, vlm = text.split("\n\n")
    vlm = vlm.replace("*vit_images", "{image_stride: 14, max_image_size: 56, min_image_size: 28}")
    data.write_text(
        "\n\n".join([head, vlm] if branch == "visual_gen" else [head, multi_ref, t2i.replace("weight: 1", "weight: 9")])
    )
    train(run_config(bagel, tmp_path / "out", dataset_config_file=str(data), total_steps=2, **{branch: False}))
    last = read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]
    assert (last["mse"] is None) == (branch == "visual_gen")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_latent_size": 32}, r"max_latent_size is 32 in command line, but the position table of .* holds 8 × 8"),
        ({"layer_module": "Qwen2MoEDecoderLayer"}, "layer_module is Qwen2MoEDecoderLayer"),
        ({"vit_max_num_patch_per_side": 70}, "holds 4 × 4 entries"),
        ({"init_weights": "ema"}, r"has no ema.safetensors"),
        ({"attention_kernel": "flash"}, "flash"),
        (
            {
                "freeze_llm": True,
                "freeze_vit": True,
                "init_from": None,
                "finetune_from_hf": True,
                "model_path": "nowhere",
            },
            "nowhere",
        ),
        ({"device": "cuda"}, "no GPU"),
    ],
)
def test_settings_that_cannot_work_end_before_training(
    bagel: Path, tmp_path: Path, changes: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        train(run_config(bagel, tmp_path, **changes))
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("flag", ["results_dir", "checkpoint_dir"])
def test_unwritable_output_is_one_clear_error(bagel: Path, tmp_path: Path, flag: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=f"{flag} is .*cannot be written"):
        train(run_config(bagel, tmp_path / "out", **{flag: str(tmp_path / "file" / "deeper")}))


def test_missing_tensor_stops_the_run(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_bagel(tmp_path / "bagel")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("connector.fc1.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lacks 1 of .* connector.fc1.weight"):
        train(run_config(folder, tmp_path / "out"))


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = write_bagel(tmp_path / "bagel", tiny_config(vocab_size=200))
    with pytest.raises(ConfigError, match="not from the same model"):
        train(run_config(folder, tmp_path / "out"))


def test_embeddings_grow_for_added_markers(tmp_path: Path) -> None:
    folder = write_bagel(tmp_path / "bagel", tiny_config(vocab_size=258))
    write_tokenizer(folder, markers=("<|im_start|>", "<|im_end|>"))
    train(run_config(folder, tmp_path / "out", total_steps=1))
    checkpoint = folders.latest(tmp_path / "out" / "checkpoints")
    assert BagelConfig.from_pretrained(checkpoint).llm.vocab_size == 260
    train(run_config(checkpoint, tmp_path / "next", total_steps=1))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_steps_that_are_not_finite_are_skipped_and_then_stop(
    bagel: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = trainer_module.Trainer.forward
    bad_steps = {2, 4, 5, 6}

    def spoiled(self, batch, totals):
        loss = forward(self, batch, totals)
        if self.run.step + 1 in bad_steps:
            if where == "loss":
                loss.total = loss.total * float("nan")
                loss.mse = loss.mse * float("nan")
            else:
                loss.total.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(trainer_module.Trainer, "forward", spoiled)
    snapshots = []
    step = trainer_module.Trainer.train_step

    def watched(self, micro_batches, lr):
        result = step(self, micro_batches, lr)
        snapshots.append(self.run.engine.module.llm2vae.weight.detach().clone())
        return result

    monkeypatch.setattr(trainer_module.Trainer, "train_step", watched)
    with pytest.raises(NonFiniteError, match="3 steps in a row.*step 6"):
        train(run_config(bagel, tmp_path, total_steps=20, max_nonfinite_steps=3, save_every=100, warmup_steps=0))
    assert torch.equal(snapshots[0], snapshots[1]), "a skipped step must not change the weights"
    assert not torch.equal(snapshots[1], snapshots[2])
    assert all(torch.isfinite(snapshot).all() for snapshot in snapshots)
    assert [record["skipped_steps"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 1, 2, 3]


@pytest.mark.parametrize("async_save", [True, False])
def test_failing_periodic_save_warns_and_training_goes_on(
    bagel: Path, tmp_path: Path, async_save: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    create = writer.create_file

    def create_on_full_disk(path, layout):
        if path.parent.name == "0000004.partial" and path.name == "model.safetensors":
            raise OSError(28, "No space left on device")
        create(path, layout)

    monkeypatch.setattr(writer, "create_file", create_on_full_disk)
    with caplog.at_level(logging.WARNING):
        train(run_config(bagel, tmp_path, total_steps=6, async_save=async_save))
    assert "0000004" in caplog.text and "No space left" in caplog.text and "training goes on" in caplog.text
    assert folders.steps(tmp_path / "checkpoints") == [2, 6]
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")][-1] == 6


def test_failing_last_save_is_an_error(bagel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(writer, "create_file", fail)
    with pytest.raises(folders.CheckpointError, match="disk full"):
        train(run_config(bagel, tmp_path, total_steps=1))


def test_weights_that_are_not_finite_leave_no_checkpoint(
    bagel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step = trainer_module.Trainer.train_step

    def spoil(self, micro_batches, lr):
        result = step(self, micro_batches, lr)
        if self.run.step == 2:
            self.run.engine.module.llm2vae.weight.data.fill_(float("nan"))
        return result

    monkeypatch.setattr(trainer_module.Trainer, "train_step", spoil)
    with caplog.at_level(logging.WARNING), pytest.raises(folders.CheckpointError, match="llm2vae.weight"):
        train(run_config(bagel, tmp_path, total_steps=5))
    assert "0000004" in caplog.text and "training goes on" in caplog.text
    assert folders.steps(tmp_path / "checkpoints") == [2]


@pytest.mark.parametrize(
    ("where", "error", "memory"),
    [
        ("forward", torch.OutOfMemoryError("CUDA out of memory"), "GPU"),
        ("backward", torch.OutOfMemoryError("CUDA out of memory"), "GPU"),
        ("backward", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "host"),
    ],
)
def test_out_of_memory_names_the_pack_and_the_remedy(
    bagel: Path, tmp_path: Path, where: str, error: Exception, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(self, *_):
        raise error

    target = trainer_module.Trainer if where == "forward" else SingleProcessEngine
    monkeypatch.setattr(target, where, exhausted)
    with pytest.raises(RunError, match=rf"out of {memory} memory on a pack of \d+ tokens.*--expected_num_tokens"):
        train(run_config(bagel, tmp_path))


def test_log_that_cannot_be_written_is_one_clear_error(
    bagel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self, step, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MetricsFile, "write", full)
    with pytest.raises(RunError, match="cannot log step 1 in .*No space left"):
        train(run_config(bagel, tmp_path))
    (tmp_path / "taken" / "config.yaml").mkdir(parents=True)
    with pytest.raises(ConfigError, match="results_dir is .*taken.*nothing can be logged"):
        train(run_config(bagel, tmp_path / "taken"))


def test_bias_correction_beside_a_loaded_average_says_that_it_does_nothing(
    bagel: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(run_config(bagel, tmp_path / "first", total_steps=3, lr=1e-2))
    checkpoint = folders.latest(tmp_path / "first" / "checkpoints")
    options = {"init_weights": "model", "ema_bias_correction": True, "ema": 0.999, "lr": 1e-9, "warmup_steps": 0}
    with caplog.at_level(logging.WARNING):
        train(run_config(checkpoint, tmp_path / "second", total_steps=1, **options))
    assert caplog.text.count("ema_bias_correction: no effect") == 1
    after = folders.latest(tmp_path / "second" / "checkpoints")
    old, new = (Bagel.from_pretrained(f, weights="ema").state_dict()["llm2vae.weight"] for f in (checkpoint, after))
    torch.testing.assert_close(old, new, rtol=0, atol=1e-5)


def test_dataset_info_of_the_settings_starts_at_the_working_directory(
    bagel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = yaml.safe_load((DATA / "dataset.yaml").read_text())
    info = settings.pop("dataset_info")
    for entries in info.values():
        for entry in entries.values():
            entry.update({key: str(DATA / value) for key, value in entry.items() if key.endswith(("dir", "path"))})
    for folder, content in (("d", info), ("elsewhere", settings)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    train(
        run_config(
            bagel,
            tmp_path / "out",
            dataset_config_file="elsewhere/file.yaml",
            dataset_info="d/file.yaml",
            total_steps=1,
        )
    )
    assert folders.steps(tmp_path / "out" / "checkpoints") == [1]


def test_finished_run_has_nothing_to_do(bagel: Path, tmp_path: Path) -> None:
    train(run_config(bagel, tmp_path, total_steps=2, auto_resume=True))
    before = (tmp_path / "metrics.jsonl").read_text()
    train(run_config(bagel, tmp_path, total_steps=2, auto_resume=True))
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_resume_from_a_damaged_checkpoint_names_the_remedy(bagel: Path, tmp_path: Path) -> None:
    train(run_config(bagel, tmp_path, total_steps=2))
    checkpoint = folders.latest(tmp_path / "checkpoints")
    (checkpoint / "optimizer.safetensors").unlink()
    with pytest.raises(ConfigError, match="init_from"):
        train(run_config(bagel, tmp_path / "again", init_from=None, resume_from=str(checkpoint), total_steps=4))


def test_upstream_style_start_reads_model_and_ema_files(bagel: Path, tmp_path: Path) -> None:
    """resume_from + resume_model_only: model.safetensors trains, the ema.safetensors beside it is its average."""
    train(run_config(bagel, tmp_path / "first", total_steps=3, lr=1e-2))
    checkpoint = folders.latest(tmp_path / "first" / "checkpoints")
    options = {"init_from": None, "resume_from": str(checkpoint), "resume_model_only": True, "lr": 1e-9}
    train(run_config(bagel, tmp_path / "second", total_steps=1, warmup_steps=0, ema=0.999, **options))
    after = folders.latest(tmp_path / "second" / "checkpoints")
    for weights in ("model", "ema"):
        old, new = (
            Bagel.from_pretrained(f, weights=weights).state_dict()["llm2vae.weight"] for f in (checkpoint, after)
        )
        torch.testing.assert_close(old, new, rtol=0, atol=1e-5)


def test_bfloat16_products_keep_float32_weights(bagel: Path, tmp_path: Path) -> None:
    train(run_config(bagel, tmp_path, total_steps=2, dtype="bfloat16"))
    checkpoint = folders.latest(tmp_path / "checkpoints")
    from safetensors.torch import load_file

    assert {tensor.dtype for tensor in load_file(checkpoint / "model.safetensors").values()} == {torch.float32}
    assert all(record["loss"] > 0 for record in read_metrics(tmp_path / "metrics.jsonl"))


def test_a_new_run_in_the_same_folder_overwrites_nothing(bagel: Path, tmp_path: Path) -> None:
    train(run_config(bagel, tmp_path, total_steps=4))
    train(run_config(bagel, tmp_path, total_steps=2))
    assert folders.steps(tmp_path / "checkpoints") == [2]
    assert folders.steps(tmp_path / "checkpoints" / "earlier_run_1") == [2, 4]
    own = str(tmp_path / "checkpoints" / "0000002")
    with pytest.raises(ConfigError, match="lies in its own checkpoint_dir"):
        train(run_config(Path(own), tmp_path))


def test_going_back_to_an_earlier_checkpoint(bagel: Path, tmp_path: Path) -> None:
    train(run_config(bagel, tmp_path, total_steps=6))
    whole = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    resume = {"init_from": None, "resume_from": str(tmp_path / "checkpoints" / "0000002")}
    train(run_config(bagel, tmp_path, total_steps=6, **resume))
    assert [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")] == whole
    assert folders.steps(tmp_path / "checkpoints") == [2, 4, 6]
