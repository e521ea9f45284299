"""What must hold at the demo's end: `python -m tests.support.check_demo demo-results/report.json`."""

import json
import sys
from pathlib import Path
from typing import Any

PICTURES = ("schedule", "loss", "bound", "samples", "trajectory", "distances", "sweep")
PNG = b"\x89PNG\r\n\x1a\n"


def problems(report: dict[str, Any]) -> list[str]:
    """What is wrong with a demo's report; empty if nothing is."""
    found = []
    distances = {row["name"]: row for row in report["distances"]}
    if set(distances) != {"samples", "real", "noise"}:
        return [f"distances of {sorted(distances)}, not of samples, real and noise"]
    counts = {row["count"] for row in distances.values()}
    if len(counts) != 1:
        found.append(f"image counts differ between the distances: {sorted(counts)}")
    samples, noise = distances["samples"]["frechet"], distances["noise"]["frechet"]
    if not samples <= noise / 5:
        found.append(f"Fréchet distance of samples {samples:.3f} is over a fifth of noise's {noise:.3f}")
    shares = report["class_shares"]
    if len(shares) != 10 or not min(shares.values()) >= 0.03:
        found.append(f"a class has under 3% of the samples: {shares}")
    if not report["num_samples"] >= 2000:
        found.append(f"{report['num_samples']} samples, fewer than 2,000")
    return found


def main(path: Path) -> int:
    found = problems(json.loads(path.read_text()))
    for name in PICTURES:
        picture = path.parent / f"{name}.png"
        if not picture.is_file() or not picture.read_bytes().startswith(PNG):
            found.append(f"{picture} is missing or no PNG")
    for problem in found:
        print(f"demo: {problem}", file=sys.stderr)
    print("demo: " + ("failed its check" if found else "counts, distances, classes and pictures are right"))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
