"""What must be true of rendered manifests and no schema can say. Each assertion gives a sentence for what is not so."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from deploy.command_lines import options_of, problem_of
from deploy.manifests import Document, Manifests, Pod, title
from serve.http_api import OPEN

EXTERNAL_SECRETS = {"pawl-keys", "pawl-records", "pawl-metrics-key"}  # whoever runs it makes these
EXTERNAL_SERVICES = {"pawl-endpoint-picker"}  # has its own installation
PINNED = re.compile(r"[^:@]+(:\d+/[^:@]+)?(:(?!latest$)[\w.-]+|@sha256:[0-9a-f]{64})")
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
Assertion = Callable[[Manifests], Iterator[str]]


def commands_are_understood(manifests: Manifests) -> Iterator[str]:
    """Every flag is one of the program's, with a value that it takes; every $(NAME) is a variable."""
    for pod, container in containers(manifests):
        if why := problem_of(container):
            yield f"{pod.owner}: {container['name']} does not understand its arguments: {why}"
        defined = {variable["name"] for variable in container.get("env", ())}
        for name in re.findall(r"\$\((\w+)\)", " ".join(container.get("args", ()))):
            if name not in defined:
                yield f"{pod.owner}: {container['name']} has no variable {name}, which its arguments name"


def the_server_fits_its_pod(manifests: Manifests) -> Iterator[str]:
    """Ports, threads, time to drain, and folders that are mounted."""
    for pod, container in containers(manifests):
        if (settings := options_of(container)) is None:
            continue
        if (pod.ports["http"], pod.ports["grpc"]) != (settings.http_port, settings.grpc_port):
            yield f"{pod.owner}: its ports are not those of --http-port and --grpc-port"
        cores = container["resources"]["requests"]["cpu"]
        if str(settings.threads) != cores:
            yield f"{pod.owner}: --threads {settings.threads}, but it requests {cores} processors"
        sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        grace = pod.spec["terminationGracePeriodSeconds"]
        if grace <= sleep + settings.drain_seconds:
            yield f"{pod.owner}: {grace} s of grace are not more than {sleep} s of preStop and the drain together"
        mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
        for path in (settings.model, settings.registry, settings.api_keys, settings.derived):
            if path is not None and not any(str(path).startswith(folder) for folder in mounted):
                yield f"{pod.owner}: {path} is on no volume"


def probes_have_their_ports(manifests: Manifests) -> Iterator[str]:
    for pod, container in containers(manifests):
        for probe in (container[name] for name in PROBES if name in container):
            if not pod.port(probe["httpGet"]["port"]):
                yield f"{pod.owner}: no port {probe['httpGet']['port']}, which a probe asks"
            if probe["httpGet"]["path"] not in OPEN:
                yield f"{pod.owner}: {probe['httpGet']['path']} is not open to probes"
        if options_of(container) is not None and not all(name in container for name in PROBES):
            yield f"{pod.owner}: the server needs {', '.join(PROBES)}"


def services_lead_to_pods(manifests: Manifests) -> Iterator[str]:
    for service in manifests.of("Service"):
        pods = manifests.select(service["spec"]["selector"])
        if len(pods) != 1:
            yield f"{title(service)}: selects {[pod.owner for pod in pods]}; it must be one kind of pod"
        for port in service["spec"]["ports"]:
            if not all(pod.port(port["targetPort"]) for pod in pods):
                yield f"{title(service)}: no port {port['targetPort']} in what it selects"


