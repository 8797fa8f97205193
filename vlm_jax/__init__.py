"""Pre-training of vision and vision-language models in JAX and Flax. `vlm_jax.load(path)` gives a trained model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_jax.loading import load

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Imported on first use: data worker processes import this package and must not pay for JAX.
    if name == "load":
        from vlm_jax.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
