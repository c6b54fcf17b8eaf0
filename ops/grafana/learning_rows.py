"""The rows that tell of what is learnt, and of what keeps it safe."""

from __future__ import annotations

from panels import LIMITS, Limit, Panels, Query, graph, timeline


def health() -> list[Panels]:
    """Label-free signs of a representation that is worth something."""
    return [*_signs(), *_causes()]


def _signs() -> list[Panels]:
    return [
        timeline(
            "Verdict",
            "The run's own judgement when; `streamswav verdict RUN` has the reason and the remedies.",
            Query("max by (verdict) (streamswav_verdict{<run>}) == 1", "{{verdict}}"),
        ),
        graph(
            "Distance of the loss from ln K",
            "none",
            "Below the line the model tells nothing apart.",
            Query("max(streamswav:ln_prototypes_distance{<run>})", "distance"),
            limit=Limit(LIMITS["ln_prototypes_distance"], below=True),
        ),
        graph(
            "Prototypes in use",
            "percentunit",
            "Share of prototypes that are some image's best over a window. Below the line they collapse.",
            Query("max(streamswav_prototype_usage_ratio{<run>})", "used"),
            Query("max(streamswav_prototypes_unique_ratio{<run>})", "unlike the others"),
            limit=Limit(LIMITS["prototype_usage_ratio"], below=True),
            most=1,
        ),
        graph(
            "Spread of embeddings",
            "none",
            "Standard deviation of unit embeddings times sqrt(D): 1 is healthy, 0 one point.",
            Query("max(streamswav_embedding_std_ratio{<run>})", "spread"),
            limit=Limit(LIMITS["embedding_spread"], below=True),
        ),
        graph(
            "RankMe",
            "none",
            "How many dimensions the features use; it falls before anything else in a dimensional collapse.",
            Query("max(streamswav_rankme{<run>})", "trunk"),
            Query("max(streamswav_embedding_rankme{<run>})", "embedding"),
        ),
        graph(
            "Assignments",
            "percentunit",
            "To ln K: entropy of the mean softmax over the prototypes, and what each tells of its image (0: "
            "stuck). Share of pairs of crops that agree on the best prototype.",
            Query("max(streamswav_assignment_entropy_ratio{<run>})", "entropy"),
            Query("max(streamswav_assignment_information_ratio{<run>})", "information"),
            Query("max(streamswav_crop_agreement_ratio{<run>})", "agreement"),
            most=1,
        ),
    ]


def _causes() -> list[Panels]:
    return [
        graph(
            "Gradient norm",
            "none",
            "By part of the network.",
            Query("max by (part) (streamswav_gradient_norm{<run>})", "{{part}}"),
        ),
        graph(
            "Learning rate",
            "none",
            "Of the last step.",
            Query("max(streamswav_learning_rate{<run>})", "rate"),
        ),
        graph(
            "Queue",
            "percentunit",
            "How full the queue of past embeddings is, and how stale what lies in it.",
            Query("max(streamswav_queue_fill_ratio{<run>})", "filled"),
            Query("max(streamswav_queue_staleness_ratio{<run>})", "stale"),
            most=1,
        ),
        graph(
            "Probes",
            "percentunit",
            "Share of labelled images that are classified right, by probe. Empty without evaluation.every.",
            Query("max by (probe) (streamswav_probe_accuracy_ratio{<run>})", "{{probe}}"),
            most=1,
        ),
    ]


def reliability() -> list[Panels]:
    """Checkpoints, ends and starts, steps that were undone."""
    return [*_checkpoints(), *_ends()]


def _checkpoints() -> list[Panels]:
    return [
        graph(
            "Checkpoint age",
            "s",
            "Since the last checkpoint; CheckpointTooOld begins at the line.",
            Query("max(streamswav:checkpoint_age_seconds{<run>})", "age"),
            Query(
                f"{LIMITS['checkpoint_intervals']} * max(streamswav_checkpoint_interval_seconds{{<run>}})",
                "limit",
            ),
            dashed="limit",
        ),
        graph(
            "Checkpoints",
            "none",
            "In the last hour by outcome; delayed: put off behind one that is still being written.",
            Query("sum by (outcome) (increase(streamswav_checkpoints_total{<run>}[1h]))", "{{outcome}}"),
        ),
        graph(
            "Time of a checkpoint",
            "s",
            "90th percentile: stage, for which training waits, and upload, for which it does not.",
            Query(
                "histogram_quantile(0.9, sum by (le, phase)"
                " (rate(streamswav_checkpoint_duration_seconds_bucket{<run>}[1h])))",
                "{{phase}}",
            ),
        ),
        graph(
            "Size of a checkpoint",
            "bytes",
            "Of the last one.",
            Query("max(streamswav_checkpoint_bytes{<run>})", "size"),
        ),
        graph(
            "Step and checkpoint",
            "none",
            "The step, and that of the last checkpoint: what lies between is lost in a crash.",
            Query("max(streamswav_step{<run>})", "step"),
            Query("max(streamswav:checkpoint_last_success_step{<run>})", "checkpoint"),
            dashed="checkpoint",
        ),
        graph(
            "Copies of checkpoints",
            "none",
            "Copies to checkpoint.copy_to in the last hour by outcome. 0 without one.",
            Query(
                "sum by (outcome) (increase(streamswav_checkpoint_copies_total{<run>}[1h]))", "{{outcome}}"
            ),
        ),
    ]


def _ends() -> list[Panels]:
    return [
        graph(
            "Starts",
            "none",
            f"Within {LIMITS['incarnations_window']}; RestartLoopNoProgress also wants no newer checkpoint.",
            Query(
                "max(changes(streamswav:process_start_timestamp_seconds{<run>}"
                f"[{LIMITS['incarnations_window']}])) + 1",
                "starts",
            ),
            limit=Limit(LIMITS["incarnations"]),
        ),
        graph(
            "Ends of ranks",
            "none",
            "Ranks that ended since the pod started, by reason.",
            Query("sum by (reason) (streamswav_worker_exits_total{<run>})", "{{reason}}"),
        ),
        graph(
            "Steps undone",
            "none",
            "Steps in a row whose loss or gradient was not finite, and all of them in the last hour.",
            Query("max(streamswav_nonfinite_steps_consecutive{<run>})", "in a row"),
            Query("sum(increase(streamswav_nonfinite_steps_total{<run>}[1h]))", "in an hour"),
            limit=Limit(LIMITS["nonfinite_steps"]),
        ),
        graph(
            "Time without a step",
            "s",
            "Since the last step or the last state without steps; Stalled begins at the line.",
            Query("max(streamswav:idle_seconds{<run>})", "idle"),
            Query("max(streamswav:idle_seconds:allowed{<run>})", "limit"),
            dashed="limit",
        ),
    ]
