"""The models of this package by the names of their modules, as older versions of lmms-eval look for them."""

AVAILABLE_MODELS = {"vlm_jax": "VlmJax"}
