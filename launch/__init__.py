"""How a job starts: one description, rendered for SLURM, GKE, xpk, TPU machines, Open MPI, or run on this machine."""

from loom_jax.launch.job import (
    COMMANDS,
    PLATFORM_VARIABLES,
    SHARED,
    TPU_SELECTORS,
    Accelerator,
    JobDescription,
)
from loom_jax.launch.processes import LocalJob, Patience
from loom_jax.launch.scripts import KINDS, Kind, render_job

__all__ = [
    "COMMANDS",
    "KINDS",
    "PLATFORM_VARIABLES",
    "SHARED",
    "TPU_SELECTORS",
    "Accelerator",
    "JobDescription",
    "Kind",
    "LocalJob",
    "Patience",
    "render_job",
]
