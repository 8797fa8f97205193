"""Command line of import and export: flags, errors as sentences, exit codes. The work is done in `commands`.

python -m vlm_jax.interop import --from=FILE_OR_DIR --to=DIR [--family=hf|open_clip|big_vision|official]
                                 [--activation=quick_gelu] [--tokenizer=FILE|none]
                                 [--preprocess=clip|siglip|imagenet|inception|dalle]
                                 [--allow_unexpected]
python -m vlm_jax.interop import --from=mm_projector.safetensors|ADAPTER_DIR --base=CHECKPOINT --to=DIR
python -m vlm_jax.interop export --from=CHECKPOINT --to=DIR --family=hf|open_clip|big_vision|official
                                 [--dtype=float16|bfloat16] [--part=projector|adapter]
"""

import argparse
import sys
from pathlib import Path

from vlm_jax.checkpoint_format import CheckpointError
from vlm_jax.interop.adapters import export_part, import_part, needs_base
from vlm_jax.interop.commands import export_weights, import_weights
from vlm_jax.interop.files import WeightsError
from vlm_jax.interop.formats import LIBRARIES
from vlm_jax.interop.preprocess import KNOWN
from vlm_jax.interop.tables import ConversionError
from vlm_jax.main import EXIT_CONFIG
from vlm_jax.models.mlp import ACTIVATIONS
from vlm_jax.schema import ConfigError


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m vlm_jax.interop", description="Imports and exports public weights."
    )
    actions = parser.add_subparsers(dest="action", required=True)
    importer = actions.add_parser("import", allow_abbrev=False, help="weights of another library to a checkpoint")
    exporter = actions.add_parser("export", allow_abbrev=False, help="a checkpoint to files of another library")
    for action, source in (
        (importer, "file of weights, or directory with one and its config files"),
        (exporter, "workdir, step directory or imported checkpoint"),
    ):
        action.add_argument("--from", dest="source", type=Path, required=True, help=source)
        action.add_argument("--to", dest="target", type=Path, required=True, help="directory to write")
    importer.add_argument("--family", choices=LIBRARIES, help="whose names the weights carry (default: found out)")
    importer.add_argument("--activation", choices=list(ACTIVATIONS), help="where no config file tells it")
    importer.add_argument(
        "--tokenizer", default="", help="CLIP's merges, a SentencePiece *.model or a tokenizer.json; none to store none"
    )
    importer.add_argument("--preprocess", default="", choices=list(KNOWN), help="where no file tells it")
    importer.add_argument("--allow_unexpected", action="store_true", help="pass over names without a place")
    importer.add_argument(
        "--base", type=Path, help="checkpoint that takes what the files hold: LLaVA's mm_projector.*, a folder of PEFT"
    )
    exporter.add_argument("--part", choices=("projector", "adapter"), help="of a vision-language model, instead of all")
    exporter.add_argument("--family", choices=LIBRARIES, required=True, help="whose files to write")
    exporter.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the weights"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The program; returns the exit code: 2 for input that can't be used, 1 for files that can't be read or written."""
    flags = vars(parse(sys.argv[1:] if arguments is None else arguments))
    action, source, target = flags.pop("action"), flags.pop("source"), flags.pop("target")
    base, part = flags.pop("base", None), flags.pop("part", None)
    try:
        if base is not None:
            if any(flags.values()):
                raise ConversionError("with --base the base tells all else; leave the other flags out")
            print(import_part(source, target, base))
        elif action == "import" and needs_base(source):
            raise ConversionError(f"{source} holds a part of a model; name the checkpoint that takes it with --base")
        elif part is not None:
            print(export_part(source, target, part=part, **flags))
        else:
            print({"import": import_weights, "export": export_weights}[action](source, target, **flags))
    except (ConversionError, ConfigError, WeightsError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG if isinstance(error, ConversionError | ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
