"""Networks as pure functions: towers and the parts they share. No losses, no meshes, no training here."""
