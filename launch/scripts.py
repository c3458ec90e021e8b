"""From the description of a job to the script or manifest that starts it: one template for each kind."""

from __future__ import annotations

import dataclasses
import json
import shlex

import jinja2

from loom_jax.core import STOPPED, ConfigError
from loom_jax.launch.job import JobDescription


@dataclasses.dataclass(frozen=True)
class Kind:
    """A way to start a job on machines.

    Attributes:
      template: file in templates/.
      submit: the command that takes the rendered file as its last word.
    """

    template: str
    submit: tuple[str, ...]


KINDS = {
    "slurm": Kind("slurm.sbatch.j2", ("sbatch",)),
    "jobset": Kind("jobset.yaml.j2", ("kubectl", "apply", "-f")),
    "xpk": Kind("xpk.sh.j2", ("bash",)),
    "tpu-vm": Kind("tpu_vm.sh.j2", ("bash",)),
    "openmpi": Kind("openmpi.sh.j2", ("bash",)),
}


def render_job(
    kind: str, job: JobDescription, gpu_type: str | None = None, claims: dict[str, str] | None = None
) -> str:
    """Returns the script or manifest of a job.

    Args:
      kind: a key of KINDS.
      gpu_type: GKE's label of the GPUs, such as nvidia-h100-80gb; for jobset.
      claims: persistent volume claim -> where pods see it; for jobset.

    Raises:
      ConfigError: the kind is not known, or the job lacks what this kind needs.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    _check(kind, job)
    if kind == "tpu-vm" and job.shared:
        job = dataclasses.replace(job, arguments=(*job.arguments, "--coordinator", "auto"))
    text = (
        _environment()
        .get_template(KINDS[kind].template)
        .render(
            job=job,
            stopped=STOPPED,
            role="workers",
            pods=job.nodes * job.tasks_per_node,
            limits=_limits(job),
            gpu_type=gpu_type,
            mounts=claims or {},
        )
    )
    return text.rstrip() + "\n"


def _check(kind: str, job: JobDescription) -> None:
    needed = {"jobset": ("image",), "xpk": ("image", "cluster")}.get(kind, ())
    for name in needed:
        if getattr(job, name) is None:
            raise ConfigError(f"{kind} needs --{name}")
    if (kind in ("xpk", "tpu-vm")) and job.accelerator != "tpu":
        raise ConfigError(f"{kind} is for TPUs: give --accelerator tpu, --tpu and --topology")
    if kind in ("slurm", "openmpi") and job.accelerator == "tpu":
        raise ConfigError(f"{kind} starts jobs on GPUs and CPUs: for TPUs take jobset, xpk or tpu-vm")
    if kind == "tpu-vm" and job.slices > 1:
        raise ConfigError(f"slices={job.slices}: tpu-vm starts jobs on one slice; for several take jobset or xpk")


def _limits(job: JobDescription) -> dict[str, str]:
    """What a pod asks of its node."""
    limits = {}
    if job.accelerator == "tpu":
        limits["google.com/tpu"] = str(job.chips_per_node)
    if job.accelerator == "gpu" and job.devices_per_node:
        limits["nvidia.com/gpu"] = str(job.devices_per_node // job.tasks_per_node)
    if job.cpus_per_task:
        limits["cpu"] = str(job.cpus_per_task)
    if job.memory:
        limits["memory"] = job.memory
    return limits


def _environment() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("loom_jax.launch"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # shell and YAML: what comes from outside is quoted by the filters
    )
    found.filters["quote"] = lambda text: shlex.quote(str(text))
    found.filters["shell"] = shlex.join
    found.filters["tojson"] = json.dumps
    found.filters["assignments"] = lambda pairs: shlex.join(f"{name}={value}" for name, value in pairs.items())
    return found
