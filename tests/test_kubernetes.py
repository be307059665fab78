"""deploy/kubernetes: valid, and such that the parts find each other and work as they are bound."""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import kubernetes_validate
import pytest
import requests
import yaml
from jsonschema import Draft202012Validator

from bench.stack import Stack, await_that, running
from deploy import rules
from deploy.autoscale import USED_SHARE
from deploy.operate import autoscale
from tasks.contract.models import load_catalog
from tasks.contract.settings import PREFIX, SECRET_FIELDS, Settings, get_settings
from tasks.queue import control
from tests.conftest import SIM
from tests.custom_resources import OTHERS, SPECS
from tests.kustomize import Resource, named, render

ROOT = Path(__file__).parents[1]
OVERLAYS = ROOT / "deploy" / "kubernetes" / "overlays"
DOCS = (ROOT / "docs" / "kubernetes.md").read_text()
EXTRAS = OVERLAYS / "keda", OVERLAYS / "monitoring"
RENDERED = {name: render(OVERLAYS / name, *EXTRAS) for name in ("cpu", "gpu")}
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
PARTS = {"Deployment", "StatefulSet"}
COMPONENT = "app.kubernetes.io/component"
# What a Secret holds, for the settings to be read.
SECRETS = {
    "redis-password": "5ec3e7",
    "database-url": "postgresql+psycopg://sluice:5ec3e7@postgres/sluice",
    "admin-key": "admin",
    "webhook-secrets": f"whsec_{'A' * 32}",
    "alert-webhook": "https://alerts.example.com/sluice",
    "hf-token": "hf_token",
}


class Part(NamedTuple):
    """A workload: its pods, and the one container of each."""

    name: str
    resource: Resource
    pod: dict[str, Any]
    container: dict[str, Any]
    labels: dict[str, str]

    @property
    def env(self) -> dict[str, str]:
        """Its variables, with what Kubernetes fills in."""
        env: dict[str, str] = {}
        for each in self.container["env"]:
            source = each.get("valueFrom", {}).get("secretKeyRef")
            value = SECRETS[source["key"]] if source else each["value"]
            for name, earlier in env.items():
                value = value.replace(f"$({name})", earlier)
            env[each["name"]] = value
        return env


def parts(resources: list[Resource]) -> Iterator[Part]:
    for resource in resources:
        if resource["kind"] in PARTS:
            template = resource["spec"]["template"]
            (container,) = template["spec"]["containers"]
            labels = template["metadata"]["labels"]
            yield Part(labels[COMPONENT], resource, template["spec"], container, labels)


def part(resources: list[Resource], name: str) -> Part:
    (found,) = (each for each in parts(resources) if each.name == name)
    return found


def of_kind(resources: list[Resource], kind: str) -> list[Resource]:
    return [each for each in resources if each["kind"] == kind]


