"""Live parity needs torch; without it the goldens in tests/golden hold the same numbers."""

import importlib.util

_NEED_TORCH = (
    "test_clip_parity.py",
    "test_coca_parity.py",
    "test_decoder_parity.py",
    "test_presets_parity.py",
    "test_resnet_parity.py",
    "test_exports_load.py",
    "test_siglip_loss_parity.py",
    "test_vision_language_parity.py",
)
collect_ignore = [] if importlib.util.find_spec("torch") else list(_NEED_TORCH)
