"""The rows that tell of the run: where it is, how fast, and what it reads."""

from __future__ import annotations

from panels import LIMITS, Limit, Panels, Query, graph, listing, number, timeline


def header() -> list[Panels]:
    """State, step, per cent, time left, attempt, loss, age of the checkpoint, alerts, verdict."""
    return [*_figures(), *_course()]


def _figures() -> list[Panels]:
    return [
        number(
            "State",
            "none",
            "What the run is doing now.",
            Query("streamswav:run_state{<run>}", "{{state}}"),
            named=True,
        ),
        number("Step", "none", "Optimizer steps done.", Query("max(streamswav_step{<run>})", "step")),
        number(
            "Done",
            "percentunit",
            "Steps done, to these and those that the images left will take.",
            Query("max(streamswav:done_ratio{<run>})", "done"),
        ),
        number(
            "Time left",
            "dtdurations",
            "Images left at the speed of the last hour. None for a stream that is followed.",
            Query("max(streamswav:seconds_left{<run>})", "left"),
        ),
        number(
            "Images per second",
            "none",
            "All ranks together, over five minutes.",
            Query("sum(streamswav:images_per_second:rate5m{<run>})", "images/s"),
        ),
        number(
            "Checkpoint age",
            "none",
            "Age of the last checkpoint, in intervals (checkpoint.minutes).",
            Query(
                "max(streamswav:checkpoint_age_seconds{<run>})"
                " / max(streamswav_checkpoint_interval_seconds{<run>})",
                "intervals",
            ),
            limit=Limit(LIMITS["checkpoint_intervals"]),
        ),
        number(
            "Verdict",
            "none",
            "The run's own judgement of its representation.",
            Query("max by (verdict) (streamswav_verdict{<run>}) == 1", "{{verdict}}"),
            named=True,
        ),
        number(
            "Firing alerts",
            "none",
            "How many alerts of this run are firing; they are listed below.",
            Query(
                'count(ALERTS{alertname=~"Streamswav.*",alertstate="firing",<run>}) or vector(0)', "alerts"
            ),
            limit=Limit(1),
        ),
    ]


def _course() -> list[Panels]:
    return [
        graph(
            "Loss",
            "none",
            "The loss, and ln K: that of a model which tells nothing apart. It begins near it and must fall.",
            Query("max(streamswav_loss{<run>})", "loss"),
            Query("ln(max(streamswav_prototypes{<run>}) > 0)", "ln K"),
            dashed="ln K",
            least=None,
        ),
        timeline(
            "States",
            "What the run was doing when.",
            Query("max by (state) (streamswav:run_state{<run>})", "{{state}}"),
        ),
        listing(
            "Alerts",
            "Alerts of this run that are firing or about to. The runbook has an entry for each.",
            Query('ALERTS{alertname=~"Streamswav.*",<run>}', ""),
        ),
        listing(
            "Run",
            "Attempt, version, commit, ranks and configuration of what runs now.",
            Query("streamswav_run_info{<run>}", ""),
            "instance",
            "job",
        ),
    ]


def throughput() -> list[Panels]:
    """Images a second, where the time goes, and how much of it was worth it."""
    return [
        graph(
            "Images per second",
            "none",
            "All ranks together, and the line below which ThroughputRegression begins.",
            Query("sum(streamswav:images_per_second:rate5m{<run>})", "images/s"),
            Query(
                f"{LIMITS['throughput_ratio']} * quantile_over_time("
                f"0.5, streamswav:images_per_second:rate5m{{<run>}}[{LIMITS['throughput_window']}])",
                "limit",
            ),
            dashed="limit",
        ),
        graph(
            "Time by phase",
            "percentunit",
            "Where the wall time of rank 0 goes: the phases exclude each other and add up to 1.",
            Query("max by (phase) (streamswav:phase_ratio:rate5m{<run>})", "{{phase}}"),
            stacked=True,
            most=1,
        ),
        graph(
            "Goodput",
            "percentunit",
            "Share of the last hour, time without pods included, in which the network was trained.",
            Query("max(streamswav:goodput_ratio:increase1h{<run>})", "goodput"),
            most=1,
        ),
        graph(
            "Step duration",
            "s",
            "Time from step to step: median and 90th percentile.",
            Query(
                "histogram_quantile(0.5, sum by (le)"
                " (rate(streamswav_step_duration_seconds_bucket{<run>}[$__rate_interval])))",
                "median",
            ),
            Query(
                "histogram_quantile(0.9, sum by (le)"
                " (rate(streamswav_step_duration_seconds_bucket{<run>}[$__rate_interval])))",
                "90%",
            ),
        ),
        graph(
            "Waiting for data",
            "percentunit",
            "Share of wall time in which the ranks wait for the loader, and where DataStarvation begins.",
            Query('max(streamswav:phase_ratio:rate5m{phase="data_wait",<run>})', "data_wait"),
            limit=Limit(LIMITS["data_wait_ratio"]),
        ),
        graph(
            "Cost of telemetry",
            "percentunit",
            "Time spent on metrics and logs, all processes, to the wall time of one; at most 1%.",
            Query("sum(rate(streamswav_telemetry_seconds_total{<run>}[$__rate_interval]))", "telemetry"),
            limit=Limit(0.01),
        ),
    ]


