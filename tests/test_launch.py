"""How jobs start: places in a job from each scheduler's variables, scripts and manifests from one description."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml

from loom_jax.core import (
    STOPPED,
    ConfigError,
    Heartbeat,
    HeartbeatFile,
    InputError,
    LoomError,
    read_heartbeats,
    silent_processes,
)
from loom_jax.launch import (
    KINDS,
    PLATFORM_VARIABLES,
    Accelerator,
    JobDescription,
    LocalJob,
    Patience,
    entry,
    local,
    render,
    render_job,
)
from loom_jax.parallel import Place, find_place

SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NODELIST": "gpu[003-004,9],login",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_PROCID": "5",
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "1",
}
OPENMPI = {
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
POD = {
    "JOB_COMPLETION_INDEX": "3",
    "JAX_COORDINATOR_ADDRESS": "loom-workers-0-0.loom:8476",
    "JAX_NUM_PROCESSES": "4",
}
JAX = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, None),
        (JAX, Place("environment", "a:1", 2, 1)),
        (JAX | {"JAX_NUM_PROCESSES": "1"}, None),
        (SLURM, Place("slurm", "gpu003:61809", 6, 5, (1,))),
        (SLURM | {"SLURM_RESTART_COUNT": "2"}, Place("slurm", "gpu003:61811", 6, 5, (1,))),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        # A batch script has the variables of the job, but is no task of a step.
        ({name: value for name, value in SLURM.items() if "STEP" not in name}, None),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, Place("slurm", "gpu003:61809", 6, 5, (2, 3))),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "1"}, Place("slurm", "gpu003:61809", 6, 5)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4,1(x2)", "SLURM_LOCALID": "0"}, Place("slurm", "gpu003:61809", 6, 5)),
        (SLURM | {"SLURM_STEP_NODELIST": "n7,n8"}, Place("slurm", "n7:61809", 6, 5, (1,))),
        (OPENMPI, Place("openmpi", "10.96.0.1:62624", 3, 2)),
        (OPENMPI | {"JAX_COORDINATOR_ADDRESS": "first:7"}, Place("openmpi", "first:7", 3, 2)),
        # mpirun in an allocation of SLURM: the variables are those of its own daemons.
        (SLURM | OPENMPI, Place("openmpi", "10.96.0.1:62624", 3, 2)),
        (POD, Place("kubernetes", "loom-workers-0-0.loom:8476", 4, 3)),
        ({"JOB_COMPLETION_INDEX": "0"}, None),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}, Place("tpu")),
        ({"TPU_WORKER_HOSTNAMES": "t0", "MEGASCALE_NUM_SLICES": "2"}, Place("tpu")),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ],
)
def test_a_place_is_found_in_the_variables_of_each_scheduler(environ, place):
    assert find_place(environ) == place


def test_an_mpirun_on_one_machine_needs_no_address():
    here = {name: value for name, value in OPENMPI.items() if "MCA" not in name} | {"OMPI_COMM_WORLD_LOCAL_SIZE": "3"}
    place = find_place(here)
    assert place is not None and place.coordinator is not None and place.coordinator.startswith("localhost:")
    assert (place.count, place.number, place.local_devices) == (3, 2, (0,))


def test_flags_come_before_variables():
    assert find_place(SLURM, "b:2", 4, 3) == Place("slurm", "b:2", 4, 3, (1,))
    assert find_place(JAX, number=0) == Place("flags", "a:1", 2, 0)
    assert find_place({}, "auto") == Place("tpu")
    assert find_place({"TPU_WORKER_HOSTNAMES": "t0,t1"}, count=1) is None


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES given without JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
        ({"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID='one' in the environment is no number"),
        (POD | {"JAX_COORDINATOR_ADDRESS": ""}, "without JAX_COORDINATOR_ADDRESS .found by: kubernetes"),
        (SLURM | {"SLURM_PROCID": "x"}, "SLURM_PROCID='x'"),
    ],
)
def test_half_a_place_is_an_error(environ, message):
    with pytest.raises(ConfigError, match=message):
        find_place(environ)


RUN = {"config": "configs/tiny.py", "workdir": "runs/a b", "overrides": ("optimizer.learning_rate=1e-3",)}
TPU = {"accelerator": "tpu", "tpu": "v5p", "topology": "2x2x4", "nodes": 4, "image": "r/loom:1", "cluster": "c"}
WORDS = ["python", "-m", "loom_jax.launch.entry", "train", "--config", "configs/tiny.py", "--workdir", "runs/a b"]
WORDS += ["--config.optimizer.learning_rate=1e-3"]


def job(**changes: Any) -> JobDescription:
    return JobDescription(**{**RUN, "env": {"WHO": "it's me"}, **changes})


def dry_run(text: str, folder: Path) -> list[str]:
    """The words that a script prints with --dry-run, having been checked by bash."""
    script = folder / "script"
    script.write_text(text)
    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run(["bash", script, "--dry-run"], capture_output=True, text=True, check=True)
    return shlex.split(done.stdout)


def test_a_slurm_script_says_what_the_description_says(tmp_path):
    given = job(nodes=3, tasks_per_node=2, devices_per_node=8, partition="long", cpus_per_task=7, memory="90G")
    text = render_job("slurm", given)
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", text, re.MULTILINE))
    assert options == {
        "job-name": "loom",
        "nodes": "3",
        "ntasks-per-node": "2",
        "cpus-per-task": "7",
        "gpus-per-node": "8",
        "mem": "90G",
        "partition": "long",
        "time": "24:00:00",
        "output": "%x-%j.log",
        "open-mode": "append",
        "signal": "TERM@180",
    }
    assert "#SBATCH --requeue" in text and "scontrol requeue" in text
    assert dry_run(text, tmp_path)[-len(WORDS) :] == WORDS
    once = render_job("slurm", job(requeue=False))
    assert "#SBATCH --no-requeue" in once and "scontrol" not in once
    other = JobDescription(command="generate", arguments=("--prompt", "a $cat's"), workdir="out/x")
    text = render_job("slurm", other)
    assert "--signal" not in text and "scontrol" not in text
    words = dry_run(text, tmp_path)
    assert words[words.index("generate") :] == ["generate", "--out", "out/x", "--prompt", "a $cat's"]


def test_openmpi_and_tpu_scripts_run_the_same_words(tmp_path):
    words = dry_run(render_job("openmpi", job(nodes=2, tasks_per_node=3)), tmp_path)
    assert words[:5] == ["mpirun", "-np", "6", "--map-by", "ppr:3:node"]
    assert words[-len(WORDS) :] == WORDS and words[words.index("WHO") - 1] == "-x"
    words = dry_run(render_job("tpu-vm", job(**TPU, project="p", zone="z")), tmp_path)
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "loom"] and "--worker=all" in words
    remote = words[-1].removeprefix("--command=").partition("exec ")[2]
    flags = f"LIBTPU_INIT_ARGS={PLATFORM_VARIABLES['tpu']['LIBTPU_INIT_ARGS']}"
    assert shlex.split(remote) == ["env", flags, "PYTHONUNBUFFERED=1", "WHO=it's me", *WORDS, "--coordinator", "auto"]
    script = tmp_path / "script"
    done = subprocess.run(["bash", script, "--dry-run", "stop"], capture_output=True, text=True, cwd=tmp_path)
    assert "kill" in done.stdout and done.returncode == 0


def test_an_xpk_recipe_gives_xpk_its_flags(tmp_path):
    script = tmp_path / "recipe"
    script.write_text(render_job("xpk", job(**TPU, slices=2)))
    xpk = tmp_path / "xpk"
    xpk.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    xpk.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", script, "--dry-run"], capture_output=True, text=True, check=True, env=env)
    given = done.stdout.splitlines()
    assert given[:2] == ["workload", "create"] and given[-1] == "--dry-run"
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in given[2:-1])
    assert flags["tpu-type"] == "v5p-32" and flags["num-slices"] == "2" and flags["env"] == "WHO=it's me"
    assert shlex.split(flags["command"])[1:] == WORDS


SCHEMA = json.loads((Path(__file__).parent / "assets" / "jobset_schema.json").read_text(encoding="utf-8"))


def faults(manifest: Any) -> list[str]:
    """What of a manifest is not as the published schema says."""
    found = jsonschema.Draft202012Validator(SCHEMA).iter_errors(manifest)
    return [f"{fault.json_path}: {fault.message}" for fault in found]


MANIFESTS = [
    job(nodes=2, tasks_per_node=2, devices_per_node=8, image="r/loom:1", cpus_per_task=12, memory="90Gi"),
    job(**TPU),
    job(**TPU, slices=3, max_restarts=0, requeue=False),
    JobDescription(command="convert", image="r/loom:1", arguments=("to-orbax", "a", "b"), accelerator="cpu"),
]


@pytest.mark.parametrize("given", MANIFESTS)
def test_manifests_are_as_the_published_schema_says(given):
    manifest = yaml.safe_load(render_job("jobset", given, "nvidia-h100-80gb", {"data": "/data"}))
    assert faults(manifest) == []
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    # What admission checks beyond types.
    spec = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # as a podFailurePolicy needs
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule["action"] in ("FailJob", "Ignore") and rule["onExitCodes"]["operator"] in ("In", "NotIn")
        assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    for rule in manifest["spec"]["failurePolicy"].get("rules", []):
        assert rule["action"] in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
    claims = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == claims
    assert all(isinstance(variable["value"], str) for variable in pod["containers"][0]["env"])


def test_faults_of_manifests_are_found():
    manifest = yaml.safe_load(render_job("jobset", MANIFESTS[0]))
    spec = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    spec["completions"] = "4"
    spec["paralellism"] = 4
    del spec["template"]["spec"]["containers"][0]["name"]
    found = faults(manifest)
    assert len(found) == 3, found
    assert any("'4' is not of type 'integer'" in fault for fault in found)
    assert any("paralellism" in fault for fault in found)


def test_pods_of_a_manifest_find_their_places():
    manifest = yaml.safe_load(render_job("jobset", MANIFESTS[0]))
    replicated = manifest["spec"]["replicatedJobs"][0]
    spec = replicated["template"]["spec"]
    assert spec["completions"] == spec["parallelism"] == 4
    container = spec["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "4", "cpu": "12", "memory": "90Gi"}
    environ = {variable["name"]: variable["value"] for variable in container["env"]}
    place = find_place(environ | {"JOB_COMPLETION_INDEX": "2"})
    name = f"{manifest['metadata']['name']}-{replicated['name']}-0-0.{manifest['metadata']['name']}"
    assert place == Place("kubernetes", f"{name}:8476", 4, 2)
    assert container["command"] == WORDS
    tpu = yaml.safe_load(render_job("jobset", MANIFESTS[1]))["spec"]["replicatedJobs"][0]["template"]["spec"][
        "template"
    ]
    assert tpu["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
    }
    assert "JAX_NUM_PROCESSES" not in {variable["name"] for variable in tpu["spec"]["containers"][0]["env"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": None}, "needs --config FILE and --workdir DIR"),
        ({"name": "My Job"}, "name 'My Job'"),
        ({"nodes": 0}, "nodes=0: must be at least 1"),
        ({"time_limit": "90"}, "time_limit='90': expected HH:MM:SS"),
        ({"time_limit": "0:01:00"}, "no longer than grace_seconds=180"),
        ({"command": "generate", "nodes": 2}, "`loom generate` is one process .* not 2"),
        ({"accelerator": "tpu", "tpu": "v5p", "topology": "4x4x4"}, "64 chips, but nodes=1 of 4 .*: give nodes=16"),
        ({"accelerator": "tpu", "tpu": "v1"}, "tpu='v1' is not one of v4"),
        ({"env": {"A B": "1"}}, "env 'A B'"),
    ],
)
def test_a_description_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        job(**changes)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("jobset", {}, "jobset needs --image"),
        ("xpk", {"image": "r/loom:1"}, "xpk needs --cluster"),
        ("tpu-vm", {}, "tpu-vm is for TPUs"),
        ("slurm", TPU, "for TPUs take jobset"),
        ("tpu-vm", TPU | {"slices": 2}, "on one slice"),
        ("pbs", {}, "kind 'pbs' is not one of slurm"),
    ],
)
def test_a_kind_says_what_it_lacks(kind, changes, message):
    with pytest.raises(ConfigError, match=message):
        render_job(kind, job(**changes))


FLAGS = ["--config", "configs/tiny.py", "--workdir", "runs/x", "--config.seed=3", "--env", "A=b=c"]


def test_flags_make_a_description(capsys, tmp_path):
    machines = ["--tpu", "v5p", "--topology", "4x4x4", "--nodes", "16", "--accelerator", "tpu", "--image", "i"]
    for kind in KINDS:
        more = [*machines, "--cluster", "c"] if kind in ("xpk", "tpu-vm", "jobset") else []
        assert render.main([kind, *FLAGS, *more, "--dry-run"]) == 0
        assert "--config.seed=3" in capsys.readouterr().out
    assert render.main(["slurm", *FLAGS, "--out", str(tmp_path / "a" / "job.sbatch")]) == 0
    assert "export A=b=c" in (tmp_path / "a" / "job.sbatch").read_text()
    assert render.main(["slurm", "--command", "generate", "--dry-run", "--", "--prompt", "x y"]) == 0
    assert "generate --prompt 'x y'" in capsys.readouterr().out
    with pytest.raises(InputError, match="unrecognized arguments: lost"):
        render.main(["slurm", *FLAGS, "lost"])
    with pytest.raises(InputError, match="--env 'A': expected NAME=VALUE"):
        render.main(["slurm", *FLAGS, "--env", "A"])


def test_what_cannot_be_submitted_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LoomError, match="there is no sbatch on this machine: write the file with --out"):
        render.main(["slurm", *FLAGS])
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\ntest -s "$1" && exit 3\n')
    sbatch.chmod(0o755)
    with pytest.raises(LoomError, match="sbatch ended with status 3"):
        render.main(["slurm", *FLAGS])


def test_help_and_dry_run_of_the_local_launcher(capsys):
    assert local.main([*FLAGS, "--processes", "3", "--devices", "2", "--dry-run"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [f"JAX_PROCESS_ID={n}" in line for n, line in enumerate(lines)] == [True] * 3
    assert all("XLA_FLAGS=--xla_force_host_platform_device_count=2" in line for line in lines)
    for main in (local.main, render.main):
        with pytest.raises(SystemExit):
            main(["--help"])
        assert "example" in capsys.readouterr().out


@pytest.mark.parametrize("accelerator", get_args(Accelerator))
def test_a_job_has_the_variables_of_its_platform_unless_others_are_given(accelerator):
    known = PLATFORM_VARIABLES[accelerator]
    tpu = {"tpu": "v5p", "topology": "2x2x1", "devices_per_node": 4} if accelerator == "tpu" else {}
    job = JobDescription(config="c.py", workdir="runs/x", accelerator=accelerator, **tpu)
    assert known.items() <= job.variables.items()
    name = list(known)[-1]
    assert dataclasses.replace(job, env={name: "other"}).variables[name] == "other"


def test_the_flags_for_gpus_are_known_to_xla():
    environ = {**os.environ, "XLA_FLAGS": PLATFORM_VARIABLES["gpu"]["XLA_FLAGS"], "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]  # XLA ends the process at a flag that it does not know


def test_an_entry_says_where_it_stands(capsys, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert entry.main(["--dry-run", "train", "--config", "c.py"]) == 0
    said = "process 5 of 6, coordinator gpu003:61809, found by slurm: loom train --config c.py"
    assert capsys.readouterr().out.strip() == said
    with pytest.raises(ConfigError, match="`loom convert` is one process .* slurm says that there are 6"):
        entry.main(["convert", "inspect", "x"])
    with pytest.raises(InputError, match="command 'rm' is not one of"):
        entry.main(["rm"])
    assert entry.main(["--help"]) == 0


WORKER = """
import json, os, signal, sys, time
from pathlib import Path
folder, number = Path(os.environ["FOLDER"]), int(os.environ["JAX_PROCESS_ID"])
attempt = len(list(folder.glob(f"{number}-*")))
(folder / f"{number}-{attempt}").touch()
print("attempt", attempt, flush=True)
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
deadline = time.time() + (60 if attempt == 0 else 0.2)
how = os.environ["HOW"]
if attempt == 0 and (number == 1 or how == "75"):
    if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if how.isdigit(): sys.exit(int(how))
