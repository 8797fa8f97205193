"""Plans of runs on TPUs that one does not have: `python -m vlm_jax.plan`.

The compiler for TPUs compiles the step that training would run, on any machine, and its program tells memory, FLOPs
and communication. Measuring time takes the chips; nothing here does. (Nothing is imported here: the command sets the
environment before JAX is loaded.)
"""