def selected(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a selector takes what has these labels."""
    matches = selector.get("matchLabels", {}).items() <= labels.items()
    return matches and all(
        labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", [])
    )


def policies(resources: list[Resource], labels: dict[str, str]) -> list[Resource]:
    """The policies for pods with these labels, the one for all pods among them."""
    found = of_kind(resources, "NetworkPolicy")
    return [each for each in found if selected(each["spec"]["podSelector"], labels)]


@pytest.fixture(params=RENDERED)
def resources(request: pytest.FixtureRequest) -> list[Resource]:
    """All that one overlay makes, with KEDA and monitoring."""
    return RENDERED[request.param]


def test_all_fits_the_schemas(resources: list[Resource]) -> None:
    assert_valid(resources)


def assert_valid(resources: list[Resource]) -> None:
    for resource in resources:
        kind = resource["kind"]
        if kind in SPECS:
            assert resource["apiVersion"] == OTHERS[kind]
            wrong = [
                str(each)
                for each in Draft202012Validator(SPECS[kind]).iter_errors(resource["spec"])
            ]
            assert wrong == [], kind
        else:
            newest = kubernetes_validate.latest_version()
            kubernetes_validate.validate(resource, newest, strict=True)


def test_a_field_that_is_misspelt_does_not_fit(resources: list[Resource]) -> None:
    deployment = yaml.safe_load(yaml.safe_dump(named(resources, "Deployment", "sluice-api")))
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(deployment, kubernetes_validate.latest_version(), strict=True)


def test_the_containers_may_do_next_to_nothing(resources: list[Resource]) -> None:
    namespace = named(resources, "Namespace", "sluice")["metadata"]["labels"]
    assert namespace["pod-security.kubernetes.io/enforce"] == "restricted"
    for one in parts(resources):
        assert one.pod["securityContext"]["runAsNonRoot"] is True
        # The kubelet cannot tell whether a user's name is root's.
        assert one.pod["securityContext"]["runAsUser"] > 0
        assert one.pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert one.pod["automountServiceAccountToken"] is False
        assert one.container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in one.container["resources"]["limits"]


def test_a_part_is_the_first_process_of_its_container(resources: list[Resource]) -> None:
    """Whatever the image starts by itself; the hook that drains a worker names process 1."""
    for one in parts(resources):
        assert "args" not in one.container
        assert "shareProcessNamespace" not in one.pod
        if one.name != "redis":
            assert one.container["command"][:2] == ["sluice", one.name]


def test_what_is_written_has_a_volume(resources: list[Resource]) -> None:
    for one in parts(resources):
        mounts = {mount["mountPath"] for mount in one.container["volumeMounts"]}
        assert "/tmp" in mounts
        if one.name != "redis":
            assert {one.env["SLUICE_HOME"], one.env["HOME"]} <= mounts
            assert str(Path(one.env["SLUICE_MODELS"]).parent) in mounts


def test_each_part_has_its_own_secrets_only(resources: list[Resource]) -> None:
    has = {
        one.name: {
            each["valueFrom"]["secretKeyRef"]["key"]
            for each in one.container["env"]
            if "valueFrom" in each
        }
        for one in parts(resources)
    }
    both = {"redis-password", "database-url", "webhook-secrets"}
    assert has == {
        "redis": {"redis-password"},
        "api": both | {"admin-key"},
        "maintenance": both | {"alert-webhook"},
        "worker": {"redis-password", "hf-token"},
    }
    secrets = {f"{PREFIX}{name.upper()}" for name in SECRET_FIELDS}
    for one in parts(resources):
        assert not any(
            each.get("value") for each in one.container["env"] if each["name"] in secrets
        )


def test_the_settings_are_taken(resources: list[Resource], monkeypatch: pytest.MonkeyPatch) -> None:
    for one in parts(resources):
        # Kubernetes' own variables for Services would be SLUICE_API_PORT and the like.
        assert one.pod["enableServiceLinks"] is False
        if one.name == "redis":
            continue
        with monkeypatch.context() as patched:
            for name, value in one.env.items():
                patched.setenv(name, value)
            settings = get_settings.__wrapped__()
        assert settings.redis_url == "redis://:5ec3e7@redis:6379/0"
        assert one.name == "worker" or settings.database_url.startswith("postgresql")


def test_the_models_can_be_read(resources: list[Resource], home: Path) -> None:
    (config,) = of_kind(resources, "ConfigMap")
    for one in parts(resources):
        if one.name != "redis":
            (volume,) = (each for each in one.pod["volumes"] if "configMap" in each)
            assert volume["configMap"]["name"] == config["metadata"]["name"]
    (home / "models.yaml").write_text(config["data"]["models.yaml"])
    assert load_catalog(home / "models.yaml").models


def test_a_worker_has_time_to_drain(resources: list[Resource]) -> None:
    worker = part(resources, "worker")
    # Ten seconds to hand back what is left, and as much for the hook.
    assert worker.pod["terminationGracePeriodSeconds"] >= float(worker.env["SLUICE_DRAIN_S"]) + 20
    assert Settings.model_fields["drain_s"].default == float(worker.env["SLUICE_DRAIN_S"])
    *_, hook = worker.container["lifecycle"]["preStop"]["exec"]["command"]
    assert hook.startswith("sluice drain")
    assert named(resources, "Deployment", "sluice-worker")["spec"]["strategy"] == {
        "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0}
    }


def test_an_api_has_time_for_its_streams(resources: list[Resource]) -> None:
    """As much as with docker-compose.yml; then it still has to end."""
    api = part(resources, "api")
    _, before_s = api.container["lifecycle"]["preStop"]["exec"]["command"]
    drain_s = float(api.env["SLUICE_API_DRAIN_S"])
    assert drain_s == COMPOSE["api"]["environment"]["SLUICE_API_DRAIN_S"]
    assert api.pod["terminationGracePeriodSeconds"] >= float(before_s) + drain_s + 15
    assert f"{api.pod['terminationGracePeriodSeconds']} s" in DOCS


def test_all_that_is_named_is_there(resources: list[Resource]) -> None:
    all_parts = list(parts(resources))
    for service in of_kind(resources, "Service"):
        found = [
            one for one in all_parts if service["spec"]["selector"].items() <= one.labels.items()
        ]
        assert len(found) == 1
        ports = {port["name"] for port in found[0].container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for one in all_parts:
        assert selected(one.resource["spec"]["selector"], one.labels)
        ports = {port["name"] for port in one.container.get("ports", [])}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = one.container.get(probe, {})
            port = (asked.get("httpGet") or asked.get("tcpSocket") or {}).get("port")
            assert port in {*ports, None}
        for spread in one.pod.get("topologySpreadConstraints", []):
            assert selected(spread["labelSelector"], one.labels)
    monitored = {
        each["metadata"]["name"]: each["spec"] for each in of_kind(resources, "ServiceMonitor")
    }
    for name, spec in monitored.items():
        # The alerts know the jobs by these names.
        service = named(resources, "Service", name)
        assert selected(spec["selector"], service["metadata"]["labels"])
        assert spec["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    assert set(monitored) == {"sluice-api", "sluice-worker"}


def test_a_node_may_be_emptied(resources: list[Resource]) -> None:
    for budget in of_kind(resources, "PodDisruptionBudget"):
        assert budget["spec"]["maxUnavailable"] == 1
        assert (
            sum(selected(budget["spec"]["selector"], one.labels) for one in parts(resources)) == 1
        )
    names = {each["metadata"]["name"] for each in of_kind(resources, "PodDisruptionBudget")}
    assert names == {"sluice-api", "sluice-maintenance", "sluice-worker"}


def test_only_who_needs_redis_reaches_it(resources: list[Resource]) -> None:
    policies = [each["spec"] for each in of_kind(resources, "NetworkPolicy")]
    assert any(
        policy["podSelector"] == {} and policy["policyTypes"] == ["Ingress", "Egress"]
        for policy in policies
    )
    redis = part(resources, "redis")
    rules_in = [
        rule
        for policy in policies
        if policy["podSelector"] and selected(policy["podSelector"], redis.labels)
        for rule in policy.get("ingress", [])
    ]
    ((peer,),) = (rule["from"] for rule in rules_in)
    allowed = {one.name for one in parts(resources) if selected(peer["podSelector"], one.labels)}
    assert allowed == {"api", "maintenance", "worker"}
    for policy in policies:
        if policy["podSelector"]:
            assert any(selected(policy["podSelector"], one.labels) for one in parts(resources))


def test_names_are_found_with_a_cache_on_each_node(resources: list[Resource]) -> None:
    (everywhere,) = policies(resources, {})
    (rule,) = everywhere["spec"]["egress"]
    assert {"ipBlock": {"cidr": "169.254.20.10/32"}} in rule["to"]
    assert rule["ports"] == [{"protocol": each, "port": 53} for each in ("UDP", "TCP")]


def test_redis_is_that_of_compose_and_keeps_its_address(resources: list[Resource]) -> None:
    image = part(resources, "redis").container["image"]
    assert image == COMPOSE["redis"]["image"].partition("$")[0]
    # Without one its name resolves only while its pod is ready.
    assert "clusterIP" not in named(resources, "Service", "redis")["spec"]


def test_the_api_is_ready_without_workers(idle_stack: Stack, resources: list[Resource]) -> None:
    """Nobody could queue the job for which KEDA starts the first worker otherwise."""
    container = part(resources, "api").container
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        path = container[probe]["httpGet"]["path"]
        assert requests.get(idle_stack.url + path, timeout=10).status_code == 200
    assert requests.get(idle_stack.url + "/health/ready", timeout=10).status_code == 503


def test_a_worker_is_ready_until_it_drains(home: Path, resources: list[Resource]) -> None:
    container = part(resources, "worker").container
    ready = container["readinessProbe"]["httpGet"]["path"]
    alive = container["livenessProbe"]["httpGet"]["path"]
    assert container["startupProbe"]["httpGet"]["path"] == ready
    slow = SIM | {"args": {"tokens-per-s": 20, "first-token-s": 0.01}}
    with running(Stack(home, [slow], drain_s=60)) as stack:
        (worker,) = control.workers(stack.redis)
        url = f"http://{worker.metrics_address}"
        status = lambda path: requests.get(url + path, timeout=10).status_code
        await_that(lambda: status(ready) == 200)
        assert status(alive) == 200
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2000}
        job = {"endpoint": "/v1/chat/completions", "body": body}
        posted = requests.post(f"{stack.url}/v1/jobs", json=job, timeout=10).json()
        await_that(lambda: stack.jobs_of(stack.workers[0]) == [posted["id"]])
        control.drain(stack.redis, stack.redis, worker.id)
        await_that(lambda: status(ready) == 503)
        assert status(alive) == 200
        requests.post(f"{stack.url}/v1/jobs/{posted['id']}/cancel", timeout=10)


def test_keda_decides_as_sluice_autoscale(resources: list[Resource], home: Path) -> None:
    scaled = named(resources, "ScaledObject", "sluice-worker")["spec"]
    workers = named(resources, "Deployment", scaled["scaleTargetRef"]["name"])
    assert "replicas" not in workers["spec"]
    (home / "models.yaml").write_text(of_kind(resources, "ConfigMap")[0]["data"]["models.yaml"])
    model = load_catalog(home / "models.yaml").default
    for trigger in scaled["triggers"]:
        own = f'model="{model.name}", namespace="{workers["metadata"]["namespace"]}"'
        assert own in trigger["metadata"]["query"]
    assert scaled["triggers"][0]["metadata"]["threshold"] == str(int(model.slots * USED_SHARE))
    default = {option.name: option.default for option in autoscale.params}
    behavior = scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior["scaleUp"]["stabilizationWindowSeconds"] == 0
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] == default["hold_s"]
    assert scaled["cooldownPeriod"] == default["hold_s"]
    assert scaled["pollingInterval"] == default["interval_s"]
    assert scaled["minReplicaCount"] == default["min_workers"] == 0
    assert scaled["maxReplicaCount"] == default["max_workers"]


def test_the_rules_are_those_of_prometheus() -> None:
    assert rules.RULE.read_text() == rules.rule(), "`make docs` writes it"


def test_the_images_are_of_this_version() -> None:
    images = {
        one.container["image"]
        for resources in RENDERED.values()
        for one in parts(resources)
        if one.name != "redis"
    }
    names = {"sluice-api", "sluice-worker", "sluice-worker-gpu"}
    assert images == {f"{name}:{version('sluice')}" for name in names}