def stream() -> list[Panels]:
    """What is passed over, how the store answers, how the loader keeps up, and what is left."""
    return [*_store(), *_loader(), *_shards()]


def _store() -> list[Panels]:
    return [
        graph(
            "Samples passed over",
            "cps",
            "Samples a second that are not trained, by outcome.",
            Query(
                "sum by (outcome)"
                ' (rate(streamswav_samples_total{outcome!="trained",<run>}[$__rate_interval]))',
                "{{outcome}}",
            ),
        ),
        graph(
            "Quarantined",
            "bytes",
            "Bytes that were not trained since the pod started, by reason. Empty as long as there are none.",
            Query("sum by (reason) (streamswav_quarantined_bytes_total{<run>})", "{{reason}}"),
        ),
        graph(
            "Requests to the store",
            "reqps",
            "Requests a second by outcome, every attempt.",
            Query(
                "sum by (outcome) (rate(streamswav_s3_requests_total{<run>}[$__rate_interval]))",
                "{{outcome}}",
            ),
            stacked=True,
        ),
        graph(
            "Throttled requests",
            "percentunit",
            "Share of requests that the store refused as too many, and where S3Throttled begins.",
            Query("max(streamswav:s3_throttled_ratio:rate5m{<run>})", "throttled"),
            limit=Limit(LIMITS["s3_throttled_ratio"]),
        ),
        graph(
            "Time of a request",
            "s",
            "Median and 99th percentile of one attempt.",
            Query(
                "histogram_quantile(0.5, sum by (le)"
                " (rate(streamswav_s3_request_duration_seconds_bucket{<run>}[$__rate_interval])))",
                "median",
            ),
            Query(
                "histogram_quantile(0.99, sum by (le)"
                " (rate(streamswav_s3_request_duration_seconds_bucket{<run>}[$__rate_interval])))",
                "99%",
            ),
        ),
        graph(
            "Received",
            "Bps",
            "Bytes a second from the store.",
            Query("sum(rate(streamswav_s3_received_bytes_total{<run>}[$__rate_interval]))", "received"),
        ),
    ]


def _loader() -> list[Panels]:
    return [
        graph(
            "Loader by stage",
            "none",
            "Seconds of work a second, over all loader processes: the stage that takes most is the limit.",
            Query(
                "sum by (stage) (rate(streamswav_stage_seconds_total{<run>}[$__rate_interval]))", "{{stage}}"
            ),
            stacked=True,
        ),
        graph(
            "Batches ahead",
            "percentunit",
            "How full the queue of batches before the ranks is: near 0 they wait.",
            Query(
                "sum(streamswav_prefetch_queue_items{<run>})"
                " / (sum(streamswav_prefetch_queue_capacity_items{<run>}) > 0)",
                "filled",
            ),
            most=1,
        ),
        graph(
            "Loader processes",
            "none",
            "Loader processes that make a batch, or wait until one is wanted.",
            Query("sum by (state) (streamswav_dataloader_workers{<run>})", "{{state}}"),
            stacked=True,
        ),
    ]


def _shards() -> list[Panels]:
    return [
        graph(
            "Samples left",
            "none",
            "Samples of the stream that are not trained yet, and images that the run needs.",
            Query("max(streamswav_stream_samples_remaining{<run>})", "in the stream"),
            Query("max(streamswav_run_images_remaining{<run>})", "needed"),
            dashed="needed",
        ),
        graph(
            "Shards opened",
            "none",
            "Shards opened in the last hour by outcome; ShardErrorRatioHigh looks at all but ok.",
            Query("sum by (outcome) (increase(streamswav_shard_opens_total{<run>}[1h]))", "{{outcome}}"),
        ),
        graph(
            "Lag of lanes",
            "none",
            "Samples that lanes hold beyond the one that ends first.",
            Query("max by (stat) (streamswav_lane_lag_samples{<run>})", "{{stat}}"),
        ),
        graph(
            "Shards",
            "none",
            "Shards in the manifest, and those that were lost.",
            Query("max by (state) (streamswav_stream_shards{<run>})", "{{state}}"),
        ),
        graph(
            "Reads from the node's cache",
            "percentunit",
            "Share of reads that storage.cache answered. Empty without one.",
            Query(
                'sum(rate(streamswav_cache_reads_total{outcome="hit",<run>}[$__rate_interval]))'
                " / (sum(rate(streamswav_cache_reads_total{<run>}[$__rate_interval])) > 0)",
                "hits",
            ),
            most=1,
        ),
    ]
