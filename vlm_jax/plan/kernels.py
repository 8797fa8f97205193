"""FLOPs of the Pallas kernels that the models use. The compiler knows nothing of what a kernel computes: a kernel that
is not in this table is an error for whoever counts.
"""

import re
from collections.abc import Sequence

from vlm_jax.plan.hlo import Array, HloError, Instruction

# Products over [queries, keys, head dim] of the splash attention kernels of JAX: scores and weighted sum; scores again,
# the weights' gradient and the queries'; scores again, the weights' gradient, the values' and the keys'.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)(?:_|\b|\.)")


def kernel_flops(kernel: Instruction, operands: Sequence[Array]) -> int:
    """FLOPs of one run of a `tpu_custom_call` on one device.

    Attention counts in full, also where a causal mask lets the kernel leave blocks out: model FLOPs do the same.

    Args:
        kernel: the custom call.
        operands: what it reads.

    Raises:
        HloError: the kernel is unknown.
    """
    found = _SPLASH.search(kernel.name) or _SPLASH.search(kernel.operation)
    if found is None:
        raise HloError(
            f"the Pallas kernel {kernel.name} ({kernel.operation}) is not in plan/kernels.py, so its FLOPs are "
            "unknown; add it there"
        )
    # q, k and v are the first three operands of floating point: [..., heads, length, head dim], heads merged or not.
    q, k = [array for array in operands if array.dtype in ("bf16", "f16", "f32") and len(array.dims) >= 3][:2]
    if q.dims[-1] != k.dims[-1]:
        raise HloError(f"the operands {q} and {k} of the kernel {kernel.name} are not queries and keys")
    leading = 1
    for size in q.dims[:-2]:
        leading *= size
    return 2 * _SPLASH_PRODUCTS[found[1]] * leading * q.dims[-2] * k.dims[-2] * q.dims[-1]
