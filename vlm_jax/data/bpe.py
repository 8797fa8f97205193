"""The byte-pair encoding of CLIP, from a merges file. No regex package, no ftfy, no network.

Differs from the public implementations in one respect, on purpose: text that spells a special token
(`<|endoftext|>`) is encoded as ordinary characters and can never produce that token.
"""

import functools
import gzip
import html
import importlib.util
import os
import re
import unicodedata
from collections.abc import Sequence

from vlm_jax.schema import ConfigError

MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
MAX_MERGES = 48894  # of the 262,145 in the public file CLIP uses the first: 49408 - 512 - 2
_CACHE_WORDS = 1 << 16
_END_OF_WORD = "</w>"


@functools.cache
def byte_symbols() -> dict[int, str]:
    """Byte -> the printable character that stands for it in merges files, in vocabulary order (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


class _CharacterClasses(dict[int, str]):
    """Code point -> one letter for its class, filled on demand: L letter, N number, W space, O other.

    The apostrophe and the letters of the contractions ('s 't 're 've 'm 'll 'd, in any case) stand for themselves.
    """

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)[0]
        folded = "s" if character == "ſ" else character.lower()  # the long s equals s when case is ignored
        if character == "'":
            result = "'"
        elif folded in set("strevmld"):
            result = folded
        elif category in "LN":
            result = category
        else:
            result = "W" if character.isspace() else "O"
        self[code] = result
        return result


_CLASSES = _CharacterClasses()
_PIECES = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[Lstrevmld]+|N|[O']+")


def split_pieces(text: str) -> list[str]:
    """Contractions, runs of letters, single numbers, runs of anything else; space separates and is dropped."""
    classes = text.translate(_CLASSES)
    return [text[match.start() : match.end()] for match in _PIECES.finditer(classes)]


class ClipBpe:
    """Encoder of the OpenAI CLIP tokenizer, without context length or padding.

    The vocabulary is 256 byte symbols, 256 byte symbols that end a word, one entry per merge, and the start and end
    tokens: 49408 for the public file.
    """

    def __init__(self, merges: Sequence[tuple[str, str]], fix_text: bool = False):
        self.merges, self.fix_text = tuple(merges), fix_text
        symbols = [*byte_symbols().values()]
        self.vocabulary = symbols + [s + _END_OF_WORD for s in symbols] + ["".join(pair) for pair in self.merges]
        self.vocab_size = len(self.vocabulary) + 2
        self.bos_id, self.eos_id, self.pad_id = self.vocab_size - 2, self.vocab_size - 1, 0
        self._prepare()

    def _prepare(self) -> None:
        self._ids = {symbol: index for index, symbol in enumerate(self.vocabulary)}
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._cache: dict[str, list[int]] = {}
        self._fix = _load_ftfy() if self.fix_text else None

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def clean(self, text: str) -> str:
        """Mojibake repaired (by option), HTML entities resolved twice, white space collapsed, as CLIP does."""
        text = self._fix(text) if self._fix else text
        return " ".join(html.unescape(html.unescape(text)).split())

    def encode(self, text: str) -> list[int]:
        """Ids of a cleaned text, special tokens excluded."""
        ids: list[int] = []
        for piece in split_pieces(text):
            found = self._cache.get(piece)
            if found is None:
                found = self._merge(piece)
                if len(self._cache) < _CACHE_WORDS:
                    self._cache[piece] = found
            ids += found
        return ids

    def _merge(self, piece: str) -> list[int]:
        """Merges the pair of lowest rank, everywhere it stands, until none is left."""
        table = byte_symbols()
        word = [table[byte] for byte in piece.encode("utf-8", "replace")]
        word[-1] += _END_OF_WORD
        while len(word) > 1:
            pairs = [(word[i], word[i + 1]) for i in range(len(word) - 1)]
            best = min(pairs, key=lambda pair: self._ranks.get(pair, MAX_MERGES + 1))
            if best not in self._ranks:
                break
            merged, i = [], 0
            while i < len(word):
                if tuple(word[i : i + 2]) == best:
                    merged.append(word[i] + word[i + 1])
                    i += 2
                else:
                    merged.append(word[i])
                    i += 1
            word = merged
        return [self._ids[symbol] for symbol in word]

    def special_id(self, token: str) -> int:
        """The id of the start or end token by its name, -1 for any other."""
        return {"<|startoftext|>": self.bos_id, "<|endoftext|>": self.eos_id}.get(token, -1)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens vanish, bytes that are no UTF-8 become U+FFFD."""
        bytes_of = {symbol: byte for byte, symbol in byte_symbols().items()}
        text = "".join(self.vocabulary[i] for i in ids if i < len(self.vocabulary)).replace(_END_OF_WORD, " ")
        return bytes(bytes_of.get(c, 32) for c in text).decode("utf-8", "replace").strip()

    def model_bytes(self) -> bytes:
        """The merges as a gzip file that `read_merges` reads; the same bytes every time."""
        return gzip.compress("\n".join(" ".join(pair) for pair in self.merges).encode(), mtime=0)


def _load_ftfy():
    try:
        import ftfy
    except ImportError:
        raise ConfigError(
            "config.data.tokenizer.fix_text is true, which needs the package ftfy: pip install ftfy, or set it to false"
        ) from None
    return ftfy.fix_text


def find_merges_file() -> str:
    """The copy of CLIP's merges file inside an installed open_clip, found without importing it (it needs torch).

    Raises:
        ConfigError: open_clip is not installed; says what to install or pass.
    """
    spec = importlib.util.find_spec("open_clip")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = os.path.join(folder, MERGES_FILE)
        if os.path.isfile(path):
            return path
    raise ConfigError(
        f"config.data.tokenizer.path is empty and no installed open_clip holds {MERGES_FILE}; "
        "pip install open_clip_torch, or set the path to a copy of that file"
    )


def read_merges(data: bytes, name: str) -> list[tuple[str, str]]:
    """The merges of a file's bytes (plain or gzip), in rank order, at most as many as CLIP uses.

    Raises:
        ConfigError: a line is no pair of symbols; names file and line.
    """
    try:
        lines = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"the merges file {name} can't be read ({error}); fetch it again") from None
    first = 1 if "#version" in lines[0] else 0
    merges = []
    for number, line in enumerate(lines[first : first + MAX_MERGES], start=first + 1):
        if not line and number >= len(lines) - 1:
            break
        pair = tuple(line.split())
        if len(pair) != 2:
            raise ConfigError(f"line {number} of the merges file {name} must hold two symbols, not {line!r:.60}")
        merges.append(pair)
    if not merges:
        raise ConfigError(f"the merges file {name} holds no merges; give CLIP's {MERGES_FILE} or one in its format")
    return merges


def load_clip_bpe(path: str, fix_text: bool) -> ClipBpe:
    """The encoder of a merges file; an empty path finds open_clip's."""
    path = path or find_merges_file()
    if not os.path.isfile(path):
        raise ConfigError(f"config.data.tokenizer.path = {path!r} is not a file; give CLIP's {MERGES_FILE}")
    with open(path, "rb") as file:
        return ClipBpe(read_merges(file.read(), path), fix_text)
