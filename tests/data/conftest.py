"""Parity of the tokenizer needs the public implementation, which the project itself never imports."""

import importlib.util

REFERENCES = ("ftfy", "open_clip", "regex", "torch")
collect_ignore = [] if all(map(importlib.util.find_spec, REFERENCES)) else ["test_clip_bpe_parity.py"]
