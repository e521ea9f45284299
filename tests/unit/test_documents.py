"""The documents: what they link to and name is there, and no placeholder was left."""

import ast
import importlib
import re
import unicodedata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)", text)
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert missing == []
    assert "@@" not in text
    if document.name == "README.md":
        assert len(links) > 10


MATHEMATICS = (ROOT / "docs" / "mathematics.md").read_text(encoding="utf-8")

# What names of parts that are written beside this one begin with. To be emptied when they have been joined.
PENDING = (
    *(
        f"ddpm_core.{module}."
        for module in (
            "dit",
            "guidance",
            "ledger",
            "networks",
            "paths",
            "posthoc_ema",
            "processes",
            "respacing",
            "steps",
            "timesteps",
            "two_sided",
        )
    ),
    "ddpm_core.bound.reverse_of_sampler",
    "ddpm_core.ema.HalfLife",
    "ddpm_core.objectives.loss_weights",
    "ddpm_core.objectives.training_loss",
    "ddpm_core.predictions.convert_prediction",
    "ddpm_core.reverse.dynamic_threshold",
    "ddpm_core.schedules.Schedule.validate",
    "ddpm_core.schedules.rescale_zero_terminal_snr",
    *(
        f"tests/unit/test_core_{part}.py::"
        for part in (
            "bound_decoder",
            "bound_identity",
            "bound_terms",
            "ema_posthoc",
            "guidance",
            "ledger",
            "networks",
            "objectives",
            "paths",
            "predictions",
            "processes_equal_snr",
            "sampler_orders",
            "samplers_moments",
            "schedules_advice",
            "schedules_kinds",
            "timesteps",
            "two_sided",
        )
    ),
    "tests/unit/test_core_ema.py::test_a_half_life_halves_a_weights_share",
)


def exists(name: str) -> bool:
    """Whether "ddpm_core.module.name" can be imported, or "tests/file.py::test" is a function of that file."""
    if name.startswith("tests/"):
        path, _, function = name.partition("::")
        if not (ROOT / path).is_file() or not function:
            return (ROOT / path).is_file()
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        return any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body)
    found = importlib.import_module("ddpm_core")
    path = "ddpm_core"
    for part in name.split(".")[1:]:
        path = f"{path}.{part}"
        if not hasattr(found, part):
            try:
                importlib.import_module(path)
            except ImportError:
                return False
        found = getattr(found, part)
    return True


def test_every_name_in_the_mathematics_exists() -> None:
    names = set(re.findall(r"\bddpm_core(?:\.\w+)+|\btests/[\w/]+\.py(?:::\w+)?", MATHEMATICS))
    assert len(names) > 100
    assert sorted(name for name in names if not name.startswith(PENDING) and not exists(name)) == []


@pytest.mark.parametrize(
    "name",
    [
        "ddpm_core.process.q_sampel",
        "ddpm_core.no_module.q_sample",
        "ddpm_core.schedules.Schedule.no_method",
        "tests/unit/test_documents.py::test_that_is_not_there",
        "tests/unit/test_no_file.py::test_links_lead_somewhere",
    ],
)
def test_a_wrong_name_is_seen(name: str) -> None:
    assert not exists(name)


def test_every_slip_and_its_test_are_in_the_mathematics() -> None:
    tree = ast.parse((ROOT / "tests/unit/test_core_slips.py").read_text(encoding="utf-8"))
    tests = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and "test_" in node.name]
    assert len(tests) >= 15
    assert [name for name in tests if f"test_core_slips.py::{name}`" not in MATHEMATICS] == []


def test_no_subscript_is_taken_for_emphasis() -> None:
    """Outside code an underscore after a space or a symbol, as in a product's limits, would begin italics."""
    prose = re.sub(r"`[^`]*`|^    .*$", "", MATHEMATICS, flags=re.MULTILINE)
    found = [
        prose[max(0, match.start() - 20) : match.end() + 20]
        for match in re.finditer("_", prose)
        if unicodedata.category(prose[match.start() - 1])[0] in "PSZC"
    ]
    assert found == []
