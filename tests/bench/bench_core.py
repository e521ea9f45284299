"""`make bench-core`: ddpm_core against diffusers and against its floor, interleaved in this one run.

The peer is diffusers' UNet2DModel with the same parameters (checked) and weights. It stands in two rows: "same
settings" has our optimiser, EMA, memory layout, dtype, compile setting and threads; "its defaults" is what its
training example does: AdamW as torch makes it, EMAModel, the contiguous layout. A ratio above 1: we are faster.

`--precision bfloat16` asks both networks under autocast while they train, as `train.precision: auto` does on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ddpm_core import EMA, SamplerConfig, Schedule, ScheduleConfig, UNet, UNetConfig, sample
from ddpm_core.diffusers_weights import state_to_diffusers, unet_to_diffusers
from pipelines.compiled import compile_frozen
from pipelines.config import load_config
from pipelines.precision import memory_format
from tests.bench.bench_step import loop_and_floor
from tests.bench.timing import Quartiles, in_turns

_FLOPS_OF_A_TRAINING_STEP = 3  # the backward pass costs twice the forward's
_OTHER = {
    torch.channels_last: torch.contiguous_format,
    torch.contiguous_format: torch.channels_last,
}


@dataclass(frozen=True)
class Case:
    """A network at a batch that fits the machine."""

    name: str
    config: UNetConfig
    batch: int
    rounds: int


def cases(device: torch.device) -> list[Case]:
    large = device.type == "cuda"
    return [
        Case("digits 8×8", unet_of("digits.yaml"), 512 if large else 64, 20),
        Case("9M 32×32", UNetConfig(image_size=32, in_channels=3, base_channels=64), 128 if large else 4, 10),
        Case("35.7M 32×32", unet_of("cifar10.yaml"), 128 if large else 2, 7),
    ]


def unet_of(name: str) -> UNetConfig:
    """The U-Net of a configuration that ships with the project."""
    model = load_config(name).model
    assert isinstance(model, UNetConfig)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of training")
    parser.add_argument("--compiled", action="store_true", help="also train both networks compiled")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {arguments.threads} threads"
    dtype: torch.dtype = getattr(torch, arguments.precision)
    print(
        f"torch {torch.__version__}, {where}, training in {arguments.precision}; median (first–third quartile)"
    )
    for case in cases(device):
        if arguments.only in case.name:
            training(case, device, dtype, compiled=arguments.compiled)
    for case in cases(device)[:2]:
        if arguments.only in case.name:
            # fifty forwards a turn, so that a third of the turns will do
            sampling(replace(case, batch=2 * case.batch, rounds=case.rounds // 3), device)
    print("\nour training loop's step against the bare step that it holds")
    for case in cases(device)[:2]:
        if arguments.only in case.name:
            loop(case, device, arguments.precision)


def training(case: Case, device: torch.device, dtype: torch.dtype, *, compiled: bool) -> None:
    """Forward, backward, AdamW, EMA."""
    net = _network(case.config).to(device)
    peer = _peer(case.config, net).to(device)
    assert _count(net) == _count(peer)
    print(f"\ntraining step, {case.name}, {_count(net):,} parameters, batch {case.batch}")
    layout = memory_format(device, compiled=False)
    ours = _our_step(copy.deepcopy(net), case, device, dtype, layout)
    same = _peer_step_as_ours(copy.deepcopy(peer), case, device, dtype, layout)
    _row("same settings", ours, same, case.rounds)
    _row("its defaults", ours, _peer_step_at_defaults(copy.deepcopy(peer), case, device, dtype), case.rounds)
    flops = _FLOPS_OF_A_TRAINING_STEP * _forward_flops(net, case, device)
    seconds = in_turns(ours, ours, 5)[0].median
    peak = _matmul_flops(device, dtype)
    print(
        f"  {flops / seconds / 1e9:,.0f} GFLOP/s, {flops / seconds / peak:.0%} of the measured peak, "
        f"{peak / 1e9:,.0f} GFLOP/s"
    )
    other = _OTHER[layout]
    _against(
        "as trained",
        ours,
        "in the other layout",
        _our_step(copy.deepcopy(net), case, device, dtype, other),
        case,
    )
    if compiled:
        net.compile(dynamic=False)
        peer.compile(dynamic=False)
        layout = memory_format(device, compiled=True)
        fast = _our_step(net, case, device, dtype, layout)
        _against("compiled", fast, "uncompiled", ours, case)
        same = _peer_step_as_ours(peer, case, device, dtype, layout)
        _row("same settings, both compiled", fast, same, case.rounds)


def _against(name: str, ours: Callable[[], None], other: str, theirs: Callable[[], None], case: Case) -> None:
    taken, others, ratio = in_turns(ours, theirs, case.rounds)
    print(f"  {name} {taken.text(1e3, 1)} ms; {other} {others.text(1e3, 1)} ms: {ratio.text()}× its speed")


def loop(case: Case, device: torch.device, precision: str) -> None:
    """A step of `pipelines.training.Learner` against forward, backward, Adam and EMA of the same networks."""
    parts = {
        "train.batch_size": 4 * case.batch,
        "train.micro_batches": 4,
        "train.precision": precision,
    }
    model = [f"model.{name}={json.dumps(value)}" for name, value in asdict(case.config).items()]
    config = load_config("digits.yaml", [*model, *(f"{name}={value}" for name, value in parts.items())])
    ours, floor, ratio = loop_and_floor(config, case.rounds, device)
    print(
        f"  {case.name}, 4 × batch {case.batch}: {ours.text(1e3, 1)} ms; bare {floor.text(1e3, 1)} ms: "
        f"{1 / ratio.median:.3f}× ({1 / ratio.high:.3f}–{1 / ratio.low:.3f})"
    )


def sampling(case: Case, device: torch.device) -> None:
    """50 steps of DDIM, η = 0: our sampler with its network, against bare forwards and diffusers' DDIMPipeline."""
    net = _network(case.config).to(device).eval().requires_grad_(False)
    peer = _peer(case.config, net).to(device).eval()
    schedule = Schedule.from_config(ScheduleConfig())
    config = SamplerConfig(kind="ddim", num_steps=50, eta=0.0, spacing="leading")
    shape = (case.config.in_channels, case.config.image_size, case.config.image_size)
    index = torch.arange(case.batch, device=device)
    pipeline = DDIMPipeline(
        unet=peer, scheduler=DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=True)
    )
    pipeline.set_progress_bar_config(disable=True)

    def ours(network: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        with torch.inference_mode():
            x = sample(network, schedule, config, seed=0, index=index, shape=shape, device=device)
        _wait(device)
        return x

    def theirs() -> None:
        pipeline(batch_size=case.batch, num_inference_steps=50, output_type="np")

    x, t = torch.randn(case.batch, *shape, device=device), torch.full_like(index, 500)

    def forwards() -> None:
        with torch.inference_mode():
            for _ in range(50):
                net(x, t)
            _wait(device)

    print(f"\nsampling, {case.name}, batch {case.batch}, 50 steps of DDIM")
    taken, bare, ratio = in_turns(lambda: ours(net), forwards, case.rounds)
    print(
        f"  uncompiled {taken.text(1e3, 0)} ms; 50 bare forwards {bare.text(1e3, 0)} ms: "
        f"{1 / ratio.median:.3f}× ({1 / ratio.high:.3f}–{1 / ratio.low:.3f})"
    )
    frozen = frozen_copy(net, x, t)
    error = float((ours(frozen) - ours(net)).abs().max())
    assert error < 1e-3, f"the compiled network's images differ by {error}"
    _row("DDIMPipeline as it comes, ours compiled", lambda: ours(frozen), theirs, case.rounds)
    peer.to(memory_format=torch.channels_last)
    compile_frozen(peer, lambda: peer(x, t))
    _row("DDIMPipeline with its network compiled too", lambda: ours(frozen), theirs, case.rounds)
    print(f"  images with the compiled network within {error:.1e} of those without")


def frozen_copy(net: nn.Module, x: Tensor, t: Tensor) -> nn.Module:
    """The network as `sample.compile` has it."""
    frozen = copy.deepcopy(net)
    start = time.perf_counter()
    compile_frozen(frozen, lambda: frozen(x, t))
    print(f"  compiled in {time.perf_counter() - start:.0f} s")
    return frozen


def _network(config: UNetConfig) -> UNet:
    torch.manual_seed(0)
    net = UNet(config)
    with torch.no_grad():
        for parameter in net.parameters():
            if not bool(parameter.any()):  # a fresh network's output is exactly zero
                parameter.normal_(std=0.02)
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _peer(config: UNetConfig, net: UNet) -> UNet2DModel:
    peer = UNet2DModel(**unet_to_diffusers(config))
    peer.load_state_dict(state_to_diffusers(config, net.state_dict()))
    return peer


def _our_step(
    net: nn.Module, case: Case, device: torch.device, dtype: torch.dtype, layout: torch.memory_format
) -> Callable[[], None]:
    net = net.to(memory_format=layout)  # type: ignore[call-overload]
    ema = EMA(net, 0.9999)
    return _step(net, net, _fused(net), lambda: ema.update(net, 0), case, device, dtype, layout)


def _peer_step_as_ours(
    peer: nn.Module, case: Case, device: torch.device, dtype: torch.dtype, layout: torch.memory_format
) -> Callable[[], None]:
    peer = peer.to(memory_format=layout)  # type: ignore[call-overload]
    ema = EMA(peer, 0.9999)
    call = lambda x, t: peer(x, t).sample  # noqa: E731
    return _step(peer, call, _fused(peer), lambda: ema.update(peer, 0), case, device, dtype, layout)


def _peer_step_at_defaults(
    peer: nn.Module, case: Case, device: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    ema = EMAModel(peer.parameters(), decay=0.9999)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-4)
    call = lambda x, t: peer(x, t).sample  # noqa: E731
    return _step(
        peer,
        call,
        optimizer,
        lambda: ema.step(peer.parameters()),
        case,
        device,
        dtype,
        torch.contiguous_format,
    )


def _fused(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)


def _step(
    net: nn.Module,
    call: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    average: Callable[[], None],
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> Callable[[], None]:
    net.train()
    size = case.config.image_size
    x = torch.randn(case.batch, case.config.in_channels, size, size, device=device).to(memory_format=layout)
    noise, t = torch.randn_like(x), torch.randint(0, 1000, (case.batch,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        with _autocast(device, dtype):
            eps = call(x, t)
        (eps - noise).square().mean().backward()
        optimizer.step()
        average()
        _wait(device)

    return step


def _row(name: str, ours: Callable[[], Any], peer: Callable[[], Any], rounds: int) -> None:
    taken, others, ratio = in_turns(ours, peer, rounds)
    print(
        f"  diffusers, {name}: {others.text(1e3, 1)} ms; ours {taken.text(1e3, 1)} ms: {ratio.text()}× its speed"
    )


def _forward_flops(net: nn.Module, case: Case, device: torch.device) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    size = case.config.image_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(case.batch, case.config.in_channels, size, size, device=device), _zeros(case, device))
    return float(counter.get_total_flops())


def _zeros(case: Case, device: torch.device) -> Tensor:
    return torch.zeros(case.batch, dtype=torch.int64, device=device)


def _autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def _matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of a few."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        torch.mm(a, b)
        _wait(device)

    best: Quartiles = in_turns(product, product, 8)[0]
    return 2 * size**3 / best.low


def _count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
