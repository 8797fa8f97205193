"""What sources have in common whose records are named values: which of them are the image, the captions, the class."""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator

from vlm_jax.data.sources.base import SourceConfig
from vlm_jax.data.sources.texts import CaptionKeys
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class KeyedConfig(SourceConfig):
    """Records of named values: columns of a table, keys of an object, features of an example."""

    # the file, files or folder
    path: str = ""
    # name of the image, or of its file
    image_key: str = "image"
    # names of the captions, whose values may be lists of captions; empty: none are read
    text_key: tuple[str, ...] = ("caption",)
    # how often the captions of each name are trained on; empty: every caption is as likely as every other
    text_probabilities: tuple[float, ...] = ()
    # name of the class; empty: none is read
    label_key: str = ""
    # names of the classes in the order of their numbers; empty: what the data say of them
    class_names: tuple[str, ...] = ()

    def problems(self) -> Iterator[tuple[str, str]]:
        """Names that can't all be read."""
        if self.image_key in self.text_key:
            yield "text_key", f"= {self.text_key!r} holds image_key too; give the name of the captions"
        if len(set(self.class_names)) != len(self.class_names):
            yield "class_names", "names a class twice"
        yield from self.caption_keys().problems()

    def caption_keys(self) -> CaptionKeys:
        """Which values are captions."""
        return CaptionKeys(self.text_key, self.text_probabilities, "text_key")

    def wanted_keys(self) -> list[tuple[str, str]]:
        """(field of this config, name) of every value that is read."""
        label = [("label_key", self.label_key)] if self.label_key else []
        return [("image_key", self.image_key), *(("text_key", name) for name in self.text_key), *label]

    def check_keys(self, found: Iterable[str], where: str, kind: str) -> None:
        """Raises `ConfigError` when a name is not among those found; lists them, and the nearest."""
        found = list(found)
        for field, name in self.wanted_keys():
            if name not in found:
                near = difflib.get_close_matches(name, found, n=1, cutoff=0.3)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                if field == "text_key":
                    hint += "; for images without captions set config.data.source.text_key=()"
                raise ConfigError(
                    f"{where} has no {kind} {name!r} (config.data.source.{field}); "
                    f"it has: {', '.join(found) or '(none)'}{hint}"
                )
