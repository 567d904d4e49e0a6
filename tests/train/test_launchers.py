"""The launchers start torchrun with options it knows, the training with flags it knows, and pass stop signals on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from echo4o.config import load_config
from tests.train.ranks import wait_for

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "scripts" / "launch"
SCRIPTS = (LAUNCH / "torchrun_multi_node.sh", LAUNCH / "slurm.sbatch")

# In the place of Python: notes the command; with STUB_WAIT it has a child, as torchrun has, that waits for SIGUSR1.
STUB_PYTHON = f"""#!{sys.executable}
import json, os, signal, subprocess, sys
from pathlib import Path
out = Path(os.environ["STUB_OUT"])
(out / f"command_{{os.environ.get('NODE_RANK', '0')}}.json").write_text(json.dumps(sys.argv[1:]))
if "STUB_WAIT" in os.environ:
    child = "import signal, pathlib; signal.signal(signal.SIGUSR1, lambda *_: None); "
    child += f"pathlib.Path({{str(out / 'ready')!r}}).touch(); signal.pause()"
    sys.exit(subprocess.Popen([sys.executable, "-c", child], start_new_session=True).wait())
sys.exit(int(os.environ.get("STUB_STATUS", "0")))
"""
# In the place of srun: the nodes' tasks, one after the other. A signal goes to the task, as Slurm does it.
STUB_SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for node in $STUB_NODES; do
    SLURM_NODEID=$node "$@" & task=$!
    trap 'kill -USR1 $task' USR1
    while kill -0 $task 2>/dev/null; do wait $task || true; done
    wait $task || exit $?
done
"""
STUB_SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$STUB_OUT/scontrol"
[[ $1 != show ]] || { printf 'gpu-7\\ngpu-8\\n'; seq -f 'gpu-%g' 9 20000; }
"""


@pytest.fixture
def stubs(tmp_path) -> dict[str, str]:
    """An environment with stubs of Python, srun and scontrol; they write into its STUB_OUT."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"python": STUB_PYTHON, "srun": STUB_SRUN, "scontrol": STUB_SCONTROL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    hidden = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "STOP_GRACE", "STOPPED_FILE", "RUN_ID")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": str(folder / "python"),
        "STUB_OUT": str(tmp_path),
        "STUB_NODES": "0 1",
        "REPOSITORY": str(ROOT),
    }


def slurm(stubs: dict[str, str]) -> dict[str, str]:
    return stubs | {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "gpu-[7-8]",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }


