"""What every training command does: put a run together from its configuration, and run it."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import torch

from streamswav import __version__
from streamswav.commands.program import Program, Start
from streamswav.commands.run_folder import (
    Run,
    checkpoints_of,
    freeze_manifest,
    hold_lease,
    mirror_of,
    read_begun,
    refuse_other_grid,
)
from streamswav.commands.run_sinks import open_sinks
from streamswav.commands.run_stream import agreed_selection, growth_of, on_grid, samples_of, start_position
from streamswav.commands.summary import summarise
from streamswav.config import Config, dump_config
from streamswav.defaults import Choice, Facts, known
from streamswav.drain import Drain
from streamswav.ends import reason_of
from streamswav.errors import ConfigError, DrainedError, ManifestError
from streamswav.planning import trunk_parameters
from streamswav.stream.store import Store, join, redact
from streamswav.telemetry.exporter import Source, serve
from streamswav.telemetry.metrics import Metrics
from streamswav.telemetry.progress import Reporter
from streamswav.telemetry.secrecy import without_secrets
from streamswav.telemetry.sinks import refuse_missing
from streamswav.telemetry.status import Status
from streamswav.training.distributed import (
    Ranks,
    compute_repeatably,
    join_ranks,
    leader_tells,
    own_attempt,
    own_commit,
    own_cores,
    own_folder,
    own_heartbeat,
    own_rank,
    own_role,
)
from streamswav.training.feed import Feed, Hooks
from streamswav.training.feeding import begun_grid, build_feed
from streamswav.training.health import build_health
from streamswav.training.lease import Lease
from streamswav.training.monitor import Monitor
from streamswav.training.open_steps import OpenSteps
from streamswav.training.pace import make_pace
from streamswav.training.restore import Restored, load_into, restore
from streamswav.training.saver import Saver
from streamswav.training.task import Task
from streamswav.training.trainer import Trainer
from streamswav.training.watchdog import Watchdog, watch

_CLOSE_SECONDS = 60.0


def run_training(config: Config, drain: Drain, program: Program) -> dict[str, Any]:
    """Run, or go on with, the training that the configuration describes.

    Args:
        config: as it was given.
        drain: whether to stop; from the first step on a stop saves.
        program: what is trained.

    Returns:
        The summary that is written beside the checkpoints; empty on ranks other than 0.

    Raises:
        DrainedError: stopped by a signal; everything is saved.
        StreamswavError: as the configuration, the data or the store deserve.
    """
    refuse_incomplete(config)
    metrics, status = Metrics(own_role()), Status(own_folder() if own_rank() == 0 else None)
    with ExitStack() as stack:
        watchdog = stack.enter_context(watch(config.watchdog, own_heartbeat(), rank=own_rank()))
        ranks = stack.enter_context(join_ranks(config.training.device))
        stack.enter_context(leader_tells(ranks))
        try:
            ranks.lead(lambda: stack.enter_context(_serve(config, metrics, status)))
            reporter = stack.enter_context(closing(Reporter(silent=not ranks.leads)))
            with hold_lease(config, ranks, reporter) as lease:
                run = _prepare(config, ranks, metrics, reporter, lease=lease, program=program)
                return _train(run, program, drain, watchdog, status)
        except Exception as error:
            state = "draining" if isinstance(error, DrainedError) else "failed"
            metrics.set_state(state)
            metrics.add("worker_exits_total", 1, reason_of(error))
            status.update(state=state)
            raise


@contextmanager
def _serve(config: Config, metrics: Metrics, status: Status) -> Iterator[None]:
    """Serve the endpoint, unless there is a launcher, which does."""
    if own_folder() is not None:
        yield
        return
    source, section = Source(metrics, status=status.read), config.telemetry
    with serve(source, port=section.port, bind=section.bind):
        yield


def refuse_incomplete(config: Config) -> None:
    """Refuse a configuration without shards, without a place for the run, or with sinks that cannot work.

    Raises:
        ConfigError: naming the key.
    """
    if not config.stream.urls:
        raise ConfigError("stream.urls", "say where the shards are, as --stream.urls s3://bucket/shards/")
    if not config.run.directory:
        raise ConfigError("run.directory", "say where the run is kept, as --run.directory runs/first")
    refuse_missing(config.telemetry, config.run.directory)


def _prepare(
    config: Config,
    ranks: Ranks,
    metrics: Metrics,
    reporter: Reporter,
    *,
    lease: Lease,
    program: Program,
) -> Run:
    """List the shards, choose what was left open, and say so."""
    _set_up_torch(config, ranks)
    store = Store(config.storage, on_request=metrics.count_request)
    begun = ranks.lead(lambda: read_begun(config, store))
    config = program.prepare(config, Start(begun, ranks, store, reporter))
    manifest = ranks.lead(lambda: freeze_manifest(config, store, reporter, begun=begun is not None))
    if begun:
        refuse_other_grid(begun_grid(begun), config)
    cuda = ranks.device.type == "cuda"
    facts = Facts(
        world_size=ranks.world_size,
        cores=min(ranks.gather(own_cores())),
        cuda=cuda,
        bfloat16=all(ranks.gather(cuda and torch.cuda.is_bf16_supported(including_emulation=False))),
        shards=len(manifest.shards),
        samples=manifest.samples,
        run_samples=manifest.total(config.stream.passes_by_url),
        trunk_parameters=trunk_parameters(config),
        begun=begun,
    )
    resolved, choices = program.resolve(config, facts, ranks)
    tell_choices(choices, reporter)
    batch = known(resolved.training.batch)
    if manifest.samples is not None and manifest.samples < batch and not resolved.stream.follow:
        raise ManifestError(
            f"{redact(config.stream.urls[0])}: {manifest.samples} samples are fewer than one global batch "
            f"(training.batch = {batch}); lower it or add data"
        )
    return Run(resolved, manifest, ranks, store, reporter, metrics, lease)


def tell_choices(choices: Iterable[Choice], reporter: Reporter) -> None:
    """Say what was chosen, and why."""
    for choice in choices:
        reporter.event(
            "default", f"{choice.key} = {choice.value}  ({choice.reason})", key=choice.key, value=choice.value
        )


def _set_up_torch(config: Config, ranks: Ranks) -> None:
    torch.set_num_threads(config.training.threads or own_cores())
    torch.manual_seed(config.stream.seed)
    if config.training.deterministic:
        compute_repeatably()
    elif ranks.device.type == "cuda":
        torch.backends.cudnn.benchmark = True


def _train(run: Run, program: Program, drain: Drain, watchdog: Watchdog, status: Status) -> dict[str, Any]:
    """Go on from the newest checkpoint, or begin; the summary is rank 0's, empty on others."""
    config, ranks, reporter = run.config, run.ranks, run.reporter
    folder = checkpoints_of(config, run.store, lambda text: reporter.event("warning", text), lease=run.lease)
    saver = Saver(folder, run.store, config, ranks, mirror=mirror_of(run))
    restored = restore(folder, run.store, config, ranks)
    if restored:
        saver.resume_from(restored)
    open_sinks(run, images=restored.position.trained if restored else 0)
    log_seconds = config.telemetry.log_seconds
    health = build_health(config)
    if health and restored:
        health.restore(restored.health)
    monitor = Monitor(
        run.metrics,
        reporter,
        ranks,
        log_seconds=log_seconds,
        watchdog=watchdog,
        status=status,
        health=health,
    )
    saver.health = health
    saver.listener = monitor
    monitor.describe(run.manifest, _about(config, ranks))
    status.update(
        run={"directory": redact(config.run.directory), **_about(config, ranks)}, versions=_versions()
    )
    run.metrics.set("checkpoint_interval_seconds", 60 * (config.checkpoint.minutes or math.inf))
    trainer, feed, task = _build_trainer(run, program, saver, monitor, restored, drain=drain)
    task.learner.clock = monitor.clock
    monitor.images_bound = program.images_bound(run) if ranks.leads else None
    loss_first = restored.loss_first if restored else None
    del restored  # it holds a model and an optimizer
    if trainer.done:
        reporter.event("done", f"{config.run.directory}: this run is done ({feed.seen:,} images)")
    else:
        place = join(config.run.directory, "config.yaml")
        ranks.lead(lambda: run.store.write(place, dump_config(without_secrets(config)).encode()))
        drain.patient = True
        monitor.begin(step=trainer.step, images=feed.seen, loss_first=loss_first)
        try:
            trainer.train()
        except Exception:  # also what gloo says of lost peers: what was staged is whole
            with watchdog.within("checkpoint"):
                saver.close(_CLOSE_SECONDS)
            raise
    with watchdog.within("evaluation"):
        more = program.finish(run, task, trainer.step, feed.position.trained)
    monitor.done()
    summary = ranks.lead(lambda: summarise(run, trainer, feed, monitor, saver, more=more))
    with watchdog.within("checkpoint"):
        saver.close()
    return summary if ranks.leads else {}


