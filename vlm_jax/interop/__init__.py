"""Import and export of public weights: one file per format, all of them listed in `registry`.

`python -m vlm_jax.interop import|export` is the command line.
"""
