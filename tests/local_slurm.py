"""A SLURM of one node on this machine, for tests: munged, slurmctld and slurmd with everything in one folder."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
SYSTEM = "/usr/local/sbin:/usr/sbin:/sbin"
NODE = "localhost"
"""Its name must lead to this machine, as that of any node of a cluster does."""

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A job that is requeued waits until its old credentials have expired: by default two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobRequeue=1
ReturnToService=2
KillWait=10
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,requeue_delay=1
NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={node} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Says what a local SLURM lacks on this machine, if anything."""
    absent = [name for name in (*DAEMONS, "sbatch", "srun") if find(name) is None]
    if absent:
        return f"no {', '.join(absent)} on this machine: apt-get install slurm-wlm munge"
    return None if os.getuid() == 0 else "slurmd starts jobs as root alone"


def find(program: str) -> str | None:
    """Returns where a program lies; daemons are in folders that PATH often leaves out."""
    return shutil.which(program, path=f"{os.environ['PATH']}:{SYSTEM}")


class Slurm:
    """Talks to the local SLURM."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def __call__(self, *command: str) -> str:
        """Runs a client command and returns what it printed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """Returns the fields of a job."""
        return dict(pair.split("=", 1) for pair in self("scontrol", "show", "job", number).split() if "=" in pair)

    def logs(self) -> str:
        """Returns the ends of the logs of the daemons."""
        return "".join(f"\n--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))


@contextlib.contextmanager
def local_slurm(folder: Path) -> Iterator[Slurm]:
    """Starts the daemons, yields when the node is up, and ends them."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    sockets = [socket.socket() for _ in range(2)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    settings = {"host": socket.gethostname(), "ports": ports, "folder": folder, "node": NODE, "user": "root"}
    (folder / "slurm.conf").write_text(CONFIG.format(**settings))
    slurm = Slurm(folder)
    munge = ["--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munge += [f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"]
    commands = {"munged": munge, "slurmctld": ["-D"], "slurmd": ["-D", "-N", NODE]}
    with contextlib.ExitStack() as stack:
        for name in DAEMONS:
            daemon = subprocess.Popen(
                [str(find(name)), *commands[name]],
                env=slurm.environment,
                stdout=(folder / f"{name}.out.log").open("w"),
                stderr=subprocess.STDOUT,
            )
            stack.callback(_end, daemon)
            time.sleep(1)
        deadline = time.monotonic() + 60
        while "idle" not in slurm("sinfo", "--noheader", "--format=%T"):
            assert time.monotonic() < deadline, f"the node did not come up{slurm.logs()}"
            time.sleep(0.5)
        yield slurm


def _end(daemon: "subprocess.Popen[bytes]") -> None:
    daemon.terminate()
    try:
        daemon.wait(timeout=15)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
