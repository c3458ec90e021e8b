"""What the environment of a process says about its job: SLURM, Open MPI, Kubernetes, TPU pods, JAX_ variables."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from loom_jax.core import ConfigError

FIRST_PORT, PORTS = 61440, 4096
"""Range of the coordinator's port where nobody chooses one: above those that systems give out by themselves."""

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
AUTO = "auto"
"""Given as the coordinator: the metadata of a Cloud TPU machine are to be asked."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands in its job; what is None is not known from there.

    Attributes:
      found_by: flags, environment, slurm, openmpi, kubernetes or tpu.
      coordinator: `host:port` of process 0.
      count: processes of the job.
      number: of this one.
      local_devices: those of the accelerators of this machine that are its own; None for all that it sees.
    """

    found_by: str
    coordinator: str | None = None
    count: int | None = None
    number: int | None = None
    local_devices: tuple[int, ...] | None = None


def find_place(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    count: int | None = None,
    number: int | None = None,
) -> Place | None:
    """Returns the place of this process in a job of several; None where it is alone.

    Each of the three comes from the arguments, else from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID,
    else from the scheduler. A place found by `tpu` has none of them: jax asks the machine itself.

    Args:
      environ: variables of the process.
      coordinator: `host:port`, or `auto` on a Cloud TPU machine.

    Raises:
      ConfigError: only some of the three are known, or one is no number.
    """
    given = coordinator is not None or count is not None or number is not None
    if coordinator == AUTO:
        return Place("tpu")
    address = coordinator or environ.get(ADDRESS)
    count = count if count is not None else _number(environ, COUNT)
    number = number if number is not None else _number(environ, NUMBER)
    scheduler = _openmpi(environ) or _slurm(environ) or _kubernetes(environ) or Place("none")
    if (address, count, number) == (None, None, None) and scheduler.found_by != "openmpi" and _tpu_pod(environ):
        return Place("tpu")
    by_hand = "flags" if given else "environment"
    place = Place(
        by_hand if scheduler.found_by == "none" else scheduler.found_by,
        address or scheduler.coordinator,
        count if count is not None else scheduler.count,
        number if number is not None else scheduler.number,
        scheduler.local_devices,
    )
    return _complete(place)


def _complete(place: Place) -> Place | None:
    """Returns a place of which all is known, or None where nothing says that there are several processes."""
    known = {ADDRESS: place.coordinator, COUNT: place.count, NUMBER: place.number}
    missing = [name for name, value in known.items() if value is None]
    if place.count == 1 or len(missing) == len(known):
        return None
    if missing:
        held = ", ".join(name for name in known if name not in missing)
        raise ConfigError(
            f"{held} given without {', '.join(missing)} (found by: {place.found_by}): a job of several processes needs "
            "all three; give --coordinator, --num-processes and --process-id, or start it by loom_jax.launch"
        )
    return place


def _openmpi(environ: Mapping[str, str]) -> Place | None:
    """mpirun of Open MPI. It comes before SLURM, whose variables are those of mpirun's own daemon."""
    count = _number(environ, "OMPI_COMM_WORLD_SIZE")
    if count is None or count == 1:
        return None
    local = _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK") or 0
    here = _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE") or 1
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    host = re.search(r"tcp://([^,:]+)", uri)
    job = int(re.sub(r"\D", "", uri.split(".")[0]) or 0) >> 12
    address = f"{host[1]}:{_port(job)}" if host else None
    if address is None and here == count:
        address = f"localhost:{_port(sum(environ.get('PMIX_NAMESPACE', '').encode()))}"
    return Place("openmpi", address, count, _number(environ, "OMPI_COMM_WORLD_RANK"), _own(environ, local, here))


def _slurm(environ: Mapping[str, str]) -> Place | None:
    """A task of a job step, as srun starts it; the batch script itself is none."""
    count = _number(environ, "SLURM_STEP_NUM_TASKS")
    if count is None or count == 1:
        return None
    # A requeued job keeps its number, and the port of the run before may still be closing.
    job = (_number(environ, "SLURM_JOB_ID") or 0) + (_number(environ, "SLURM_RESTART_COUNT") or 0)
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    address = f"{first_host(nodes)}:{_port(job)}" if nodes else None
    here = _tasks_here(environ, count)
    local = _number(environ, "SLURM_LOCALID") or 0
    return Place("slurm", address, count, _number(environ, "SLURM_PROCID"), _own(environ, local, here))


def _tasks_here(environ: Mapping[str, str], count: int) -> int:
    """Tasks of the step on this node, from a list such as `2(x3),1`."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    per_node = [
        int(tasks) for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))
    ]
    node = _number(environ, "SLURM_NODEID") or 0
    return per_node[node] if node < len(per_node) else count


def first_host(nodes: str) -> str:
    """Returns the first name of a SLURM list of nodes, such as `tpu[003-010,12],login`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise ConfigError(f"SLURM_STEP_NODELIST={nodes!r} names no node")
    return "".join(part or "" for part in match.groups())


def _kubernetes(environ: Mapping[str, str]) -> Place | None:
    """A pod of an indexed Job; the other two come from the manifest that this framework renders."""
    number = _number(environ, "JOB_COMPLETION_INDEX")
    return None if number is None or COUNT not in environ else Place("kubernetes", number=number)


def _tpu_pod(environ: Mapping[str, str]) -> bool:
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES", "")
    return len(hosts.split(",")) > 1 or (_number(environ, "MEGASCALE_NUM_SLICES") or 1) > 1


def _own(environ: Mapping[str, str], local: int, here: int) -> tuple[int, ...] | None:
    """Accelerators of one of several tasks of a machine: its part of those that CUDA shows, by default one."""
    if here == 1:
        return None
    shown = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if len(shown) == 1:
        return None  # the scheduler has already given each task its own
    share = max(1, len(shown) // here)
    return tuple(range(local * share, (local + 1) * share))


def _port(job: int) -> int:
    return FIRST_PORT + job % PORTS


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is None or text == "":
        return None
    if not text.isdigit():
        raise ConfigError(f"{name}={text!r} in the environment is no number")
    return int(text)
