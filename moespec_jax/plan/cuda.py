"""Ahead-of-time compilation for NVIDIA GPUs on a machine without them: `pip install "jax[cuda12]"`.

Importing this module configures JAX: programs are compiled for described GPUs, and run on none. No device also means
no autotuning: tile sizes, and Triton against cuBLAS, are the compiler's defaults.
"""

import importlib.metadata
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from jax.experimental import topologies

# JAX ignores the environment variable if it was imported before this module.
jax.config.update("jax_platforms", "cpu")
# Programs for absent devices can be written to the compilation cache, but not read back.
jax.config.update("jax_enable_compilation_cache", False)

# What Pallas goes by, which from jax 0.12 on lowers for a GPU that it knows or not at all.
KINDS = {"sm_80": "NVIDIA A100", "sm_89": "NVIDIA L40", "sm_90": "NVIDIA H100"}
# Distributions with the CUDA compiler.
PLUGINS = ("jax-cuda12-pjrt", "jax-cuda13-pjrt")

# An A100 of 80 GB, an L40S, an H100 SXM: what the compiler's cost model asks of a GPU.
GPUS = {
    "sm_80": """cuda_compute_capability { major: 8 } core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41
        memory_bandwidth: 2039000000000 l2_cache_size: 41943040 device_memory_size: 84942979072
        threads_per_core_limit: 2048 shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912""",
    "sm_89": """cuda_compute_capability { major: 8 minor: 9 } core_count: 142 fpus_per_core: 128 clock_rate_ghz: 2.52
        memory_bandwidth: 864000000000 l2_cache_size: 100663296 device_memory_size: 47810871296
        threads_per_core_limit: 1536 shared_memory_per_core: 102400 shared_memory_per_block_optin: 101376""",
    "sm_90": """cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES } core_count: 132
        fpus_per_core: 128 clock_rate_ghz: 1.98 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
        device_memory_size: 84942979072 threads_per_core_limit: 2048 shared_memory_per_core: 233472
        shared_memory_per_block_optin: 232448""",
}
_TARGET = """platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}"
gpu_device_info {{ name: "{name}" threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
    block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
    thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
    registers_per_core_limit: 65536 registers_per_block_limit: 65536 {of_its_own} }}"""


def described_devices(gpu: str, count: int = 1) -> Sequence[Any]:
    """List `count` GPUs as `GPUS` describes them, to compile for."""
    target = _TARGET.format(name=gpu, of_its_own=GPUS[gpu])
    return topologies.get_topology_desc(gpu, platform="cuda", topology=f"1x{count}x1", target_config=target).devices


def lowering_for(gpu: str) -> AbstractContextManager[object]:
    """Make the context in which Pallas lowers kernels for such a GPU."""
    device = jax.sharding.AbstractDevice(device_kind=KINDS[gpu], num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def installed_versions() -> dict[str, str]:
    """Versions of JAX and of the CUDA compiler, as far as they are installed."""
    found = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {name: found[name] for name in ("jax", "jaxlib", *PLUGINS) if name in found}
