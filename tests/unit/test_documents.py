"""The documents: what they link to and name is there, and no placeholder was left."""

import ast
import dataclasses
import importlib
import re
import unicodedata
from pathlib import Path

import pytest

from ddpm_core.dit import DiTConfig
from ddpm_core.unet import UNetConfig
from pipelines.config import Config

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


def test_every_setting_has_its_row_and_every_row_its_setting() -> None:
    told: list[str] = []
    for line in (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8").splitlines():
        section = ""
        for name in re.findall(r"`([\w.]+)`", line.split("|")[1]) if line.startswith("| `") else ():
            # a row names its section once
            section = name.rpartition(".")[0] or section
            told.append(".".join(part for part in (section, name.rpartition(".")[2]) if part))
    there = {name for name in Config.model_fields if name in ("name", "seed", "storage")}
    for section, field in Config.model_fields.items():
        if section not in there and section != "model":
            assert isinstance(field.annotation, type)
            names = getattr(field.annotation, "model_fields", None) or (
                option.name for option in dataclasses.fields(field.annotation)
            )
            there |= {f"{section}.{name}" for name in names}
    for network in (UNetConfig, DiTConfig):
        there |= {f"model.{option.name}" for option in dataclasses.fields(network)}
    assert sorted(set(told)) == sorted(there)


MATHEMATICS = (ROOT / "docs" / "mathematics.md").read_text(encoding="utf-8")


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
    assert sorted(name for name in names if not exists(name)) == []


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
