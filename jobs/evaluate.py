"""`ddpm evaluate`."""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import common, sample

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.evaluation_record import Finished
    from pipelines.sample_recipe import Recipe
    from pipelines.sample_set import SampleSet
    from pipelines.storage import Storage
    from pipelines.train import Run

DESCRIPTION = """\
Judge the samples that `ddpm sample` made with this configuration, and their model.

Fréchet and kernel distance of the samples to held-out images, beside those of real training images and of
noise, between equally many images.  They are taken in the features of a small classifier that is trained on
the data set, so they are not FID.

And bits/dim on all held-out images, with three terms: of the model (all T timesteps, bound.variance_type, x̂_0
clipped), which is what training and sweeps compare; and of the chain that the images were drawn from, where the
sampler has a bound (ancestral, or ddim with eta = 1).

It is the work of one process, this one, on a GPU if there is one.
The report and the pictures go to STORAGE/evaluations/NAME-ID/, to MLflow, and to --out.  Called again for the
same samples, data and settings it finds them done.
"""

EPILOG = """\
examples:
  ddpm evaluate --config digits.yaml
  ddpm evaluate --config digits.yaml --out ./report
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    common.add_config_arguments(parser)
    parser.add_argument(
        "--local", action="store_true", help="in this process, without Ray; which it is anyway"
    )
    parser.add_argument("--out", metavar="FOLDER", help="also put report.json and the pictures here")


def run(arguments: argparse.Namespace) -> int:
    common.use_local_stack()
    config = common.config_of(arguments)

    from pipelines.evaluation_record import evaluation_identity, evaluation_storage, find_evaluation
    from pipelines.tracking import tracked_as
    from pipelines.train import open_run

    if arguments.out:
        common.output_folder(arguments.out)
    found_run = open_run(config)
    recipe, samples = sample.locate(config)
    samples.record()  # before the work: is the set finished?
    identity = evaluation_identity(config, found_run.dataset, recipe)
    place = evaluation_storage(config, identity)
    done = find_evaluation(place)
    if done is not None:
        print(f"evaluation {_name(place)}: done already")
    else:
        done = _judge(config, found_run, recipe, samples, place, identity)
    if tracked_as(place) is None:
        _track(found_run, place, done)
    if arguments.out:
        out = Path(arguments.out)
        for name, data in done.pictures.items():
            (out / name).write_bytes(data)
        (out / "report.json").write_text(json.dumps(done.report, indent=2))
    print(table(done.report))
    print(f"report and pictures: {place.uri}" + (f" and {arguments.out}" if arguments.out else ""))
    return 0


def _judge(
    config: Config, run: Run, recipe: Recipe, samples: SampleSet, place: Storage, identity: dict[str, Any]
) -> Finished:
    """Evaluate, draw the pictures, and commit both."""
    from pipelines.checkpoints import open_checkpoint
    from pipelines.evaluate import evaluate
    from pipelines.evaluation_pictures import draw
    from pipelines.evaluation_record import commit_evaluation

    checkpoint = open_checkpoint(recipe.checkpoint)
    evaluation = evaluate(config, run.dataset, checkpoint, samples)
    with tempfile.TemporaryDirectory(prefix="ddpm-evaluate-") as scratch:
        drawn = draw(evaluation, run.dataset, checkpoint, recipe, samples, run.storage, Path(scratch))
        pictures = {picture.name: picture.read_bytes() for picture in drawn}
    return commit_evaluation(place, identity, evaluation.to_json(), pictures)


def _name(place: Storage) -> str:
    return place.uri.rpartition("/")[2]


def table(report: dict[str, Any]) -> str:
    """What a report says, for a person."""
    bound = report["bound"]
    lines = [
        f"{'':<10} {'Fréchet':>10} {'kernel':>10} {'confidence':>11}   "
        f"{report['distances'][0]['count']} images against as many held out"
    ]
    lines += [
        f"{d['name']:<10} {d['frechet']:>10.3f} {d['kernel']:>10.4f} {d['confidence']:>11.3f}"
        for d in report["distances"]
    ]
    # reports of earlier versions have none
    lines += [f"warning: {warning}" for warning in report.get("warnings", [])]
    shares = sorted(report["class_shares"].items(), key=lambda item: float(item[1]))
    lines += [
        f"(in the features of {report['classifier']}, {report['classifier_accuracy']:.1%} right on held-out "
        "images; not FID)",
        f"classes    of {report['num_samples']} samples: rarest {shares[0][0]} {shares[0][1]:.1%}, "
        f"most frequent {shares[-1][0]} {shares[-1][1]:.1%}",
        f"bits/dim   {_terms(bound)}",
        f"           of the model ({report['bound_of']}), on {bound['num_images']} held-out images",
    ]
    sampled, of = report["sampler_bound"], report["sampler_bound_of"]
    if sampled is None:
        lines.append(f"           of what is sampled: none; {of}")
    else:
        lines += [f"           {_terms(sampled)}", f"           of what is sampled ({of})"]
    return "\n".join(lines)


def _terms(bound: dict[str, Any]) -> str:
    # of one image it is null
    stderr = math.nan if bound["total_stderr"] is None else bound["total_stderr"]
    return (
        f"{bound['total']:.4f} ± {stderr:.4f} = reconstruction {bound['reconstruction']:.4f} + "
        f"consistency {bound['consistency']:.4f} + prior {bound['prior']:.2g}"
    )


def _track(run: Run, place: Storage, done: Finished) -> None:
    """The evaluation as a run of its own, nested in the training run, whose own state is left alone."""
    from pipelines.tracking import Row, RunDescription, open_tracker, tracked_as

    report = done.report
    params = {"checkpoint": report["checkpoint"], "samples": report["samples"]}
    tracker = open_tracker(
        os.environ.get("MLFLOW_TRACKING_URI"),
        RunDescription(
            run.config.tracking.experiment,
            f"evaluation {_name(place)}",
            params,
            parent_run_id=tracked_as(run.storage),
        ),
        place,
    )
    metrics = {"bits_per_dim": report["bound"]["total"]}
    if report["sampler_bound"] is not None:
        metrics["sampled_bits_per_dim"] = report["sampler_bound"]["total"]
    for distance in report["distances"]:
        metrics[f"frechet/{distance['name']}"] = distance["frechet"]
        metrics[f"kernel/{distance['name']}"] = distance["kernel"]
    tracker.log([Row(report["step"], metrics)])
    tracker.artifact("report.json", json.dumps(report, indent=2).encode())
    for name, data in done.pictures.items():
        tracker.artifact(name, data)
    tracker.finish("FINISHED")
