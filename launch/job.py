"""The one description of a job, from which every script and manifest is rendered."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from loom_jax.core import ConfigError

Command = Literal["train", "generate", "convert", "evaluate"]
Accelerator = Literal["cpu", "gpu", "tpu"]

COMMANDS: tuple[str, ...] = ("train", "generate", "convert", "evaluate")
SHARED: tuple[tuple[str, ...], ...] = (("train",), ("convert", "to-orbax"))
"""First words of what several processes work on together; all else is one process on the devices of one machine."""

TPU_SELECTORS: Mapping[str, tuple[str, int]] = {
    "v4": ("tpu-v4-podslice", 4),
    "v5e": ("tpu-v5-lite-podslice", 4),
    "v5p": ("tpu-v5p-slice", 4),
    "v6e": ("tpu-v6e-slice", 4),
}
"""TPU generation -> GKE's label of its nodes, and chips of one machine of a slice of several."""

PLATFORM_VARIABLES: Mapping[Accelerator, Mapping[str, str]] = {
    "cpu": {
        "JAX_PLATFORMS": "cpu",
        # A step allocates hundreds of megabytes anew: in pages of 2 MiB the kernel is asked far less often.
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    },
    "gpu": {
        "XLA_FLAGS": " ".join(
            (
                # Gathers of the next layer's weights, and scatters of the last one's gradients, run beside compute ...
                "--xla_gpu_enable_latency_hiding_scheduler=true",
                # ... also across the turns of the scan over layers.
                "--xla_gpu_enable_pipelined_all_gather=true",
                "--xla_gpu_enable_pipelined_reduce_scatter=true",
                "--xla_gpu_enable_pipelined_all_reduce=true",
                "--xla_gpu_enable_while_loop_double_buffering=true",
                # The tensors of one layer travel together (bytes).
                "--xla_gpu_all_gather_combine_threshold_bytes=134217728",
                "--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728",
                "--xla_gpu_all_reduce_combine_threshold_bytes=134217728",
                # cuBLAS for every product: docs/performance.md was measured so, and a start takes a minute.
                "--xla_gpu_enable_triton_gemm=false",
            )
        ),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
    },
    "tpu": {
        "LIBTPU_INIT_ARGS": " ".join(
            (
                # Gathers and scatters are fused with the products beside them, over several of these.
                "--xla_enable_async_all_gather=true",
                "--xla_tpu_enable_async_collective_fusion=true",
                "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
                "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
                "--xla_tpu_overlap_compute_collective_tc=true",
            )
        ),
    },
}
"""What the compiler and the allocator of each platform are told by every job; `--env` goes before it.

The flags are those that public training frameworks recommend for sharded weights. Their names are known to the XLA of
jaxlib 0.10.2 and to libtpu 0.0.52; what they gain was not measured, for want of the devices."""


def is_shared(command: str, arguments: Sequence[str]) -> bool:
    """Whether several processes may work on a command of `loom` together."""
    words = (command, *arguments)
    return any(words[: len(first)] == first for first in SHARED)


