"""Trains a SentencePiece model from the captions of any source and writes it to a file.

python -m vlm_jax.data.train_tokenizer --path='shards/{000..009}.tar' --output=captions.model --vocab_size=8192
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence

from vlm_jax.data import sentencepieces
from vlm_jax.data.captions import captions
from vlm_jax.data.sources import source_for_path
from vlm_jax.data.sources.base import keys_at
from vlm_jax.schema import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when the model was written, 2 when arguments or data don't allow it, 1 when the disk doesn't."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--path", required=True, help="as config.data.path: tar shards, a table, a folder ...")
    parser.add_argument("--output", required=True, help="the model file to write")
    parser.add_argument("--vocab_size", type=int, default=8192, help="number of ids, the special ones included")
    parser.add_argument("--normalization", default="nmt_nfkc_cf", help="nmt_nfkc_cf folds case; identity keeps all")
    parser.add_argument("--records", type=int, default=200_000, help="at most this many records, spread evenly")
    parser.add_argument("--cache_dir", default="", help="folder for indices of shards in read-only folders")
    options = parser.parse_args(arguments)
    try:
        with keys_at("--path", "the source's "):
            source = source_for_path(options.path).build(options.cache_dir)
        texts = captions(source, options.records)
        model = sentencepieces.train(texts, options.vocab_size, options.normalization)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        _write(options.output, model)
    except OSError as error:
        print(f"error: --output={options.output} can't be written: {error.strerror}", file=sys.stderr)
        return 1
    size = sentencepieces.SentencePieces(model).vocab_size
    print(f"{options.output}: {size} ids")
    return 0


def _write(path: str, data: bytes) -> None:
    """Writes the whole file or none of it."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise


if __name__ == "__main__":
    sys.exit(main())
