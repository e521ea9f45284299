"""The arrows between the layers, read from the imports, wherever in a file they stand."""

from __future__ import annotations

import ast
import fnmatch
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("ddpm_core", "pipelines", "jobs", "infra")
OURS = (*LAYERS, "tests")

# which of our own packages each layer may import, itself apart
ALLOWED = {
    "ddpm_core": set(),
    "pipelines": {"ddpm_core"},
    "jobs": {"pipelines", "ddpm_core", "infra"},
    "infra": set(),
}
# packages that one file alone may import
SOLE_IMPORTER = {
    "boto3": "pipelines/adapters/s3.py",
    "botocore": "pipelines/adapters/s3.py",
    "mlflow": "pipelines/adapters/mlflow.py",
}
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "torch.load",
    "torch.save",
    "yaml.load",
    "yaml.unsafe_load",
}
TOP_LEVEL = {
    *LAYERS,
    "k8s",
    "tests",
    "docs",
    "pyproject.toml",
    "constraints.txt",
    "README.md",
    "Makefile",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
}


def imported(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, those inside functions and under TYPE_CHECKING as well."""
    package = path.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield node.lineno, ".".join([*base, *([node.module] if node.module else [])])
        elif isinstance(node, ast.Call) and _name(node.func).rpartition(".")[2] in (
            "import_module",
            "__import__",
        ):
            for argument in node.args[:1]:
                text = argument
                if isinstance(text, ast.JoinedStr):
                    text = text.values[0]
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    yield node.lineno, text.value.rstrip(".")


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def wrong_imports(source: str, path: str) -> list[str]:
    layer = path.split("/")[0]
    found = []
    for line, name in imported(ast.parse(source), path):
        top = name.split(".")[0]
        wrong = (
            (top in OURS and top != layer and top not in ALLOWED[layer])
            or (
                layer == "ddpm_core"
                and top not in sys.stdlib_module_names
                and top not in ("torch", "ddpm_core")
            )
            or (top in SOLE_IMPORTER and SOLE_IMPORTER[top] != path)
            or top in PICKLES
        )
        if wrong:
            found.append(f"{path}:{line}: imports {name}")
    return found


def wrong_calls(source: str, path: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = _name(node.func)
        if name in FORBIDDEN_CALLS:
            found.append(f"{path}:{node.lineno}: calls {name}")
        for keyword in node.keywords:
            if keyword.arg in ("shell", "allow_pickle") and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            ):
                found.append(f"{path}:{node.lineno}: gives {keyword.arg}=")
    return found


def sources() -> list[Path]:
    return sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def test_every_arrow_runs_downwards() -> None:
    files = sources()
    assert {path.relative_to(ROOT).parts[0] for path in files} == set(LAYERS)
    found = [
        wrong
        for path in files
        for wrong in wrong_imports(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]
    assert found == []


def test_nothing_pickles_evaluates_or_runs_a_shell() -> None:
    found = [
        wrong
        for path in sources()
        for wrong in wrong_calls(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]
    assert found == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ddpm_core/x.py", "import numpy"),
        ("ddpm_core/x.py", "from pipelines import errors"),
        ("ddpm_core/sub/x.py", "def f():\n    from ...pipelines import errors"),
        ("pipelines/x.py", "def f():\n    import jobs.cli"),
        ("pipelines/x.py", "if TYPE_CHECKING:\n    from infra.local import up"),
        ("pipelines/x.py", "import boto3.session"),
        ("pipelines/adapters/mlflow.py", "from botocore.config import Config"),
        ("pipelines/train.py", "import mlflow"),
        ("pipelines/x.py", "import importlib\nimportlib.import_module('jobs.cli')"),
        ("infra/local/x.py", "from pipelines.errors import UserError"),
        ("infra/x.py", "import ddpm_core"),
        ("jobs/x.py", "import tests.support"),
        ("jobs/x.py", "import boto3"),
        ("jobs/x.py", "import pickle"),
    ],
)
def test_a_wrong_arrow_is_seen(path: str, source: str) -> None:
    assert len(wrong_imports(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ddpm_core/x.py", "import torch.nn\nfrom ddpm_core import rng\nimport math"),
        ("ddpm_core/sub/x.py", "from .. import rng\nfrom ..types import EpsTheta"),
        ("pipelines/x.py", "import ray\nfrom ddpm_core.unet import UNet\nfrom pipelines import storage"),
        ("pipelines/adapters/s3.py", "import boto3\nfrom botocore.config import Config"),
        ("jobs/x.py", "from infra.local import up\nfrom jobs import common\nimport pipelines.config"),
    ],
)
def test_a_right_arrow_is_left_alone(path: str, source: str) -> None:
    assert wrong_imports(source, path) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "import torch\ntorch.load('x')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import os\nos.system('ls')",
    ],
)
def test_a_forbidden_call_is_seen(source: str) -> None:
    assert len(wrong_calls(source, "jobs/x.py")) == 1


def test_harmless_calls_are_left_alone() -> None:
    assert (
        wrong_calls("model.eval()\nsubprocess.run(['ls'], shell=False)\nyaml.safe_load('1')", "jobs/x.py")
        == []
    )


def test_the_top_level_holds_only_what_the_design_names() -> None:
    ignored = [
        line.strip().strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line.strip()
    ]
    found = {
        path.name
        for path in ROOT.iterdir()
        if not path.name.startswith(".")
        and not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored)
    }
    assert found - TOP_LEVEL == set()
    assert {
        *LAYERS,
        "k8s",
        "tests",
        "docs",
        "pyproject.toml",
        "constraints.txt",
        "Makefile",
        "LICENSE",
    } <= found


def test_every_package_folder_is_a_package() -> None:
    folders = {path.parent for path in sources()} | {path.parent for path in (ROOT / "tests").rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []
