"""How a job starts: one description, rendered for SLURM, GKE, xpk, TPU machines, Open MPI, or run on this machine."""

from loom_jax.launch.job import COMMANDS, SHARED, STOPPED, TPU_SELECTORS, JobDescription
from loom_jax.launch.processes import LocalJob, Patience
from loom_jax.launch.scripts import KINDS, Kind, render_job

__all__ = [
    "COMMANDS",
    "KINDS",
    "SHARED",
    "STOPPED",
    "TPU_SELECTORS",
    "JobDescription",
    "Kind",
    "LocalJob",
    "Patience",
    "render_job",
]
