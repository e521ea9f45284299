"""The Kubernetes manifests and the image: they render, fit the schemas, and suffice for what they run.

Needs kubectl and KubeRay's CRDs: `make test-k8s`.  No cluster: nothing here shows that a pod starts.
"""

from __future__ import annotations

import copy
import importlib.metadata
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from jobs.cli import command_parser
from pipelines.config import Config, load_config
from pipelines.config_sections import WorkersConfig
from pipelines.errors import UserError
from tests.support import k8s

pytestmark = pytest.mark.k8s

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "k8s" / "base"
DOCKERFILE = ROOT / "infra" / "images" / "Dockerfile"
GPU = "nvidia.com/gpu"

Manifest = dict[str, Any]


@pytest.fixture(scope="module")
def manifests() -> list[Manifest]:
    return k8s.render(BASE)


@pytest.fixture(scope="module")
def rayjob(manifests: list[Manifest]) -> Manifest:
    (found,) = (manifest for manifest in manifests if manifest["kind"] == "RayJob")
    return found


@pytest.fixture(scope="module")
def rayjob_schema() -> dict[str, Any]:
    return k8s.crd_schema("RayJob", "ray.io/v1")


def pod_templates(rayjob: Manifest) -> dict[str, Manifest]:
    cluster = rayjob["spec"]["rayClusterSpec"]
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **workers}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def configuration(entrypoint: str) -> Config:
    """The configuration that a job's command runs, read as the command itself reads it."""
    program, command, *rest = shlex.split(entrypoint)
    assert project()["scripts"][program] == "jobs.cli:main"
    arguments = command_parser(command).parse_args(rest)
    assert not arguments.local
    return load_config(arguments.config, arguments.overrides)


# --- what is missing is an error, never a skip


def test_no_kubectl_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match="need kubectl on PATH"):
        k8s.render(BASE)


@pytest.mark.parametrize(
    ("folder", "says"), [("", "need KUBERAY_CRDS=FOLDER"), ("here", "has no ray.io_rayjobs")]
)
def test_no_crds_fails(folder: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(k8s.CRDS_VARIABLE, folder and str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match=says):
        k8s.crd_schema("RayJob", "ray.io/v1")


def test_a_base_that_does_not_render_fails(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [missing.yaml]\n")
    with pytest.raises(pytest.fail.Exception, match="missing"):
        k8s.render(tmp_path)


# --- the schemas


def test_the_base_holds_what_it_should(manifests: list[Manifest]) -> None:
    assert sorted(manifest["kind"] for manifest in manifests) == ["ConfigMap", "RayJob", "ServiceAccount"]
    for manifest in manifests:
        assert "namespace" not in manifest["metadata"], "the user chooses it"
        assert k8s.metadata_errors(manifest["metadata"]) == []


def test_the_rayjob_fits_kuberays_schema(rayjob: Manifest, rayjob_schema: dict[str, Any]) -> None:
    assert k8s.schema_errors(rayjob, rayjob_schema) == []


def test_core_objects_fit_kubernetes_schema(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        if manifest["kind"] != "RayJob":
            assert k8s.core_errors(manifest) == []


def test_pod_templates_fit_kubernetes_schema(rayjob: Manifest) -> None:
    for template in pod_templates(rayjob).values():
        assert k8s.pod_template_errors(template) == []


def _head(rayjob: Manifest) -> Manifest:
    found: Manifest = rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    return found


def _group(rayjob: Manifest) -> Manifest:
    found: Manifest = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    return found


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda job: job["spec"].update(backofLimit=2), "backofLimit"),
        (lambda job: job["spec"]["rayClusterSpec"]["authOptions"].update(mode="tokens"), "tokens"),
        (lambda job: job["spec"]["rayClusterSpec"].pop("headGroupSpec"), "headGroupSpec"),
        (lambda job: _group(job).update(replicas="8"), "replicas"),
        (lambda job: _group(job)["rayStartParams"].update({"num-cpus": 2}), "num-cpus"),
        (lambda job: _head(job).update(serviceAcountName="ddpm"), "serviceAcountName"),
        (lambda job: _head(job)["containers"][0]["resources"]["limits"].update(memory="8 GB"), "8 GB"),
        (lambda job: _head(job)["containers"][0]["resources"]["limits"].update(cpu=[2]), "cpu"),
    ],
)
def test_kuberays_schema_refuses_mistakes(
    spoil: Callable[[Manifest], None], says: str, rayjob: Manifest, rayjob_schema: dict[str, Any]
) -> None:
    spoilt = copy.deepcopy(rayjob)
    spoil(spoilt)
    errors = k8s.schema_errors(spoilt, rayjob_schema)
    assert errors
    assert all(says in error for error in errors)


def test_kubernetes_schema_refuses_mistakes(manifests: list[Manifest], rayjob: Manifest) -> None:
    (config_map,) = (manifest for manifest in manifests if manifest["kind"] == "ConfigMap")
    assert len(k8s.core_errors({**config_map, "dta": {}})) == len(k8s.KUBERNETES_VERSIONS)
    template = copy.deepcopy(pod_templates(rayjob)["head"])
    template["spec"]["containers"][0]["readynessProbe"] = {}
    assert "readynessProbe" in k8s.pod_template_errors(template)[0]
    assert "lables" in k8s.metadata_errors({"name": "x", "lables": {}})[0]


