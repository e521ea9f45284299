"""Each of a user's mistakes costs one line that names what is wrong, exit code 2, and leaves nothing half-made."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.jobs import ddpm, one_line_mistake

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ("--config", "digits.yaml")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment without any server in it."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_", "MLFLOW_"))
    }
    return {**kept, "DDPM_STATE": str(tmp_path / "state"), "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.fixture
def data(tmp_path: Path, environment: dict[str, str]) -> tuple[str, ...]:
    """A prepared data set on disk, and where its runs would go."""
    here = ("--set", f"data.uri={tmp_path / 'data'}", "--set", f"storage={tmp_path / 'out'}")
    assert ddpm("prepare", "digits", *CONFIG, *here, env=environment).returncode == 0
    return (*CONFIG, *here)


@pytest.fixture
def closed_port() -> int:
    """A port at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("schedule.beta_strat=1e-4", ("schedule.beta_strat", "did you mean 'beta_start'")),
        ("schedule.num_timesteps=many", ("schedule.num_timesteps", "'many'")),
        ("schedule.beta_end=2", ("schedule.beta_end", "2")),
        ("train.batch_size=0", ("train.batch_size", "0")),
        ("nonsense", ("nonsense", "section.key=value")),
    ],
)
def test_wrong_setting(override: str, named: tuple[str, ...], environment: dict[str, str]) -> None:
    one_line_mistake(ddpm("train", *CONFIG, "--set", override, "--dry-run", env=environment), *named)


def test_missing_configuration(environment: dict[str, str]) -> None:
    one_line_mistake(ddpm("train", "--config", "nowhere.yaml", env=environment), "nowhere.yaml")


def test_empty_image_folder(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "images").mkdir()
    out = tmp_path / "data"
    result = ddpm("prepare", str(tmp_path / "images"), *CONFIG, "--out", str(out), env=environment)
    one_line_mistake(result, str(tmp_path / "images"))
    assert not [path for path in out.rglob("*") if path.is_file()]


def test_no_data_set(tmp_path: Path, environment: dict[str, str]) -> None:
    where = ("--set", f"data.uri={tmp_path / 'none'}", "--set", f"storage={tmp_path / 'out'}")
    one_line_mistake(ddpm("train", *CONFIG, *where, "--local", env=environment), "none", "ddpm prepare")
    assert not (tmp_path / "out").exists()


def test_unreachable_s3(closed_port: int, environment: dict[str, str]) -> None:
    environment |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{closed_port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "not-to-be-shown",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    line = one_line_mistake(
        ddpm("prepare", "digits", *CONFIG, env=environment), f"127.0.0.1:{closed_port}", "does not answer"
    )
    assert "not-to-be-shown" not in line


def test_unreachable_mlflow(
    closed_port: int, environment: dict[str, str], data: tuple[str, ...], tmp_path: Path
) -> None:
    environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{closed_port}"
    one_line_mistake(
        ddpm("train", *data, "--local", env=environment), f"127.0.0.1:{closed_port}", "no MLflow server"
    )
    assert not (tmp_path / "out").exists()


def test_unreachable_cluster(
    closed_port: int, environment: dict[str, str], data: tuple[str, ...], tmp_path: Path
) -> None:
    address = f"127.0.0.1:{closed_port}"
    one_line_mistake(ddpm("train", *data, "--address", address, env=environment), address, "does not answer")
    one_line_mistake(ddpm("tune", *data, "--address", address, env=environment), address, "does not answer")
    one_line_mistake(
        ddpm("submit", "train", *data, "--address", f"http://{address}", env=environment), address
    )
    one_line_mistake(ddpm("train", *data, env=environment), "no Ray cluster", "ddpm up")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_more_workers_than_parts(environment: dict[str, str]) -> None:
    one_line_mistake(
        ddpm("train", *CONFIG, "--set", "workers.num=9", "--dry-run", env=environment),
        "workers.num",
        "train.micro_batches 4",
    )


def test_data_of_another_shape(environment: dict[str, str], data: tuple[str, ...]) -> None:
    other = ("--set", "model.image_size=16", "--set", "model.attention_resolutions=[8]")
    result = ddpm("train", *data, *other, "--dry-run", env=environment)
    one_line_mistake(result, "model.image_size: 16", "8×8")


def test_no_suitable_python(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\necho 'Python 3.9.1'; exit 1\n")
    old.chmod(0o755)
    result = subprocess.run(
        ["sh", "infra/local/make_venv.sh", str(tmp_path / "venv")],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(old)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    one_line_mistake(result, "3.11, 3.12 or 3.13")
    assert not (tmp_path / "venv").exists()
