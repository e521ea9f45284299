"""`ddpm evaluate`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import common, sample

if TYPE_CHECKING:
    from pipelines.evaluate import Evaluation
    from pipelines.storage import Storage
    from pipelines.train import Run

DESCRIPTION = """\
Judge the samples that `ddpm sample` made with this configuration, and their model.

Fréchet and kernel distance of the samples to held-out images, beside those of real training images and of
noise, between equally many images.  They are taken in the features of a small classifier that is trained on
the data set, so they are not FID.  And the model's bits/dim on all held-out images, with its three terms.

report.json and the pictures go to STORAGE/evaluations/NAME-ID/, to MLflow, and to --out.
"""

EPILOG = """\
examples:
  ddpm evaluate --config digits.yaml
  ddpm evaluate --config digits.yaml --out ./report
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    common.add_config_arguments(parser)
    parser.add_argument("--out", metavar="FOLDER", help="also put report.json and the pictures here")


def run(arguments: argparse.Namespace) -> int:
    common.use_local_stack()
    config = common.config_of(arguments)

    from pipelines.checkpoints import open_checkpoint
    from pipelines.evaluate import draw, evaluate
    from pipelines.storage import open_storage
    from pipelines.train import open_run

    if arguments.out:
        common.output_folder(arguments.out)
    found_run = open_run(config)
    recipe, samples = sample.locate(config)
    samples.record()  # before the work: is the set finished?
    checkpoint = open_checkpoint(recipe.checkpoint)
    evaluation = evaluate(config, found_run.dataset, checkpoint, samples)
    report = json.dumps(evaluation.to_json(), indent=2)
    place = open_storage(config.storage).child("evaluations", recipe.set_name())
    with tempfile.TemporaryDirectory(prefix="ddpm-evaluate-") as scratch:
        folder = Path(scratch)
        pictures = draw(evaluation, found_run.dataset, checkpoint, recipe, samples, found_run.storage, folder)
        for picture in pictures:
            place.put(picture.name, picture.read_bytes())
        # last: who finds the report finds its pictures
        place.put("report.json", report.encode())
        _track(found_run, place, evaluation, [folder / picture.name for picture in pictures], report)
        if arguments.out:
            out = Path(arguments.out)
            for picture in pictures:
                shutil.copy(picture, out / picture.name)
            (out / "report.json").write_text(report)
    print(table(evaluation))
    print(f"report and pictures: {place.uri}" + (f" and {arguments.out}" if arguments.out else ""))
    return 0


def table(evaluation: Evaluation) -> str:
    """What was measured, for a person."""
    bound = evaluation.bound
    lines = [
        f"{'':<10} {'Fréchet':>10} {'kernel':>10} {'confidence':>11}   "
        f"{evaluation.distances[0].count} images against as many held out"
    ]
    lines += [
        f"{d.name:<10} {d.frechet:>10.3f} {d.kernel:>10.4f} {d.confidence:>11.3f}"
        for d in evaluation.distances
    ]
    shares = sorted(evaluation.class_shares.items(), key=lambda item: item[1])
    lines += [
        f"(in the features of {evaluation.classifier}, {evaluation.classifier_accuracy:.1%} right on held-out "
        "images; not FID)",
        f"classes    of {evaluation.num_samples} samples: rarest {shares[0][0]} {shares[0][1]:.1%}, "
        f"most frequent {shares[-1][0]} {shares[-1][1]:.1%}",
        f"bits/dim   {bound.total:.4f} ± {bound.total_stderr:.4f} on {bound.num_images} held-out images = "
        f"reconstruction {bound.reconstruction:.4f} + consistency {bound.consistency:.4f} + "
        f"prior {bound.prior:.2g}",
    ]
    return "\n".join(lines)


def _track(run: Run, place: Storage, evaluation: Evaluation, pictures: list[Path], report: str) -> None:
    """The evaluation as a run of its own, nested in the training run, whose own state is left alone."""
    from pipelines.tracking import Row, RunDescription, open_tracker, tracked_as

    name = f"evaluation {place.uri.rpartition('/')[2]}"
    params = {"checkpoint": evaluation.checkpoint, "samples": evaluation.samples}
    tracker = open_tracker(
        os.environ.get("MLFLOW_TRACKING_URI"),
        RunDescription(run.config.tracking.experiment, name, params, parent_run_id=tracked_as(run.storage)),
        place,
    )
    metrics = {"bits_per_dim": evaluation.bound.total}
    for distance in evaluation.distances:
        metrics[f"frechet/{distance.name}"] = distance.frechet
        metrics[f"kernel/{distance.name}"] = distance.kernel
    tracker.log([Row(evaluation.step, metrics)])
    tracker.artifact("report.json", report.encode())
    for picture in pictures:
        tracker.artifact(picture.name, picture.read_bytes())
    tracker.finish(failed=False)
