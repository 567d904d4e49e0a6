"""`echo4o generate` as people call it: one picture, files of requests, torchrun, and a kill in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from echo4o.cli import app
from echo4o.generate.files import read_metadata, settings_dict
from echo4o.generate.options import Rank
from echo4o.generate.presets import PRESETS
from tests.generate.request_files import contents_of, results_of, write_pictures, write_requests
from tests.train.tiny_run import tiny_config, write_bagel

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
runner = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_bagel(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    """A model that cannot be asked about images: such requests fail once it is loaded."""
    config = replace(tiny_config(), visual_und=False, vit=None)
    return str(write_bagel(tmp_path_factory.mktemp("model") / "blind", config))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Pictures in the current folder, a CPU, and one thread, as the processes that results are compared with."""
    write_pictures(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def generate(model, *arguments, status=0):
    result = runner.invoke(app, ["generate", model, *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result.output


FAST = ("--num-timesteps", "3")
BOTH = ("--image", "red.png", "--image", "blue.png")


def test_one_picture(model, here):
    printed = generate(model, *BOTH, "--prompt", "schön, <image 2> 图", "--out", "new/a.png", "--seed", 4, *FAST)
    assert printed.splitlines()[-1] == "new/a.png"
    known = read_metadata("new/a.png")
    assert (known["prompt"], known["seed"], known["preset"]) == ("schön, <image 2> 图", 4, "multi_ref")
    assert [image["image"] for image in known["images"]] == ["red.png", "blue.png"]
    assert Image.open("new/a.png").size == (known["width"], known["height"])
    assert known["model"]["name"] == "tiny" and known["model"]["dtype"] == "float32"


def test_every_setting_arrives(model):
    generate(
        model, "--prompt", "x", "--height", 32, "--width", 48, "--preset", "edit", "--num_timesteps", 3,
        "--timestep-shift", 2, "--cfg-text-scale", 1.5, "--cfg-img-scale", 1.25, "--cfg-interval", "0.2,0.9",
        "--cfg-renorm-type", "text_channel", "--cfg-renorm-min", 0.5, "--size-from", "first", "--max-think-tokens", 4,
        "--do-sample", "--temperature", 0.7, "--top-p", 0.9, "--taylorseer", "--branch-cache", 2, "--think",
    )  # fmt: skip
    known = read_metadata("out.png")
    assert known["settings"] == {
        "num_timesteps": 3, "timestep_shift": 2, "cfg_text_scale": 1.5, "cfg_img_scale": 1.25,
        "cfg_interval": [0.2, 0.9], "cfg_renorm_type": "text_channel", "cfg_renorm_min": 0.5, "size_from": "first",
        "max_think_tokens": 4, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "taylorseer": True,
        "branch_cache": 2,
    }  # fmt: skip
    assert (known["preset"], known["height"], known["width"], known["think"]) == ("edit", 32, 48, True)


def test_several_pictures_a_sheet_and_one_of_them_again(model, here):
    generate(model, *BOTH, "--prompt", "x", "--num-images", 2, "--grid", "sheet.jpg", "--seed", 6, *FAST)
    assert [read_metadata(f"out_{i}.png")["seed"] for i in (0, 1)] == [6, 7]
    assert Image.open("sheet.jpg").width > 4 * 192  # two references and two results beside each other
    again = generate(model, "--like", "out_1.png", "--out", "again.png")
    assert "differ" not in again
    assert (here / "again.png").read_bytes() == (here / "out_1.png").read_bytes()
    generate(model, "--like", "out_1.png", "--out", "other.png", "--seed", 8)
    assert read_metadata("other.png")["settings"]["num_timesteps"] == 3
    assert (here / "other.png").read_bytes() != (here / "out_1.png").read_bytes()


def test_elements_can_be_drawn_again(model, here):
    line = {"id": "a", "elements": [{"image": "blue.png"}, "becomes", {"image": "red.png"}, "now"], "num_timesteps": 3}
    generate(model, "--requests", write_requests(here / "r.jsonl", line), "--out", "all")
    generate(model, "--like", "all/a.png", "--image", "blue.png", "--image", "red.png", "--out", "again.png")
    assert (here / "again.png").read_bytes() == (here / "all" / "a.png").read_bytes()


def test_changed_references_are_named(model, here, caplog):
    generate(model, "--image", "red.png", "--prompt", "x", *FAST)
    generate(model, "--like", "out.png", "--image", "blue.png", "--out", "b.png")
    assert "blue.png is not image 1 that out.png was drawn from" in caplog.text
    (here / "red.png").unlink()
    assert "say with --image where the references of out.png are: red.png" in generate(
        model, "--like", "out.png", status=1
    )


def test_like_with_other_options(model, here):
    """A preset takes the place of the old settings, --size-from that of the old size; references stay."""
    generate(model, *BOTH, "--prompt", "x", "--height", 32, "--width", 32, "--cfg-img-scale", 1.5, *FAST)
    generate(model, "--like", "out.png", "--prompt", "other", "--size-from", 1, "--out", "b.png")
    known = read_metadata("b.png")
    assert (known["prompt"], len(known["images"]), known["settings"]["cfg_img_scale"]) == ("other", 2, 1.5)
    assert (known["width"], known["height"]) != (32, 32)
    generate(model, "--like", "out.png", "--preset", "t2i", "--num-timesteps", 4, "--out", "c.png")
    known = read_metadata("c.png")
    assert (known["width"], known["height"], known["preset"]) == (32, 32, "t2i")
    assert known["settings"] == json.loads(json.dumps(settings_dict(PRESETS["t2i"].changed(num_timesteps=4))))
    generate(model, "--like", "out.png", "--prompt", "y", "--image", "red.png", "--out", "d.png")
    assert [image["image"] for image in read_metadata("d.png")["images"]] == ["red.png"]


def test_the_preset_understand_answers(model, here):
    generate(model, "--image", "red.png", "--prompt", "What?", "--preset", "understand", "--max-think-tokens", 4)
    assert not (here / "out.png").exists()


def test_answers_are_printed_and_written(model, here):
    ask = ("--image", "red.png", "--prompt", "What is this?", "--understand", "--max-think-tokens", 6)
    printed = generate(model, *ask, "--out", "answer.txt")
    answer = (here / "answer.txt").read_text(encoding="utf-8")
    assert answer.strip() and answer in printed
    generate(model, *ask)
    assert not (here / "out.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "RequestError: give a prompt"),
        (("--prompt", "x", "--image", "no.png"), "no.png cannot be read"),
        (("--prompt", "x", "--out", "a.jpg"), "must end in .png"),
        (("--prompt", "x", "--understand", "--out", "a.png"), "must end in .txt"),
        (("--prompt", "x", "--height", 40, "--width", 40), "multiples of 16 up to 128"),
        (("--prompt", "x", "--cfg-interval", "0.4"), "must be two times, e.g. 0.4,1.0"),
        (("--prompt", "x", "--overwrite"), "--overwrite goes with --requests FILE"),
        (("--prompt", "x", "--grid", "a.gif"), "a contact sheet ends in"),
        (("--prompt", "x", "--requests", "r.jsonl", "--out", "f"), "--prompt and --requests exclude each other"),
        (("--requests", "r.jsonl"), "--requests needs --out FOLDER"),
        (("--requests", "no.jsonl", "--out", "f"), "No such file or directory: 'no.jsonl'"),
        (("--like", "red.png"), "says nothing of how it was drawn"),
        (("--prompt", "x", "--batch-size", 0), "--batch-size is 0"),
        (("--prompt", "x", "--size-from", "lats"), "size_from is 'lats'"),
        (("--prompt", "x", "--device", "gpu"), "--device is gpu; use auto, cpu, cuda or cuda:N"),
        (("--prompt", "x", "--device", "cuda"), "torch finds no CUDA GPU here; use --device cpu"),
        (("--prompt", "x", "--grid", "out.png"), "--grid is out.png, which is a reference or a result"),
        (("--prompt", "x", "--image", "red.png", "--out", "red.png"), "red.png would overwrite red.png"),
        (("--prompt", "x", "--image", "red.png", "--grid", "./red.png"), "which is a reference or a result"),
    ],
)
def test_wrong_calls_are_one_line(model, arguments, message, monkeypatch):
    monkeypatch.setattr("echo4o.generate.command.ModelOptions.load", lambda options: pytest.fail("loaded"))
    last = generate(model, *arguments, status=1).strip().splitlines()[-1]
    assert message in last


def test_a_model_that_is_not_there(here):
    assert "/no/model is not a folder" in generate("/no/model", "--prompt", "x", status=1)


def test_bad_lines_stop_before_the_model_is_loaded(model, here):
    lines = ({"prompt": "a", "height": 16, "width": 16}, {"promt": "b"}, {"prompt": "c", "images": ["no.png"]})
    path = write_requests(here / "r.jsonl", *lines)
    printed = generate("no/model", "--requests", path, "--out", "f", status=1)
    assert "2 lines cannot be used" in printed and "line 2: unknown key 'promt'. Did you mean prompt?" in printed
    assert not (here / "f").exists()
    assert "1 done, 2 lines left out" in generate(model, "--requests", path, "--out", "f", "--skip-bad", *FAST)
    assert list(contents_of(here / "f")) == ["00001.png"]


ASK = {"id": "ask", "prompt": "what?", "images": ["red.png"], "understand": True}


def test_failed_requests_are_the_exit_status(blind, here):
    path = write_requests(here / "r.jsonl", ASK, {"id": "small", "prompt": "x", "height": 16, "width": 16})
    printed = generate(blind, "--requests", path, "--out", "f", "--grid", "new/sheet.png", *FAST, status=1)
    assert "1 done, 1 failed" in printed and "ask: ValueError: " in printed
    assert list(contents_of(here / "f")) == ["small.png"] and (here / "new" / "sheet.png").exists()


def references(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.mark.parametrize(
    ("line", "name", "remedy"),
    [
        ({"id": "red", "prompt": "x"}, "r.jsonl", "choose another --out, or another id for that line"),
        ({"id": "blue", "prompt": "x", "images": ["link.png"]}, "r.jsonl", "link.png, which is read"),
        ({"id": "ask", "prompt": "x", "understand": True}, "ask.txt", "ask.txt would overwrite"),
        ({"id": "a", "prompt": "x"}, "results.jsonl", "results.jsonl would overwrite"),
    ],
)
def test_references_and_requests_are_not_overwritten(model, here, monkeypatch, line, name, remedy):
    monkeypatch.setattr("echo4o.generate.command.ModelOptions.load", lambda options: pytest.fail("loaded"))
    (here / "link.png").symlink_to("blue.png")
    path = write_requests(here / name, {"id": "user", "prompt": "x", "images": ["red.png"]}, line)
    known, text = references(here), path.read_text()
    assert remedy in generate(model, "--requests", path, "--out", ".", *FAST, status=1)
    assert (references(here), path.read_text()) == (known, text)


def test_sizes_are_checked_before_anything_is_drawn(model, here):
    path = write_requests(here / "r.jsonl", {"prompt": "x"}, {"prompt": "x", "height": 512, "width": 512})
    printed = generate(model, "--requests", path, "--out", "f", *FAST, status=1)
    assert "line 2: output size 512 × 512" in printed and not (here / "f").exists()


# ---------------------------------------------------------------- several processes, and a kill


def requests_file(folder, count=6):
    lines = [{"prompt": f"number {i}", "height": 64, "width": 64} for i in range(count - 2)]
    lines += [{"id": "both", "prompt": "x", "images": ["red.png", "blue.png"], "num_images": 2}]
    lines += [{"id": "ask", "prompt": "what?", "images": ["red.png"], "understand": True, "max_think_tokens": 5}]
    return write_requests(folder / "r.jsonl", *lines)


def test_torchrun_gives_the_same_files(model, here):
    path = requests_file(here)
    generate(model, "--requests", path, "--out", "one", *FAST)
    command = [*TORCHRUN, "echo4o.cli", "generate", model, "--requests", str(path), "--out", "two", *FAST]
    done = subprocess.run(command, cwd=here, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("6 done") == 1  # one rank reports, for all
    assert contents_of(here / "one") == contents_of(here / "two")
    assert results_of(here / "one") == results_of(here / "two")
    assert [p.name for p in (here / "two").glob("results*")] == ["results.jsonl"]


def test_failures_on_one_rank_do_not_end_the_other(blind, here):
    """torchrun ends all processes when one fails: the status comes from the one that ends last."""
    lines = [
        ASK,
        {"prompt": "y"},
        {"prompt": "z"},
        {"prompt": "w"},
    ]
    path = write_requests(here / "r.jsonl", *lines)
    arguments = ["--requests", str(path), "--out", "f", "--num-timesteps", "20"]
    command = [*TORCHRUN, "echo4o.cli", "generate", blind, *arguments]
    done = subprocess.run(command, cwd=here, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "3 done, 1 failed" in done.stdout and "ask: ValueError: " in done.stdout
    assert len(contents_of(here / "f")) == 3


def test_every_start_of_torchrun_has_a_name_of_its_own(monkeypatch):
    """Fixed ports and no id, as `torchrun --nproc_per_node=2` sets them: restarts differ, ranks do not."""
    names = {"TORCHELASTIC_RUN_ID": "none", "MASTER_PORT": "29500", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    runs = {}
    for rank, restarts in (("0", "0"), ("1", "0"), ("0", "1")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        runs[rank, restarts] = Rank.from_environment().run
    assert runs["0", "0"] == runs["1", "0"] != runs["0", "1"]
    monkeypatch.setattr("echo4o.generate.options.name_of_start", lambda: "started by another launcher")
    assert Rank.from_environment().run != runs["0", "1"]


def test_killed_and_called_again(model, here):
    """No half picture under a final name; the second call draws what is missing, and all is as if never killed."""
    path = requests_file(here, count=12)
    arguments = ["--requests", str(path), "--num-timesteps", "30"]
    command = [sys.executable, "-m", "echo4o.cli", "generate", model, *arguments, "--out", "killed"]
    journal = here / "killed" / "results.0.jsonl"
    process = subprocess.Popen(command, cwd=here, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (journal.is_file() and "fingerprint" in journal.read_text()) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    finished = journal.read_text().count('"fingerprint"')
    assert 1 <= finished < 12
    for name in contents_of(here / "killed"):
        read_metadata(here / "killed" / name)

    printed = generate(model, *arguments, "--out", "killed")
    assert f"{12 - finished} done, {finished} were finished before" in printed
    generate(model, *arguments, "--out", "whole")
    assert contents_of(here / "killed") == contents_of(here / "whole")
    assert results_of(here / "killed") == results_of(here / "whole")
    assert not list((here / "killed").glob("*.partial"))


def test_app_wants_a_port_and_a_device_that_exist(model, monkeypatch):
    monkeypatch.setattr("echo4o.generate.command.ModelOptions.load", lambda options: pytest.fail("loaded"))
    for arguments, message in (
        (("--port", "99999"), "--port is 99999; it must lie between 0 and 65535"),
        (("--device", "gpu"), "--device is gpu; use auto, cpu"),
    ):
        result = runner.invoke(app, ["app", model, *arguments])
        assert result.exit_code == 1 and message in result.output.strip().splitlines()[-1]


def test_app_passes_its_options_on(monkeypatch):
    calls = []
    monkeypatch.setattr("echo4o.app.serve", lambda *arguments, **options: calls.append((arguments, options)))
    result = runner.invoke(
        app, ["app", "some/model", "--port", "7", "--share", "--weights", "ema", "--dtype", "float16"]
    )
    assert result.exit_code == 0, result.output
    ((arguments, options),) = calls
    assert arguments == (Path("some/model"),)
    assert json.loads(json.dumps(options)) == {
        "host": "127.0.0.1", "port": 7, "share": True, "dtype": "float16", "device": "auto", "weights": "ema",
        "base": None, "quantize": None, "offload": None,
    }  # fmt: skip
