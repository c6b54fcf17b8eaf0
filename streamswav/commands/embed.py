"""`streamswav embed`: features, embeddings or clusters of every image of a stream of shards, as tables."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

from streamswav.arguments import count, whole
from streamswav.config import Config
from streamswav.drain import Drain, drain_on_signals
from streamswav.errors import ConfigError

if TYPE_CHECKING:
    from streamswav.transfer.embedding.embed import EmbedSettings

_USAGE = "streamswav embed --checkpoint PATH --to DIR [options] [--section.key value]... URL..."
_EPILOG = """\
URLs are prefixes, globs, brace patterns, tars or @FILE lists, as for pretrain. Of the configuration it heeds
storage, labels, stream.where, stream.exclude, stream.skip_ratio, stream.skip_probation, training.threads and
watchdog. Several ranks share the work: streamswav launch --nproc-per-node 8 embed ...
A second start of the same command goes on where the first was ended, on any number of ranks and workers.

exit codes: 0 done · 75 stopped by a signal, the same command goes on · 78 do not restart before something was
changed (the message says what) · 1 anything else
"""


def add_embed_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `run_embed`."""
    parser.usage, parser.epilog = _USAGE, _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="a run, a checkpoint, or a file of weights")
    add("--to", required=True, metavar="DIR", help="folder for the tables; local or s3://")
    add(
        "--what",
        default="features",
        metavar="LIST",
        help="of features (default), embeddings, scores, clusters, codes; several with commas",
    )
    add("--layout", default="npy", metavar="NAME", help="npy (default) or parquet")
    add("--float16", action="store_true", help="half precision in the tables")
    add("--top", type=count, default=8, metavar="N", help="largest entries kept of a code (default: 8)")
    add("--part", type=count, default=4096, metavar="SAMPLES", help="of a shard in a part (default: 4096)")
    add("--resize", type=count, metavar="PIXELS", help="shorter side (default: from the crop)")
    add("--crop", type=count, metavar="PIXELS", help="centre crop (default: the run's first crop size)")
    add("--batch", type=count, default=256, metavar="IMAGES", help="through the network at once")
    add("--workers", type=whole, metavar="N", help="processes a rank that decode (default: the cores)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the network runs")
    parser.set_defaults(words=[])


def run_embed(args: argparse.Namespace, *, given: Config) -> None:
    """Embed the shards, and print what was done as JSON.

    Args:
        args: parsed by a parser that `add_embed_arguments` prepared; `words` are its URLs.
        given: as `streamswav.transfer.embedding.embed.embed` says.

    Raises:
        DrainedError: stopped by a signal; the same command goes on.
        StreamswavError: as `streamswav.transfer.embedding.embed.embed`.
    """
    if not args.words:
        raise ConfigError("embed", "say where the shards are, as streamswav embed ... s3://bucket/shards/")
    with drain_on_signals() as drain:
        summary = _embed(args, given, drain)
    if summary:
        sys.stdout.write(json.dumps(summary, indent=1) + "\n")


def _embed(args: argparse.Namespace, given: Config, drain: Drain) -> dict[str, Any]:
    """Join the ranks and embed; the summary is rank 0's, empty on others."""
    # torch takes seconds to import: a signal is heard meanwhile.
    import torch  # noqa: PLC0415

    from streamswav.telemetry.progress import Reporter  # noqa: PLC0415
    from streamswav.training.distributed import (  # noqa: PLC0415
        join_ranks,
        leader_tells,
        own_cores,
        own_heartbeat,
        own_rank,
    )
    from streamswav.training.watchdog import watch  # noqa: PLC0415
    from streamswav.transfer.embedding.embed import embed  # noqa: PLC0415

    torch.set_num_threads(given.training.threads or own_cores())
    settings = _settings(args)
    settings.check()
    with ExitStack() as stack:
        watchdog = stack.enter_context(watch(given.watchdog, own_heartbeat(), rank=own_rank()))
        ranks = stack.enter_context(join_ranks(args.device))
        stack.enter_context(leader_tells(ranks))
        reporter = stack.enter_context(closing(Reporter(silent=not ranks.leads)))

        def alive() -> None:
            drain.patient = True  # from the first batch on there is something to write first
            watchdog.enter("evaluation")

        summary = embed(
            args.checkpoint,
            args.words,
            args.to,
            settings=settings,
            config=given,
            ranks=ranks,
            reporter=reporter,
            give_up=drain,
            alive=alive,
        )
        return summary if ranks.leads else {}


def _settings(args: argparse.Namespace) -> EmbedSettings:
    from streamswav.transfer.embedding.embed import EmbedSettings  # noqa: PLC0415
    from streamswav.transfer.embedding.embedder import Wanted  # noqa: PLC0415
    from streamswav.transfer.extraction.reading import default_workers  # noqa: PLC0415

    what = tuple(each.strip() for each in args.what.split(",") if each.strip())
    return EmbedSettings(
        Wanted(what, top=args.top, float16=args.float16),
        layout=args.layout,
        part=args.part,
        resize=args.resize,
        crop=args.crop,
        batch=args.batch,
        workers=default_workers() if args.workers is None else args.workers,
    )