# --- what schemas do not know


def test_the_entrypoint_is_a_command_of_ours(rayjob: Manifest) -> None:
    assert configuration(rayjob["spec"]["entrypoint"]).name == "cifar10"
    with pytest.raises(SystemExit):
        configuration("ddpm train --confg cifar10.yaml")
    with pytest.raises(UserError, match=re.escape("cifar11.yaml: no such configuration file")):
        configuration("ddpm train --config cifar11.yaml")


def places(group: Manifest, workers: WorkersConfig) -> int:
    """How many training workers a group of Ray nodes has room for."""
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    cpus, gpus = (float(group["rayStartParams"][f"num-{kind}"]) for kind in ("cpus", "gpus"))
    assert container["resources"]["requests"] == limits, "what Ray hands out must be there"
    assert cpus <= float(limits["cpu"]), "Ray must not hand out more than the pod has"
    assert gpus == float(limits[GPU])
    a_pod = min(cpus // workers.cpus, gpus // workers.gpus if workers.gpus else cpus // workers.cpus)
    return int(a_pod) * int(group["replicas"])


def test_the_cluster_fits_its_configuration(rayjob: Manifest) -> None:
    cluster = rayjob["spec"]["rayClusterSpec"]
    workers = configuration(rayjob["spec"]["entrypoint"]).workers
    assert workers.gpus > 0
    assert sum(places(group, workers) for group in cluster["workerGroupSpecs"]) == workers.num
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "no worker may land on the head"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]


def test_a_cluster_that_is_too_small_is_noticed(rayjob: Manifest) -> None:
    workers = configuration(rayjob["spec"]["entrypoint"]).workers
    group = copy.deepcopy(_group(rayjob))
    assert places({**group, "replicas": 7}, workers) == 7
    assert places(group, workers.model_copy(update={"cpus": 3.0})) == 0
    group["rayStartParams"]["num-cpus"] = "4"
    with pytest.raises(AssertionError, match="more than the pod has"):
        places(group, workers)


def test_versions_agree(rayjob: Manifest) -> None:
    ray_version = rayjob["spec"]["rayClusterSpec"]["rayVersion"]
    assert ray_version == importlib.metadata.version("ray")
    assert f"ray=={ray_version}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    for template in pod_templates(rayjob).values():
        assert template["spec"]["containers"][0]["image"] == f"ddpm:{project()['version']}"


def test_names_lead_somewhere(manifests: list[Manifest], rayjob: Manifest) -> None:
    made = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests}
    for template in pod_templates(rayjob).values():
        assert ("ServiceAccount", template["spec"]["serviceAccountName"]) in made
        ours, users = template["spec"]["containers"][0]["envFrom"]
        assert ("ConfigMap", ours["configMapRef"]["name"]) in made
        assert users == {"secretRef": {"name": "ddpm-credentials"}}
    assert "create secret generic ddpm-credentials" in (ROOT / "docs" / "kubernetes.md").read_text(
        encoding="utf-8"
    )


def test_no_credentials_in_the_base(manifests: list[Manifest]) -> None:
    assert "Secret" not in {manifest["kind"] for manifest in manifests}
    text = yaml.safe_dump_all(manifests)
    assert not re.search(r"(?i)(secret_access_key|access_key_id|password|auth_token)", text)
    assert not re.search(r"(?i)://[^/\s]*@", text), "credentials in an address"


def test_the_cluster_wants_a_token_and_reports_to_nobody(manifests: list[Manifest], rayjob: Manifest) -> None:
    assert rayjob["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    (config_map,) = (manifest for manifest in manifests if manifest["kind"] == "ConfigMap")
    assert config_map["data"]["RAY_USAGE_STATS_ENABLED"] == "0"
    assert config_map["data"]["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_pods_fit_the_restricted_security_standard(rayjob: Manifest) -> None:
    for template in pod_templates(rayjob).values():
        pod = template["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC", "volumes"} & set(pod)
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


# --- the image, as far as it can be checked without an engine that builds it


def instructions(name: str) -> list[list[str]]:
    text = DOCKERFILE.read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.split()[1:] for line in text.splitlines() if line.startswith(f"{name} ")]


def test_the_image_starts_from_a_pinned_python_that_the_project_takes() -> None:
    ((base,),) = instructions("FROM")
    image, version = re.fullmatch(r"(python):(\d+\.\d+)-[a-z0-9-]+", base).groups()  # type: ignore[union-attr]
    assert image == "python", "the plain name, whatever registry the engine asks"
    assert SpecifierSet(project()["requires-python"]).contains(version)


def test_the_image_is_made_of_files_that_reach_the_engine() -> None:
    kept = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    sources = [source for words in instructions("COPY") for source in words[:-1]]
    assert {"ddpm_core", "pipelines", "jobs", "infra", "constraints.txt"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), f"{source} is not in the repository"
        assert f"!{source}" in kept, f"{source} is kept from the engine by .dockerignore"


def test_the_image_runs_as_the_user_that_the_pods_ask_for(rayjob: Manifest) -> None:
    ((user,),) = instructions("USER")
    for template in pod_templates(rayjob).values():
        context = template["spec"]["securityContext"]
        assert user == f"{context['runAsUser']}:{context['runAsGroup']}"
