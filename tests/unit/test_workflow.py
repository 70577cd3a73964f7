"""The GitHub workflow does what the project does elsewhere, with no more rights than it needs."""

from __future__ import annotations

import re

import yaml

from tests.unit.test_packaging import ROOT

TEXT = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
JOBS = yaml.safe_load(TEXT)["jobs"]


def test_workflow_permissions_are_read_only() -> None:
    assert yaml.safe_load(TEXT)["permissions"] == {"contents": "read"}
    assert not [name for name, job in JOBS.items() if "permissions" in job]
    assert "secrets." not in TEXT


def test_workflow_actions_are_pinned_to_commits() -> None:
    used = re.findall(r"uses: (.*)$", TEXT, flags=re.MULTILINE)
    assert used
    for action in used:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


def test_workflow_runs_ci_and_builds_both_images() -> None:
    assert [step["run"] for step in JOBS["checks"]["steps"] if "run" in step][-1] == ".ci/run"
    variants = {each["variant"] for each in JOBS["images"]["strategy"]["matrix"]["include"]}
    assert variants == {"cpu", "gpu"}
    assert all(0 < job["timeout-minutes"] <= 60 for job in JOBS.values())
