"""The place of a benchmark's report in its page."""

from pathlib import Path

from vlm_jax.schema import ConfigError


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    """Puts a text between the marks of a page; raises `ConfigError` where they are lost."""
    before, begun, rest = page.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not begun or not ended:
        raise ConfigError(f"{page} has lost its marks {begin} and {end}; put them where the report shall stand")
    page.write_text("\n\n".join([before + begin, text, end + after]))


__all__ = ["write_between"]
