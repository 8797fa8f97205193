"""A tokenizer of ours as the files that transformers loads, so that it gives the same ids there.

Padding of CLIP's tokenizer is the one exception: there it must be the end token, which CLIP's pooling does not see.
"""

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from vlm_jax.data.bpe import ClipBpe
from vlm_jax.data.hf_tokenizer import FILE_NAME, HfTokenizer
from vlm_jax.data.sentencepieces import SentencePieces
from vlm_jax.data.text import Tokenizer
from vlm_jax.interop import files
from vlm_jax.interop.tables import ConversionError

CONVENTIONS = "vlm_jax"  # key of tokenizer_config.json
_START, _END = "<|startoftext|>", "<|endoftext|>"
_SPACE = "▁"  # what SentencePiece writes for a space


def export_tokenizer(tokenizer: Tokenizer, folder: Path, prompts: bool = False) -> str:
    """Writes the files; returns their names as a remark for the user.

    Args:
        tokenizer: ours.
        folder: where.
        prompts: whether texts go on there, as those of a language model do: no end token is put behind them.

    Raises:
        ConversionError: the other library has no such tokenizer.
        WeightsError: a file can't be written.
    """
    if not tokenizer.config.sticky_eos and tokenizer.config.eos and not prompts:
        raise ConversionError("transformers' tokenizers keep the end token of a text that is cut; sticky_eos is false")
    if isinstance(tokenizer.encoder, ClipBpe):
        return _export_clip(tokenizer, tokenizer.encoder, folder)
    special = {role: token for role, token in _special_tokens(tokenizer).items() if token is not None}
    fast = _fast_tokenizer(tokenizer)
    fast.post_processor = _post_processor(tokenizer, special, ends=not prompts)
    files.write_bytes(folder / FILE_NAME, fast.to_str(pretty=False).encode())
    settings: dict[str, Any] = {f"{role}_token": token for role, token in special.items()}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": tokenizer.length}
    # For the way back: what a reader of the file alone would have to guess.
    settings[CONVENTIONS] = {key: getattr(tokenizer.config, key) for key in ("bos", "eos", "sticky_eos", "pad")}
    files.write_json(folder / "tokenizer_config.json", settings)
    return f"{FILE_NAME}, tokenizer_config.json"


def _export_clip(tokenizer: Tokenizer, encoder: ClipBpe, folder: Path) -> str:
    config = tokenizer.config
    if not (config.bos and config.eos and config.lower) or config.canonicalize:
        raise ConversionError(
            "transformers' CLIPTokenizer lower-cases, keeps punctuation and puts start and end tokens around a text"
        )
    vocabulary = {symbol: index for index, symbol in enumerate([*encoder.vocabulary, _START, _END])}
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in encoder.merges)]) + "\n"
    files.write_bytes(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False).encode())
    files.write_bytes(folder / "merges.txt", merges.encode())
    settings = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    settings |= {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.length}
    files.write_json(folder / "tokenizer_config.json", settings)
    return "vocab.json, merges.txt, tokenizer_config.json"


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str | None]:
    """The tokens by role; None where the vocabulary has none."""
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    if isinstance(tokenizer.encoder, SentencePieces):
        proto = _proto(tokenizer.encoder)
        pieces = [piece.piece for piece in proto.pieces]
        ids["unk"] = proto.trainer_spec.unk_id
        return {role: pieces[index] if index >= 0 else None for role, index in ids.items()}
    assert isinstance(tokenizer.encoder, HfTokenizer)
    reader = FastTokenizer.from_buffer(tokenizer.encoder.model)
    return {role: reader.id_to_token(index) if index >= 0 else None for role, index in ids.items()}


def _fast_tokenizer(tokenizer: Tokenizer) -> Any:
    """The encoder with the cleaning of the conventions before its own normalisation."""
    if isinstance(tokenizer.encoder, SentencePieces):
        fast = _from_sentencepieces(_proto(tokenizer.encoder))
    else:
        assert isinstance(tokenizer.encoder, HfTokenizer)
        fast = FastTokenizer.from_buffer(tokenizer.encoder.model)
    fast.no_truncation()
    fast.no_padding()
    steps: list[Any] = [normalizers.Lowercase()] if tokenizer.config.lower else []
    if tokenizer.config.canonicalize:
        dropped = "".join(f"\\{character}" for character in string.punctuation if character != "_")
        steps += [normalizers.Replace("_", " "), normalizers.Replace(Regex(f"[{dropped}]"), "")]
        steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    if steps:
        own = [fast.normalizer] if fast.normalizer is not None else []
        fast.normalizer = normalizers.Sequence([*steps, *own])
    return fast


def _post_processor(tokenizer: Tokenizer, special: dict[str, str], ends: bool) -> Any:
    """The start and end tokens that the conventions ask for."""
    config = tokenizer.config
    used = [role for role, wanted in (("bos", config.bos), ("eos", config.eos and ends)) if wanted]
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    single = " ".join([*(special[r] for r in used if r == "bos"), "$A", *(special[r] for r in used if r == "eos")])
    return processors.TemplateProcessing(single=single, special_tokens=[(special[r], ids[r]) for r in used])


def _proto(encoder: SentencePieces) -> Any:
    message: Any = sentencepiece_model_pb2  # its classes are made when it is imported, so type checkers see none
    return message.ModelProto.FromString(encoder.model)


def _from_sentencepieces(proto: Any) -> Any:
    """A SentencePiece model as a fast tokenizer without special tokens around the text."""
    pieces, spec, kinds = proto.pieces, proto.normalizer_spec, type(proto).SentencePiece
    if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
        scored = [(piece.piece, piece.score) for piece in pieces]
        model = models.Unigram(scored, proto.trainer_spec.unk_id, byte_fallback=proto.trainer_spec.byte_fallback)
    elif proto.trainer_spec.model_type == proto.trainer_spec.BPE:
        words = [piece for piece in pieces if piece.type == kinds.NORMAL]
        model = models.BPE(
            vocab={piece.piece: index for index, piece in enumerate(pieces)},
            merges=_merges({piece.piece: piece.score for piece in words}),
            unk_token=pieces[proto.trainer_spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    else:
        raise ConversionError("only SentencePiece models of the kinds unigram and bpe have a form in transformers")
    fast = FastTokenizer(model)
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex("^ | $"), "")]
    if steps:
        fast.normalizer = normalizers.Sequence(steps)
    scheme = "always" if spec.add_dummy_prefix else "never"
    fast.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme)
    fast.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace(_SPACE, prepend_scheme=scheme)]
    )
    control = [piece.piece for piece in pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)]
    fast.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    return fast


def _merges(scores: dict[str, float]) -> Sequence[tuple[str, str]]:
    """The pairs that make each piece, the piece of highest score first: SentencePiece joins whatever makes a piece."""
    ranked = []
    for piece, score in scores.items():
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        ranked += [(-score, pair) for pair in cuts if pair[0] in scores and pair[1] in scores]
    ranked.sort(key=lambda item: item[0])
    return [pair for _, pair in ranked]


__all__ = ["CONVENTIONS", "export_tokenizer"]
