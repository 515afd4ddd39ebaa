"""``octavo distill``: trains a draft head for a model on the model's own outputs. Knows flags only.

With ``torchrun --nproc-per-node N -m octavo distill ...`` it runs on several processes.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys

from octavo.cli.options import add_engine_flags, engine_options
from octavo.distill.options import DataConfig, DistillConfig, HeadOptions, TrainConfig
from octavo.flags import add_flags, from_namespace

HELP = "train a draft head for speculation, from the model's own outputs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "positional_model", metavar="MODEL", nargs="?", help="as --model: whom the head drafts for"
    )
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="where the head and all of the run go"
    )
    add_flags(parser, (DataConfig, HeadOptions, TrainConfig))
    add_engine_flags(parser, skip=("seed",))


def run(args: argparse.Namespace) -> int:
    config = DistillConfig(
        output=args.output,
        data=from_namespace(DataConfig, args),
        head=from_namespace(HeadOptions, args),
        train=from_namespace(TrainConfig, args),
    )
    options = engine_options(args)
    # Lazy: torch; a wrong flag must be told at once.
    from octavo.distill.run import distill

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    measured = distill(config, engine=options, show_bar=sys.stderr.isatty())
    for name, acceptance in measured.items():
        print(json.dumps({"texts_of": name, **acceptance.to_json()}))
    return 0
