"""What XLA_FLAGS is in tests, which compile far more than they compute."""

QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",  # as many parts as there are threads serve one process, not two workers
)


def xla_flags(devices: int = 1) -> str:
    """Returns flags for so many CPU devices, and for programs that are compiled quickly and run slower."""
    return " ".join((f"--xla_force_host_platform_device_count={devices}", *QUICK))