while time.time() < deadline and not (stop and how != "kill"):
    time.sleep(0.05)
sys.exit(75 if stop else 0)
"""


class Workers(LocalJob):
    """A job whose processes are the script above."""

    def commands(self, port=0):
        return [(variables, [sys.executable, "-c", WORKER]) for variables, _ in super().commands(port)]


def run_workers(folder: Path, how: str, **changes: Any) -> tuple[int, list[str]]:
    lines: list[str] = []
    given = job(env={"FOLDER": str(folder), "HOW": how}, accelerator="cpu", **changes)
    status = Workers(given, 2, Patience(linger=1, kill=1), lines.append).run()
    return status, lines


def test_a_killed_process_ends_the_others_and_all_begin_again(tmp_path):
    status, lines = run_workers(tmp_path, "kill")
    assert status == 0
    assert "[launch] process 1 was killed by SIGKILL: ending the others" in lines
    again = "process 1 was killed by SIGKILL; starts again from the last checkpoint (1 failures so far)"
    assert f"[launch] {again}" in lines
    assert {"[0] attempt 0", "[0] attempt 1", "[1] attempt 1"} <= set(lines)


def test_restarts_have_an_end(tmp_path):
    with pytest.raises(LoomError, match="process 1 ended with status 1; it failed 1 times, --max-restarts=0"):
        run_workers(tmp_path, "1", max_restarts=0)


def test_bad_input_is_not_tried_again(tmp_path):
    status, lines = run_workers(tmp_path, "2")
    assert status == 2 and "[0] attempt 1" not in lines


def test_a_job_that_was_asked_to_stop_goes_on_without_a_failure(tmp_path):
    status, lines = run_workers(tmp_path, str(STOPPED), max_restarts=0)
    assert status == 0 and {"[0] attempt 1", "[1] attempt 1"} <= set(lines)


def test_a_signal_to_the_launcher_stops_all(tmp_path):
    def stop_when_begun() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_begun, daemon=True).start()
    status, lines = run_workers(tmp_path, "wait")
    assert status == 0 and not any("attempt 1" in line for line in lines)


def test_who_holds_a_job_up():
    def beat(process: int, step: int, when: float, state: Any = "running") -> Heartbeat:
        return Heartbeat(process, step, when, 9, state, "host", 1)

    beats = [beat(0, 7, 100.0), beat(1, 6, 99.0), beat(2, 7, 101.0)]
    assert silent_processes(beats, 10, now=105) == []
    assert silent_processes(beats, 10, now=111) == [beats[1]]
    together = [beat(0, 7, 100.0), beat(1, 7, 90.0)]
    assert silent_processes(together, 10, now=120) == [together[1]]
    assert silent_processes([beat(0, 9, 0.0, "finished")], 10, now=120) == []


def test_a_heartbeat_is_written_seldom_and_read_back(tmp_path):
    file = HeartbeatFile(tmp_path, 3, total_steps=9, every=60)
    file.beat(1)
    file.beat(2)
    (found,) = read_heartbeats(tmp_path)
    assert (found.process, found.step, found.total_steps, found.state, found.pid) == (3, 1, 9, "running", os.getpid())
    file.beat(4, "stopped")
    (tmp_path / "heartbeat" / "0.json").write_text("{")
    (found,) = read_heartbeats(tmp_path)
    assert (found.step, found.state) == (4, "stopped")


def test_a_process_that_hangs_is_named(tmp_path):
    code = (
        "import os, time; from pathlib import Path; from loom_jax.core import HeartbeatFile\n"
        "n = int(os.environ['JAX_PROCESS_ID'])\n"
        "HeartbeatFile(Path(os.environ['FOLDER']), n, 9).beat(5 - n); time.sleep(60)"
    )

    class Hanging(LocalJob):
        def commands(self, port=0):
            return [(variables, [sys.executable, "-c", code]) for variables, _ in super().commands(port)]

    given = job(workdir=str(tmp_path), env={"FOLDER": str(tmp_path)}, accelerator="cpu", max_restarts=0)
    with pytest.raises(LoomError, match="process 1 hangs after step 4: no step for 1.5 s"):
        Hanging(given, 2, Patience(kill=1, hang=1.5), [].append).run()
