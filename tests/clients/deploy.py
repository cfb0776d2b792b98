#!/usr/bin/env python3
"""What lies in deploy/ and the program agree: Kubernetes' own schemas, flags and variables that exist, files that exist.

    deploy.py PROGRAM
"""

import argparse
import re
import subprocess
from pathlib import Path

import kubernetes_validate
import yaml
from common import Report

ROOT = Path(__file__).resolve().parent.parent.parent
DEPLOY = ROOT / "deploy"
# What the oldest supported cluster and a new one must accept.
VERSIONS = ("1.30", "1.37")


def documents(path):
    return [d for d in yaml.safe_load_all(path.read_text()) if d]


def containers(node):
    """Every mapping below with an image."""
    if isinstance(node, dict):
        if "image" in node:
            yield node
        for value in node.values():
            yield from containers(value)
    elif isinstance(node, list):
        for value in node:
            yield from containers(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path)
    options = parser.parse_args()
    report = Report()
    help_of = {
        command: subprocess.run([options.program, command, "--help"], capture_output=True, text=True, check=True).stdout
        for command in ("serve", "score")
    }
    variables = set(re.findall(r"\[env: (NBN_[A-Z_]+)", help_of["serve"]))
    assert len(variables) > 20, variables
    with report.check("Kubernetes' schemas, strictly") as figures:
        for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
            for document in documents(path):
                if document["kind"] == "Kustomization":
                    assert all((path.parent / name).exists() for name in document["resources"])
                    continue
                for version in VERSIONS:
                    kubernetes_validate.validate(document, version, strict=True)
                    figures.append(f"{document['kind']} {version};")
    for path in sorted([*DEPLOY.glob("kubernetes/*.yaml"), *DEPLOY.glob("kserve/*.yaml"), *DEPLOY.glob("compose/docker*.yaml")]):
        with report.check(f"{path.relative_to(ROOT)}: flags and variables exist"):
            for container in containers(documents(path)):
                if not container["image"].startswith("nbn:"):
                    continue
                environment = container.get("env", container.get("environment", []))
                names = environment if isinstance(environment, dict) else [entry["name"] for entry in environment]
                assert set(names) <= variables, set(names) - variables
                args = container.get("args", ["serve"])
                text = help_of[args[0]]
                for flag in (a.split("=")[0] for a in args[1:] if a.startswith("--")):
                    assert re.search(rf"^\s+{flag}\b", text, re.M), f"{args[0]} has no {flag}"
    with report.check("the compose file's mounts exist"):
        path = DEPLOY / "compose/docker-compose.yaml"
        for service in documents(path)[0]["services"].values():
            for mount in service.get("volumes", []):
                if mount.startswith("."):
                    assert (path.parent / mount.split(":")[0]).exists(), mount
    with report.check("the autoscaler's metric is one that the dashboard has"):
        (metric,) = documents(DEPLOY / "kubernetes/horizontalpodautoscaler.yaml")[0]["spec"]["metrics"]
        assert metric["pods"]["metric"]["name"] in (DEPLOY / "grafana/nbn.json").read_text()
    raise SystemExit(report.end())


if __name__ == "__main__":
    main()
