"""Project files around the package: version, workflows, release notes, forms."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import nanothink

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def release_notes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release_notes", ROOT / ".ci/release_notes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_version_stands_in_one_place(release_notes: ModuleType) -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "nanothink.__version__"}
    source = (ROOT / "nanothink/__init__.py").read_text("utf-8")
    assert release_notes.current_version(source) == nanothink.__version__
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))


def test_release_notes_are_the_dated_section(release_notes: ModuleType) -> None:
    newest = "# Changelog\n\n## Unreleased: 0.3.0\n\n- c\n\n"
    changelog = f"{newest}## 0.2.0 - 2027-01-31\n\n### Added\n\n- b\n\n## 0.1.0 - 2026-12-24\n\n- a\n"
    assert release_notes.release_notes("0.2.0", "0.2.0", changelog) == "### Added\n\n- b\n"
    assert release_notes.release_notes("0.1.0", "0.1.0", changelog) == "- a\n"
    for version, current, message in (
        ("0.2.0", "0.3.0", "tag says 0.2.0, nanothink/__init__.py says 0.3.0"),
        ("0.3.0", "0.3.0", "still unreleased"),
        ("0.2", "0.2", "no section"),
    ):
        with pytest.raises(SystemExit, match=message):
            release_notes.release_notes(version, current, changelog)
    with pytest.raises(SystemExit, match="is empty"):
        release_notes.release_notes("1.0.0", "1.0.0", "## 1.0.0 - 2028-01-01\n\n## 0.9.0 - 2027-12-01\n- a\n")


def test_the_changelog_is_about_the_current_version() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    version = re.escape(nanothink.__version__)
    assert re.fullmatch(rf"Unreleased: {version}|{version} - \d{{4}}-\d\d-\d\d", headings[0])


def commands(workflow: Any) -> str:
    return "\n".join(step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"])


def test_workflows_run_what_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text("utf-8"))
        run = commands(workflow)
        for target in re.findall(r"\bmake ([\w-]+)", run):
            assert re.search(rf"^{target}: ", makefile, re.MULTILINE), f"{path.name}: make {target}"
        for name in re.findall(r"(?<!\S)(?:tests|\.ci)/[\w/.-]+", run):
            assert (ROOT / name).exists(), f"{path.name}: {name}"
        for name, job in workflow["jobs"].items():
            assert "timeout-minutes" in job, f"{path.name}: {name} may hang for six hours"


def test_every_supported_python_is_tested() -> None:
    tested = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))["jobs"]["test"]
    named = [
        line.rpartition(" ")[2]
        for line in PROJECT["project"]["classifiers"]
        if re.search(r"Python :: 3\.\d+$", line)
    ]
    assert tested["strategy"]["matrix"]["python"] == named
    assert PROJECT["project"]["requires-python"] == f">={named[0]}"


def test_other_project_files_are_yaml_with_their_keys() -> None:
    forms = [p for p in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if p.name != "config.yml"]
    assert len(forms) == 2
    for form in forms:
        content = yaml.safe_load(form.read_text("utf-8"))
        assert content.keys() >= {"name", "description", "body"}, form
    for name, keys in (
        (".github/dependabot.yml", {"version", "updates"}),
        (".pre-commit-config.yaml", {"repos"}),
        ("CITATION.cff", {"cff-version", "title", "message", "authors"}),
    ):
        assert yaml.safe_load((ROOT / name).read_text("utf-8")).keys() >= keys, name