def parsed(stubs: dict[str, str], node: int = 0):
    """(torchrun's options, the settings of the training) of a node's command; both parsers refuse unknown ones."""
    command = json.loads((Path(stubs["STUB_OUT"]) / f"command_{node}.json").read_text())
    assert command[:2] == ["-m", "torch.distributed.run"]
    options = get_args_parser().parse_args(command[2:])
    assert (ROOT / options.training_script).exists()
    return options, load_config(options.training_script_args)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_understands_it(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


def test_torchrun_on_several_nodes(stubs):
    node = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node-a", "GPUS_PER_NODE": "4"}
    command = [SCRIPTS[0], ROOT / "configs" / "tiny_cpu.yaml", "--lr", "2e-5"]
    subprocess.run(command, env=stubs | node, check=True, timeout=30)
    options, config = parsed(stubs, 1)
    assert (options.nnodes, options.nproc_per_node, options.max_restarts) == ("2", "4", 3)
    assert (options.rdzv_backend, options.rdzv_endpoint) == ("c10d", "node-a:29400")
    assert "is_host=false" in options.rdzv_conf, "the rendezvous is held by node 0"
    assert config.training.lr == 2e-5 and config.training.auto_resume
    assert options.shutdown_timeout > config.training.stop_grace


@pytest.mark.parametrize(("status", "stopped", "expected"), [(0, False, 0), (1, False, 1), (0, True, 75), (1, True, 1)])
def test_exit_status(stubs, tmp_path, status, stopped, expected):
    marker = tmp_path / "stopped.json"
    if stopped:
        marker.touch()
    environment = stubs | {"STUB_STATUS": str(status), "STOPPED_FILE": str(marker)}
    assert subprocess.run([SCRIPTS[0]], env=environment, timeout=30).returncode == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_reaches_the_ranks_and_not_torchrun(stubs, tmp_path, number):
    process = subprocess.Popen([SCRIPTS[0]], env=stubs | {"STUB_WAIT": "1"}, start_new_session=True)
    try:
        wait_for(tmp_path / "ready")
        os.killpg(process.pid, number)  # to the whole group, as Slurm does it
        assert process.wait(30) == 0
    finally:
        process.kill()


def test_slurm_starts_torchrun_on_every_node(stubs):
    environment = slurm(stubs)
    command = ["bash", SCRIPTS[1], ROOT / "configs" / "tiny_cpu.yaml", "--lr", "2e-5"]
    subprocess.run(command, env=environment, check=True, timeout=30)
    for node in (0, 1):
        options, config = parsed(stubs, node)
        assert (options.nnodes, options.nproc_per_node) == ("2", "8")
        assert options.rdzv_endpoint == f"gpu-7:{20000 + 4711}" and options.rdzv_id == "4711-0"
        assert f"is_host={'true' if node == 0 else 'false'}" in options.rdzv_conf
        assert config.training.lr == 2e-5 and config.training.stop_grace < 300, "less than the time that Slurm leaves"
    assert (Path(stubs["STUB_OUT"]) / "scontrol").read_text() == "show hostnames gpu-[7-8]\n"


def test_slurm_queues_a_stopped_job_again(stubs, tmp_path):
    environment = slurm(stubs) | {"STUB_WAIT": "1", "STUB_NODES": "0"}
    process = subprocess.Popen(["bash", SCRIPTS[1]], env=environment)
    try:
        wait_for(tmp_path / "ready")
        process.send_signal(signal.SIGUSR1)
        assert process.wait(30) == 0
    finally:
        process.kill()
    assert (tmp_path / "scontrol").read_text().splitlines()[-1] == "requeue 4711"


def test_kubernetes_manifest(stubs):
    job = yaml.safe_load((LAUNCH / "kubernetes_pytorchjob.yaml").read_text())
    replicas = job["spec"]["pytorchReplicaSpecs"]
    pods = sum(replica["replicas"] for replica in replicas.values())
    for replica in replicas.values():
        assert replica["restartPolicy"] == "OnFailure"
        spec = replica["template"]["spec"]
        (container,) = spec["containers"]
        variables = {variable["name"]: variable["value"] for variable in container["env"]}
        assert variables["NNODES"] == str(pods)
        assert variables["GPUS_PER_NODE"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
        assert spec["terminationGracePeriodSeconds"] > int(variables["STOP_GRACE"])
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
        flags = ["configs/tiny_cpu.yaml", *container["args"][1:]]
        pod = {"RANK": "1", "MASTER_ADDR": "echo4o-master-0", "MASTER_PORT": "23456"} | variables
        subprocess.run([*container["command"], *flags], env=stubs | pod, cwd=ROOT, check=True, timeout=30)
        options, config = parsed(stubs, 1)
        assert options.rdzv_endpoint == "echo4o-master-0:23456" and "is_host=false" in options.rdzv_conf
        assert variables["STOPPED_FILE"] == f"{config.training.results_dir}/stopped.json"


@pytest.mark.slow
def test_a_real_torchrun_takes_the_options(stubs):
    environment = stubs | {"PYTHON": sys.executable, "GPUS_PER_NODE": "1", "MASTER_PORT": "0", "MAX_RESTARTS": "0"}
    done = subprocess.run([SCRIPTS[0], "--help"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Usage: echo4o train" in done.stdout
