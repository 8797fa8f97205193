"""Every test runs on 8 virtual CPU devices and one thread pool; JAX must hear of it before anything uses a device."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax

jax.config.update("jax_num_cpu_devices", 8)
# A silent broadcast of [B] against [B, 1] is the classic wrong loss: make it an error in every test.
jax.config.update("jax_numpy_rank_promotion", "raise")
