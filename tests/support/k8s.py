"""Kubernetes manifests as a cluster would take them: rendered by kustomize, checked against the schemas.

Schemas alone: rules in CEL (`x-kubernetes-validations`) and the operator's own checks are not evaluated.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

CRDS_VARIABLE = "KUBERAY_CRDS"
KUBERNETES_VERSIONS = ("1.30", kubernetes_validate.latest_version())

_VALUE_RULES = ("type", "enum", "pattern", "minimum", "maximum", "minItems", "maxItems", "required", "anyOf")


def render(folder: Path) -> list[dict[str, Any]]:
    """The objects that `kubectl apply -k folder` would send; fails the test where kubectl is missing."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.fail("these tests need kubectl on PATH (Debian and Ubuntu: the package kubernetes-client)")
    done = subprocess.run(
        [kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        pytest.fail(f"kubectl kustomize {folder}: {done.stderr.strip()}")
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def crd_schema(kind: str, api_version: str) -> dict[str, Any]:
    """KubeRay's schema of a kind, strict; fails the test where the folder with the CRDs is not given."""
    folder = os.environ.get(CRDS_VARIABLE)
    if not folder:
        pytest.fail(
            f"these tests need {CRDS_VARIABLE}=FOLDER with KubeRay's CRDs (ray.io_rayjobs.yaml, … from "
            "helm-chart/kuberay-operator/crds of its repository)"
        )
    group, version = api_version.split("/")
    file = Path(folder) / f"{group}_{kind.lower()}s.yaml"
    if not file.is_file():
        pytest.fail(f"{CRDS_VARIABLE}={folder}: has no {file.name}")
    # libyaml where there is one: the file has a megabyte
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    crd = yaml.load(file.read_text(encoding="utf-8"), loader)
    for served in crd["spec"]["versions"]:
        if served["name"] == version:
            return strict(served["schema"]["openAPIV3Schema"])
    pytest.fail(f"{file}: does not serve {api_version}")


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema as a JSON schema in which an unknown field is an error, as it is to the API server."""
    found = {rule: schema[rule] for rule in _VALUE_RULES if rule in schema}
    if schema.get("x-kubernetes-int-or-string"):
        found["type"] = ["integer", "string"]
    if schema.get("nullable"):
        found["anyOf"] = [{"type": "null"}, {"type": found.pop("type")}]
    if "items" in schema:
        found["items"] = strict(schema["items"])
    extra = schema.get("additionalProperties")
    if isinstance(extra, dict):
        found["additionalProperties"] = strict(extra)
    if "properties" in schema:
        found["properties"] = {name: strict(inner) for name, inner in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            found.setdefault("additionalProperties", False)
    return found


def schema_errors(value: Any, schema: dict[str, Any]) -> list[str]:
    """What in a value does not fit a schema, each with the path of its field."""
    errors = jsonschema.Draft202012Validator(schema).iter_errors(value)
    return [f"{error.json_path}: {error.message}" for error in errors]


def core_errors(manifest: dict[str, Any]) -> list[str]:
    """What in one of Kubernetes' own objects its schema refuses, strictly, in an old and a new version."""
    errors = []
    for version in KUBERNETES_VERSIONS:
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            errors.append(f"Kubernetes {version}: {error.json_path}: {error.message}")
    return errors


def pod_template_errors(template: dict[str, Any]) -> list[str]:
    """As `core_errors`, for a pod template that is part of another object."""
    manifest = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
    return core_errors(manifest)


def metadata_errors(metadata: dict[str, Any]) -> list[str]:
    """As `core_errors`, for the metadata of any object, which CRDs leave open."""
    return core_errors({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata})
