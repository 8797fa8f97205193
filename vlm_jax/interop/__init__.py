"""Import and export of public weights. One file per family of models; `files` reads and writes what they come in.

`python -m vlm_jax.interop import|export` is the command line.
"""