@dataclasses.dataclass(frozen=True)
class JobDescription:
    """What runs, where, and what happens when it ends.

    Attributes:
      name: letters, digits and hyphens.
      command: of `loom`.
      config: recipe; for train.
      workdir: folder of the run, seen by all machines.
      overrides: `KEY=VALUE`, for keys of the recipe.
      arguments: any others of the command.
      nodes: machines; of TPU slices, machines of one slice.
      tasks_per_node: processes on each.
      accelerator: what the devices are.
      devices_per_node: GPUs or TPU chips of each machine, or CPU devices to be simulated by each process.
      tpu: generation, a key of TPU_SELECTORS.
      topology: of a TPU slice, such as 4x4x4.
      slices: TPU slices.
      cpus_per_task: processor cores of each process.
      memory: of each node, as SLURM and Kubernetes write it without a unit of their own: 64G.
      time_limit: HH:MM:SS.
      grace_seconds: how long before the time limit, or after a notice, the job may still save.
      requeue: whether a job that was taken off its machines is run again.
      max_restarts: how often a job that failed is run again.
      image: container image.
      env: variables of every process.
      python: interpreter in which loom_jax is installed.
      partition, account: of SLURM.
      cluster, project, zone: of Google Cloud.
      port: of the coordinator, where machines have addresses of their own.
    """

    name: str = "loom"
    command: Command = "train"
    config: str | None = None
    workdir: str | None = None
    overrides: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    nodes: int = 1
    tasks_per_node: int = 1
    accelerator: Accelerator = "gpu"
    devices_per_node: int = 0
    tpu: str | None = None
    topology: str | None = None
    slices: int = 1
    cpus_per_task: int = 0
    memory: str | None = None
    time_limit: str = "24:00:00"
    grace_seconds: int = 180
    requeue: bool = True
    max_restarts: int = 3
    image: str | None = None
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    python: str = "python"
    partition: str | None = None
    account: str | None = None
    cluster: str | None = None
    project: str | None = None
    zone: str | None = None
    port: int = 8476

    def __post_init__(self) -> None:
        for wrong in (self._wrong_names(), self._wrong_numbers(), self._wrong_machines()):
            if wrong is not None:
                raise ConfigError(wrong)

    def _wrong_names(self) -> str | None:
        if self.command not in COMMANDS:
            return f"command {self.command!r} is not one of {', '.join(COMMANDS)}"
        if self.command == "train" and not (self.config and self.workdir):
            return "a training job needs --config FILE and --workdir DIR"
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.name):
            return f"name {self.name!r}: expected at most 40 small letters, digits and hyphens, a letter first"
        bad = [name for name in self.env if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)]
        return f"env {bad[0]!r} is no name of a variable" if bad else None

    def _wrong_numbers(self) -> str | None:
        for name in ("nodes", "tasks_per_node", "slices"):
            if getattr(self, name) < 1:
                return f"{name}={getattr(self, name)}: must be at least 1"
        for name in ("devices_per_node", "max_restarts", "grace_seconds", "cpus_per_task"):
            if getattr(self, name) < 0:
                return f"{name}={getattr(self, name)}: must be at least 0"
        if not re.fullmatch(r"\d+:[0-5]\d:[0-5]\d", self.time_limit):
            return f"time_limit={self.time_limit!r}: expected HH:MM:SS"
        if self.seconds <= self.grace_seconds:
            return f"time_limit={self.time_limit} is no longer than grace_seconds={self.grace_seconds}"
        return None

    def _wrong_machines(self) -> str | None:
        if self.processes > 1 and not self.shared:
            return (
                f"`loom {self.command}` is one process on the devices of one machine, not {self.processes}: give one "
                "node and one task (`loom convert to-orbax` may be several)"
            )
        if self.accelerator != "tpu":
            return None
        if self.tpu not in TPU_SELECTORS:
            return f"tpu={self.tpu!r} is not one of {', '.join(TPU_SELECTORS)}"
        if self.topology is None or not re.fullmatch(r"\d+x\d+(x\d+)?", self.topology):
            return f"topology={self.topology!r}: expected such as 4x4x4"
        if self.chips != self.nodes * self.chips_per_node:
            return (
                f"topology {self.topology} has {self.chips} chips, but nodes={self.nodes} of {self.chips_per_node} "
                f"make {self.nodes * self.chips_per_node}: give nodes={max(1, self.chips // self.chips_per_node)}"
            )
        return None

    @property
    def processes(self) -> int:
        """Of the whole job."""
        return self.slices * self.nodes * self.tasks_per_node

    @property
    def seconds(self) -> int:
        """The time limit."""
        hours, minutes, seconds = map(int, self.time_limit.split(":"))
        return 3600 * hours + 60 * minutes + seconds

    @property
    def chips(self) -> int:
        """TPU chips of a slice."""
        return math.prod(map(int, (self.topology or "0").split("x")))

    @property
    def chips_per_node(self) -> int:
        """TPU chips of one machine."""
        return self.devices_per_node or TPU_SELECTORS[self.tpu or "v5p"][1]

    @property
    def tpu_selector(self) -> str:
        """GKE's label of the machines."""
        return TPU_SELECTORS[self.tpu or ""][0]

    @property
    def tpu_type(self) -> str:
        """Google Cloud's name of the slice, such as v5p-64: v4 and v5p are counted in cores, two to a chip."""
        name = {"v5e": "v5litepod"}.get(self.tpu or "", self.tpu)
        return f"{name}-{self.chips * (2 if self.tpu in ('v4', 'v5p') else 1)}"

    @property
    def shared(self) -> bool:
        """Whether several processes may work on it together."""
        return is_shared(self.command, self.arguments)

    @property
    def restartable(self) -> bool:
        """Whether the same command goes on where it stopped."""
        return self.command == "train"

    @property
    def words(self) -> list[str]:
        """The command of each process, word by word."""
        words = [self.python, "-m", "loom_jax.launch.entry", self.command]
        if self.config:
            words += ["--config", self.config]
        if self.workdir:
            words += ["--workdir" if self.command == "train" else "--out", self.workdir]
        return [*words, *(f"--config.{override}" for override in self.overrides), *self.arguments]

    @property
    def variables(self) -> dict[str, str]:
        """Variables of every process: what its platform needs, and `env`, which goes before that."""
        devices = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={max(1, self.devices_per_node)}"}
        simulated = devices if self.accelerator == "cpu" else {}
        return {**PLATFORM_VARIABLES[self.accelerator], **simulated, "PYTHONUNBUFFERED": "1", **self.env}