def selectors_match(manifests: Manifests) -> Iterator[str]:
    for document in manifests.of("PodDisruptionBudget", "InferencePool", "Rollout", "Deployment"):
        if not manifests.select(document["spec"]["selector"]["matchLabels"]):
            yield f"{title(document)}: selects no pod"
    for policy in manifests.of("NetworkPolicy"):
        if not manifests.select(policy["spec"]["podSelector"].get("matchLabels", {})):
            yield f"{title(policy)}: selects no pod"
    for pool in manifests.of("InferencePool"):
        pods = manifests.select(pool["spec"]["selector"]["matchLabels"])
        for port in pool["spec"]["targetPorts"]:
            if not all(pod.port(port["number"]) for pod in pods):
                yield f"{title(pool)}: no port {port['number']} in what it selects"
    for monitor in manifests.of("ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"]
        ports = [
            {port["name"] for port in service["spec"]["ports"]}
            for service in manifests.of("Service")
            if wanted.items() <= service["metadata"]["labels"].items()
        ]
        if len(ports) != 1 or not {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports[0]:
            yield f"{title(monitor)}: must select one Service that has its ports, so that a pod is scraped once"


def policies_cover_ports(manifests: Manifests) -> Iterator[str]:
    """Each port of a pod that a policy closes is in one that lets somebody in; a rule without ports is for all."""
    for pod in manifests.pods:
        policies = [
            policy["spec"]
            for policy in manifests.of("NetworkPolicy")
            if policy["spec"]["podSelector"].get("matchLabels", {}).items() <= pod.labels.items()
            and "Ingress" in policy["spec"]["policyTypes"]
        ]
        rules = [rule for policy in policies for rule in policy.get("ingress", ())]
        allowed = [port["port"] for rule in rules for port in rule.get("ports", ())]
        closed = policies and all("ports" in rule for rule in rules)
        for name, number in pod.ports.items() if closed else ():
            if name not in allowed and number not in allowed:
                yield f"{pod.owner}: no NetworkPolicy lets anybody reach its port {name}"


def what_is_named_is_there(manifests: Manifests) -> Iterator[str]:
    """Claims, ConfigMaps, Secrets, accounts, targets of scaling, backends of routes, templates of an analysis."""
    for pod in manifests.pods:
        for kind, name in references(pod):
            if name not in manifests.names(kind) | (EXTERNAL_SECRETS if kind == "Secret" else set()):
                yield f"{pod.owner}: there is no {kind} {name}"
    for document in manifests.of("ScaledObject"):
        target = document["spec"]["scaleTargetRef"]
        if (found := manifests.named(target["kind"], target["name"])) is None:
            yield f"{title(document)}: there is no {target['kind']} {target['name']}"
        elif "replicas" in found["spec"] and target["kind"] == "Deployment":
            yield f"{title(found)}: has a number of replicas, which {title(document)} changes"
        if target["kind"] == "Deployment" and manifests.names("Rollout"):
            yield f"{title(document)}: scales the Deployment, but a Rollout makes the pods"
    for document in manifests.of("HTTPRoute", "GRPCRoute"):
        for backend in (backend for rule in document["spec"]["rules"] for backend in rule["backendRefs"]):
            found = manifests.named(backend.get("kind", "Service"), backend["name"])
            ports = [port["port"] for port in found["spec"].get("ports", ())] if found else []
            if found is None or ("port" in backend and backend["port"] not in ports):
                yield f"{title(document)}: there is no {backend.get('kind', 'Service')} {backend['name']} with its port"
    for document in manifests.of("InferencePool"):
        if (picker := document["spec"]["endpointPickerRef"]["name"]) not in EXTERNAL_SERVICES:
            yield f"{title(document)}: nobody installs {picker}"
    for document in manifests.of("Rollout"):
        wanted = document["spec"]["workloadRef"]
        if manifests.named(wanted["kind"], wanted["name"]) is None:
            yield f"{title(document)}: there is no {wanted['kind']} {wanted['name']}"
        steps = document["spec"]["strategy"]["canary"]["steps"]
        named = {used["templateName"] for step in steps for used in step.get("analysis", {}).get("templates", ())}
        if missing := named - manifests.names("AnalysisTemplate"):
            yield f"{title(document)}: there is no AnalysisTemplate {', '.join(missing)}"


def images_are_pinned(manifests: Manifests) -> Iterator[str]:
    for pod in manifests.pods:
        images = [container["image"] for container in pod.containers]
        images += [volume["image"]["reference"] for volume in pod.spec["volumes"] if "image" in volume]
        yield from (f"{pod.owner}: image {image} is not pinned" for image in images if not PINNED.fullmatch(image))


def pods_are_confined(manifests: Manifests) -> Iterator[str]:
    """Kubernetes' standard `restricted`, a read-only root, no token, and bounds on memory and disk."""
    for pod in manifests.pods:
        context = pod.spec.get("securityContext", {})
        if not context.get("runAsNonRoot") or not context.get("runAsUser"):
            yield f"{pod.owner}: may run as root"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{pod.owner}: its system calls are not filtered"
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.owner}: gets a token for the cluster"
    for pod, container in containers(manifests):
        where = f"{pod.owner}: {container['name']}"
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False or context.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{where} may get rights"
        if not context.get("readOnlyRootFilesystem"):
            yield f"{where} may write to its root"
        resources = container.get("resources", {})
        for name in ("memory", "ephemeral-storage"):
            if name not in resources.get("limits", {}) or name not in resources.get("requests", {}):
                yield f"{where} has no request and limit of {name}"
        if "cpu" not in resources.get("requests", {}) or "cpu" in resources.get("limits", {}):
            yield f"{where} must request processors and have no limit on them: throttled, it misses its deadlines"


def jobs_end(manifests: Manifests) -> Iterator[str]:
    for document in manifests.of("Job", "CronJob"):
        spec = document["spec"]
        if document["kind"] == "CronJob":
            if spec.get("concurrencyPolicy") != "Forbid":
                yield f"{title(document)}: two could run at once"
            spec = spec["jobTemplate"]["spec"]
        if "activeDeadlineSeconds" not in spec or "backoffLimit" not in spec:
            yield f"{title(document)}: has no deadline, or no limit on tries"


def containers(manifests: Manifests) -> Iterator[tuple[Pod, Document]]:
    return ((pod, container) for pod in manifests.pods for container in pod.containers)


def references(pod: Pod) -> Iterator[tuple[str, str]]:
    """(kind, name) of what a pod needs in its namespace."""
    yield "ServiceAccount", pod.spec["serviceAccountName"]
    for volume in pod.spec["volumes"]:
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"]
    for container in pod.containers:
        for source in (variable.get("valueFrom", {}) for variable in container.get("env", ())):
            if "secretKeyRef" in source:
                yield "Secret", source["secretKeyRef"]["name"]
            if "configMapKeyRef" in source:
                yield "ConfigMap", source["configMapKeyRef"]["name"]


# commands_are_understood comes before all these.
ASSERTIONS: tuple[Assertion, ...] = (
    the_server_fits_its_pod,
    probes_have_their_ports,
    services_lead_to_pods,
    selectors_match,
    policies_cover_ports,
    what_is_named_is_there,
    images_are_pinned,
    pods_are_confined,
    jobs_end,
)
