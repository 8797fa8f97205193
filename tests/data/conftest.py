"""Parity of the tokenizers needs the public implementations, which the project itself never imports."""

import importlib.util

REFERENCES = {
    "test_clip_bpe_parity.py": ("ftfy", "open_clip", "regex", "torch"),
    "test_hf_tokenizer_parity.py": ("transformers",),
}
collect_ignore = [name for name, needs in REFERENCES.items() if not all(map(importlib.util.find_spec, needs))]
