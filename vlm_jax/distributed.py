"""Starting several processes as one job. On one process it does nothing."""

import os

import jax

from vlm_jax import platforms
from vlm_jax.schema import ConfigError

# Set on the hosts of a TPU slice by GKE, by Slurm and by Open MPI: JAX finds everything else by itself there. The hosts
# of TPU VMs learn of each other from a metadata server and not from the environment.
_CLUSTER = {
    "TPU_WORKER_HOSTNAMES": lambda value: "," in value,
    "MEGASCALE_COORDINATOR_ADDRESS": bool,
    "SLURM_NTASKS": lambda value: value.isdecimal() and int(value) > 1,
    "OMPI_COMM_WORLD_SIZE": lambda value: value.isdecimal() and int(value) > 1,
}
# A process that dies is noticed by the others within this time (JAX's default is 100 s).
_HEARTBEAT_SECONDS = 60


def start(flag: str) -> None:
    """Joins this process to its job; call it before anything touches a device.

    Args:
        flag: "auto" joins when the environment speaks of several hosts, and on TPU VMs; "on" always lets JAX find the
            job; "off" never joins; "HOST:PORT,COUNT,INDEX" names coordinator, number of processes and this one's index.

    Raises:
        ConfigError: a flag that is none of these.
    """
    virtual_devices = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if virtual_devices or jax.config.jax_num_cpu_devices > 1:  # pyright: ignore[reportAttributeAccessIssue]
        # A virtual device that waits in a collective holds a thread of XLA's pools: with as many threads as cores, or
        # two steps in flight, devices wait for each other for ever. NPROC is XLA's size of these pools.
        os.environ.setdefault("NPROC", "64")
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    several_hosts = any(test(os.environ.get(name, "")) for name, test in _CLUSTER.items())
    if flag == "off" or (flag == "auto" and not (several_hosts or platforms.has_tpu())):
        return
    if flag in ("auto", "on"):
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
        except ValueError:
            # JAX found no job to join; a TPU host without a metadata server is one, an explicit wish is an error.
            if flag == "on" or several_hosts:
                raise
        return
    fields = flag.split(",")
    if len(fields) != 3 or ":" not in fields[0] or not (fields[1].isdecimal() and fields[2].isdecimal()):
        raise ConfigError(
            f"--distributed={flag} must be auto, on, off, or HOST:PORT,COUNT,INDEX such as 10.0.0.1:8476,4,0"
        )
    count, index = int(fields[1]), int(fields[2])
    if not index < count:
        raise ConfigError(f"--distributed={flag}: the index {index} must be below the number of processes {count}")
    jax.distributed.initialize(fields[0], count, index, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
