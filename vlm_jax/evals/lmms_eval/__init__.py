"""Checkpoints as models of lmms-eval, EvolvingLMMs-Lab's harness: `python -m lmms_eval --model vlm_jax ...`.

Its newer versions find `manifest` by the entry point `lmms_eval.models` of this package, once that is installed; older
ones, with LMMS_EVAL_PLUGINS=vlm_jax.evals.lmms_eval, the table in `models`.
"""

from typing import Any


def manifest() -> Any:
    """What lmms-eval's registry of models wants to know."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest("vlm_jax", simple_class_path="vlm_jax.evals.lmms_eval.models.vlm_jax.VlmJax")


__all__ = ["manifest"]
