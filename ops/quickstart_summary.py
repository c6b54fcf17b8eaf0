"""The end of the quickstart: its figures in one file, and what to do next."""

import json
import sys
from pathlib import Path

PROTOCOLS = {"knn": "kNN, k = 20", "linear": "linear"}
SUFFIXES = {"checkpoint": "", "untrained": "_untrained", "pixels": "_pixels"}

NEXT = """
Next, your own bucket:
  .venv/bin/streamswav-shards build FOLDER_OF_IMAGES s3://BUCKET/shards/
  .venv/bin/streamswav pretrain --stream.urls s3://BUCKET/shards/ --run.directory s3://BUCKET/runs/first
  .venv/bin/streamswav knn --checkpoint s3://BUCKET/runs/first --train s3://BUCKET/train/ --test s3://BUCKET/test/
"""


def describe(run, stream) -> str:
    """Say in three lines what was done, that every image is accounted for, and what it gave."""
    return (
        f"\n{run['images']:,} images in {stream['passes']} passes, {run['images_per_second']:,.0f} a second; "
        f"loss {run['loss_first']:.2f} -> {run['loss_last']:.2f} (ln K {run['ln_prototypes']:.2f})\n"
        f"{stream['trained']:,} trained + {stream['quarantined']:,} quarantined + {stream['left']:,} left "
        f"= {stream['manifest']:,} in the manifest\n"
        f"kNN {run['knn']:.1%} (untrained {run['knn_untrained']:.1%}, pixels {run['knn_pixels']:.1%}), "
        f"linear {run['linear']:.1%} (untrained {run['linear_untrained']:.1%})"
    )


def main() -> int:
    here = Path(sys.argv[1])
    summary = json.loads((here / "pretrain.json").read_text())
    for value in json.loads((here / "evaluation.json").read_text())["values"]:
        for name, protocol in PROTOCOLS.items():
            if value["protocol"] == protocol:
                summary[name + SUFFIXES[value["column"]]] = value["scores"]["top1"]
    (here / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(describe(summary, summary["stream"]) + f"\nAll figures: {here / 'summary.json'}")
    print(NEXT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