def _build_trainer(
    run: Run,
    program: Program,
    saver: Saver,
    monitor: Monitor,
    restored: Restored | None,
    *,
    drain: Drain,
) -> tuple[Trainer, Feed, Task]:
    ranks, select = run.ranks, agreed_selection(run)
    position = start_position(run, restored)
    config = on_grid(run.config, position.grid)
    pace = make_pace(
        config,
        samples=samples_of(run.config, run.manifest),
        size=run.manifest.total_bytes(config.stream.passes_by_url),
    )
    task = program.task(run, config, pace)
    if restored:
        load_into(task.learner, restored, ranks, batch=position.grid.batch)
        run.reporter.event(
            "resumed",
            f"going on from {restored.checkpoint.url} ({position.trained:,} images)",
            step=restored.step,
        )
    crop, labels = program.parts(run)
    feed = build_feed(
        config,
        run.manifest,
        position,
        ranks,
        select=select,
        crop=crop,
        labels=labels,
        growth=growth_of(run) if config.stream.follow else None,
        hooks=Hooks(
            drain=drain,
            wants_save=lambda: saver.due(feed.seen + feed.position.grid.batch),
            wants_log=monitor.log_due,
            on_passed_over=lambda each: monitor.passed_over(each, feed.shard_key(each)),
            on_idle=lambda idle: trainer.idle(idle),  # noqa: PLW0108 - it is built from this feed
            on_grown=monitor.grown,
        ),
        metrics=run.metrics,
    )
    trainer = Trainer(
        task=task,
        feed=feed,
        pace=pace,
        saver=saver,
        monitor=monitor,
        open_steps=OpenSteps(config.training, task, feed),
        step=restored.step if restored else 0,
        images_limit=config.training.images,
        evaluator=program.evaluator(run, drain),
    )
    return trainer, feed, task


def _about(config: Config, ranks: Ranks) -> dict[str, str]:
    digest = hashlib.blake2b(dump_config(without_secrets(config)).encode(), digest_size=6).hexdigest()
    return {
        "attempt": str(own_attempt()),
        "version": __version__,
        "git_sha": own_commit(),
        "world_size": str(ranks.world_size),
        "config_hash": digest,
    }


def _versions() -> dict[str, str]:
    return {"streamswav": __version__, "torch": torch.__version__, "python": platform.python_version()}
