"""What holds on a GPU as on a CPU. `make test-gpu`, which fails where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddpm_core import SamplerConfig, rng
from ddpm_core.networks import build_network
from ddpm_core.samplers import sample
from ddpm_core.schedules import Schedule
from pipelines.compiled import compile_frozen
from pipelines.config import Config
from pipelines.config_sections import DataConfig
from pipelines.dataset import Dataset
from pipelines.images import to_model
from pipelines.reader import StreamBatches
from pipelines.reader_process import ProcessBatches, begin
from pipelines.reading import Reading
from pipelines.training import Learner, StepResult
from pipelines.world import SingleWorker
from tests.support.data import packed, put_dataset, random_images
from tests.support.jobs import ddpm, settings, succeeded
from tests.support.runs import made_up_batches, tiny_config

pytestmark = pytest.mark.gpu
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPE = (3, 32, 32)


@pytest.fixture(autouse=True)
def _a_gpu() -> None:
    assert torch.cuda.is_available(), "make test-gpu needs a GPU that torch can use"


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32, where torch's default is TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    images = random_images(2048, SHAPE)
    shards = [packed(images[first : first + 512], first) for first in range(0, 2048, 512)]
    return put_dataset(f"file://{tmp_path_factory.mktemp('data')}", {"train": shards}, SHAPE)


def read(dataset: Dataset, **options: bool | None) -> StreamBatches:
    return StreamBatches(
        dataset,
        "train",
        seed=0,
        num_streams=2,
        streams=[0, 1],
        micro_batch_size=32,
        stop_step=96,
        flip=True,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_are_pinned_and_reach_a_busy_gpu_whole(dataset: Dataset, channels_last: bool) -> None:
    """A batch is let go of while its copy waits behind other work: its memory must not be used again meanwhile."""
    with read(dataset, pin_memory=False, channels_last=channels_last) as batches:
        expected = [part.x_start for parts in batches for part in parts]
    work = torch.randn(4096, 4096, device=GPU)
    got = []
    with read(dataset, channels_last=channels_last) as batches:
        for parts in batches:
            for part in parts:
                assert part.x_start.is_pinned()
                work = torch.mm(work, work).clamp(-1, 1)
                got.append(part.x_start.to(GPU, non_blocking=True))
                del part
    assert len(got) == len(expected) == 192
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.stride() == theirs.stride()
        assert torch.equal(ours.cpu(), theirs)


def test_what_another_process_reads_is_pinned_and_becomes_the_same_numbers(dataset: Dataset) -> None:
    with read(dataset, pin_memory=False) as batches:
        expected = [part.x_start for parts in batches for part in parts]
    asked = Reading(
        dataset,
        "train",
        DataConfig(uri=dataset.uri, flip=True, reader="process"),
        seed=0,
        num_streams=2,
        streams=(0, 1),
        micro_batch_size=32,
        stop_step=96,
        for_gpu=True,
    )
    work = torch.randn(4096, 4096, device=GPU)
    got = []
    with begin(asked) as steps:
        assert isinstance(steps, ProcessBatches)
        for parts in steps:
            work = torch.mm(work, work).clamp(-1, 1)
            assert all(part.x_start.is_pinned() for part in parts)
            got += [to_model(part.x_start.to(GPU, non_blocking=True)) for part in parts]
    assert len(got) == len(expected)
    assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(got, expected, strict=True))


def test_bytes_become_the_same_numbers() -> None:
    images = torch.arange(256, dtype=torch.uint8)
    for levels in range(2, 257):
        assert torch.equal(to_model(images.to(GPU), levels).cpu(), to_model(images, levels)), levels


def test_random_numbers_are_those_of_a_cpu() -> None:
    index = torch.tensor([0, 1, 7, 2**31, 2**40 + 3])
    for shape in ((), (5,), (3, 16, 16)):
        assert torch.equal(rng.uniform(3, "u", index.to(GPU), shape).cpu(), rng.uniform(3, "u", index, shape))
        ours, theirs = rng.normal(3, "n", index.to(GPU), shape).cpu(), rng.normal(3, "n", index, shape)
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(rng.integers(3, "i", index.to(GPU), 1000).cpu(), rng.integers(3, "i", index, 1000))


def steps(
    config: Config, device: torch.device, learner: Learner | None = None, first: int = 0, last: int = 6
) -> tuple[Learner, list[StepResult]]:
    learner = learner or Learner(config, device)
    results = [learner.step(k, made_up_batches(config, k), SingleWorker(device)) for k in range(first, last)]
    return learner, results


@pytest.mark.usefixtures("exact")
def test_training_in_float32_is_that_of_a_cpu() -> None:
    # dropout is drawn by each device's own generator
    config = tiny_config("train.precision=float32", "model.dropout=0", "model.attention_resolutions=[8]")
    theirs, expected = steps(config, CPU)
    ours, got = steps(config, GPU)
    for a, b in zip(got, expected, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-3)
    for name, average in theirs.ema.tensors.items():
        assert torch.allclose(ours.ema.tensors[name].cpu(), average, rtol=1e-3, atol=1e-4), name


def test_a_gpu_trains_in_bfloat16_near_float32() -> None:
    _, expected = steps(tiny_config("train.precision=float32"), GPU)
    _, got = steps(tiny_config(), GPU)
    assert [a.grad_norm for a in got] != [b.grad_norm for b in expected], "not in bfloat16"
    for a, b in zip(got, expected, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=0.02)


@pytest.mark.parametrize("size", ["tiny", "wide"])
def test_a_run_that_goes_on_is_the_undisturbed_run(size: str) -> None:
    wide = ["model.base_channels=128", "model.channel_mults=[1,2]", "model.attention_resolutions=[4]"]
    config = tiny_config("train.batch_size=64", *(wide if size == "wide" else ()))
    whole, expected = steps(config, GPU)
    first, begun = steps(config, GPU, last=3)
    saved = first.state(3)
    second = Learner(config, GPU)
    second.load(saved)
    _, rest = steps(config, GPU, second, first=3)
    assert begun + rest == expected
    for group, tensors in whole.state(6).groups.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, second.state(6).groups[group][name]), (group, name)


def test_compiled_training_is_training() -> None:
    config = tiny_config("train.precision=float32", "model.dropout=0")
    _, expected = steps(config, GPU)
    _, got = steps(tiny_config("train.precision=float32", "model.dropout=0", "train.compile=true"), GPU)
    for a, b in zip(got, expected, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=2e-3)


def test_images_depend_on_their_numbers_alone_and_are_near_those_of_a_cpu() -> None:
    config = tiny_config()
    torch.manual_seed(0)
    net = build_network(config.model).eval().requires_grad_(False)
    for parameter in net.parameters():
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.02)
    schedule = Schedule.from_config(config.schedule)
    sampler = SamplerConfig(kind="ddim", num_steps=10, eta=0.5)

    def made(device: torch.device, numbers: list[int], network: torch.nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            return sample(
                network,
                schedule.to(device),
                sampler,
                seed=1,
                index=torch.tensor(numbers, device=device),
                shape=(1, 8, 8),
                device=device,
            ).cpu()

    on_cpu = made(CPU, [0, 1, 2, 3], net)
    on_gpu = made(GPU, [0, 1, 2, 3], net.to(GPU))
    assert torch.allclose(on_gpu, on_cpu, atol=5e-3)
    assert torch.equal(made(GPU, [9, 1, 3, 7], net)[1:3], on_gpu[[1, 3]])
    x, t = torch.zeros(4, 1, 8, 8, device=GPU), torch.zeros(4, dtype=torch.int64, device=GPU)
    compile_frozen(net, lambda: net(x, t))
    assert torch.allclose(made(GPU, [0, 1, 2, 3], net), on_gpu, atol=5e-3)


def test_the_jobs_run_on_it(tmp_path: Path) -> None:
    place = settings(f"data.uri={tmp_path}/data", f"storage={tmp_path}", "train.steps=20", "sample.count=20")
    succeeded(ddpm("prepare", "digits", *place, "--local"))
    succeeded(ddpm("train", *place, "--local"))
    succeeded(ddpm("sample", *place, "--local"))
    assert "bits/dim" in succeeded(ddpm("evaluate", *place, "--local"))
