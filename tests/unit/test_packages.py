"""The published packages: what the sdist and the wheels hold and say, and that they work."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from started import start

import opensora_sp
from opensora_sp.base.errors import UserError
from opensora_sp.verification import packaged_suite
from opensora_sp.verification.doctor.surroundings import OLDEST

ROOT = Path(__file__).resolve().parents[2]
SUITE = "opensora_sp_conformance"
MOST_BYTES = 10_000_000  # of the program's wheel
# What tools leave in a checkout; where there is no git to ask.
LEFT = {"__pycache__", "build", "dist", "samples", "PKG-INFO", "setup.cfg"}
LEFT |= {".pytest_cache", ".mypy_cache", ".ruff_cache", ".import_linter_cache"}
LINK = re.compile(r"\]\(([^)\s]+)\)")


def repository() -> set[str]:
    """The files of this repository: what git does not ignore, or what an unpacked sdist holds."""
    if (ROOT / ".git").exists():
        listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        said = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True).stdout.decode()
        return {name for name in said.split("\0") if name and (ROOT / name).is_file()}
    return set(files_of(ROOT))


def files_of(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        tools = any(p in LEFT or p.startswith(".venv") or p.endswith(".egg-info") for p in parts)
        if path.is_file() and not tools:
            yield "/".join(parts)


@dataclass(frozen=True)
class Built:
    """source: the unpacked sdist. wheel, suite: unpacked wheels. size: bytes of the first one."""

    source: Path
    wheel: Path
    suite: Path
    size: int


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The packages of this code: the sdist of the repository, and both wheels of the sdist."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("packages")
    for name in repository():
        (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "clone" / name)
    (sdist,) = build("sdist", folder / "clone", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "sdist")
    shutil.rmtree(folder / "clone")
    (source,) = (folder / "sdist").iterdir()
    (wheel,) = build("wheel", source, folder / "program")
    (suite,) = build("wheel", source / SUITE, folder / "suite")
    for each in (wheel, suite):
        with zipfile.ZipFile(each) as packed:
            packed.extractall(each.with_name("unpacked"))
    unpacked = (wheel.with_name("unpacked"), suite.with_name("unpacked"))
    return Built(source, *unpacked, wheel.stat().st_size)


def build(kind: str, source: Path, to: Path) -> list[Path]:
    """Build an sdist or a wheel as pip and `python -m build` do, without a new environment."""
    to.mkdir(exist_ok=True)
    words = f"from setuptools.build_meta import build_{kind}; build_{kind}({str(to)!r})"
    done = start("-c", words, cwd=source)
    assert done.returncode == 0, done.stderr
    return [path for path in to.iterdir() if path.is_file()]


def test_the_sdist_holds_what_the_repository_holds(built: Built) -> None:
    assert set(files_of(built.source)) == repository()


def test_the_wheels_hold_all_that_they_read_and_the_program_s_is_small(built: Built) -> None:
    kept = {name for name in repository() if name.startswith("opensora_sp/")}
    kept |= {f"opensora_sp/{name}" for name in repository() if name.startswith("configs/")}
    held = {name for name in files_of(built.wheel) if not name.split("/")[0].endswith(".dist-info")}
    assert held == kept
    assert built.size <= MOST_BYTES
    own = {"LICENSE", "NOTICE", "README.md", "pyproject.toml"}
    suite = {name for name in files_of(ROOT / SUITE) if name not in own}
    assert set(files_of(built.suite / SUITE)) == suite
    for folder in (built.wheel, built.suite):
        (licences,) = folder.glob("*.dist-info/licenses")
        for name in ("LICENSE", "NOTICE"):
            assert (licences / name).read_bytes() == (ROOT / name).read_bytes()


def test_what_both_packages_hold_is_the_same() -> None:
    for name in ("manifest.json", "sizes.json"):
        ours = (ROOT / "opensora_sp" / "assets" / name).read_bytes()
        assert ours == (ROOT / SUITE / name).read_bytes(), name


def test_the_wheel_works_in_another_folder(built: Built, tmp_path: Path) -> None:
    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return start("-m", "opensora_sp", *words, cwd=tmp_path, PYTHONPATH=str(built.wheel))

    ask = "import opensora_sp; print(opensora_sp.__file__)"
    where = start("-c", ask, cwd=tmp_path, PYTHONPATH=str(built.wheel))
    assert where.stdout.startswith(str(built.wheel))
    printed = command("generate", "--config", "720p-16s", "--print-config")
    assert printed.returncode == 0, printed.stderr
    assert "latents 120x90x160" in printed.stdout
    planned = command("plan", "--device-memory", "H100", "--config", "720p-16s")
    assert planned.returncode == 0, planned.stderr
    tiny = ["--device", "cpu", "--dtype", "fp32", "--image-size", "32", "48", "--text-cache", "off"]
    tiny += ["--num-frames", "image", "--num-sampling-steps", "1"]
    made = command("generate", "--config", "embedded", "--prompt", "a red ball", *tiny)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / made.stdout.strip()).stat().st_size > 0


def test_verify_names_the_package_that_it_lacks_and_finds_it_where_it_is_installed(
    built: Built, tmp_path: Path
) -> None:
    lacks = start("-m", "opensora_sp", "verify", cwd=tmp_path, PYTHONPATH=str(built.wheel))
    assert (lacks.returncode, lacks.stdout) == (2, "")
    (line,) = lacks.stderr.splitlines()
    for words in (f"{SUITE} {opensora_sp.__version__}", "opensora_sp[conformance]", "--reference"):
        assert words in line
    ask = "from opensora_sp.verification.packaged_suite import packaged_suite as p; print(p())"
    both = os.pathsep.join(map(str, (built.wheel, built.suite)))
    assert start("-c", ask, cwd=tmp_path, PYTHONPATH=both).stdout.strip() == str(
        built.suite / SUITE
    )


def test_a_folder_of_the_suite_s_name_is_no_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = tmp_path / "opensora_sp" / "verification"
    room.mkdir(parents=True)
    (tmp_path / SUITE).mkdir()
    monkeypatch.setattr(packaged_suite, "__file__", str(room / "packaged_suite.py"))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="not installed"):
        packaged_suite.packaged_suite()
    (tmp_path / SUITE / "manifest.json").write_text("{}")
    assert packaged_suite.packaged_suite() == tmp_path / SUITE


def test_the_metadata_is_valid_and_allows_the_pythons_that_it_names(built: Built) -> None:
    metadata = pytest.importorskip("packaging.metadata", reason="pip install packaging")
    program, suite = (
        metadata.Metadata.from_email((info / "METADATA").read_bytes(), validate=True)
        for folder in (built.wheel, built.suite)
        for info in folder.glob("*.dist-info")
    )
    for one in (program, suite):
        assert one.license_expression == "Apache-2.0"
        assert one.license_files == ["LICENSE", "NOTICE"]
        assert one.author
        assert one.description_content_type == "text/markdown"
    named = [c.rpartition(" :: ")[2] for c in program.classifiers or [] if ":: Python :: 3." in c]
    allowed = [f"3.{n}" for n in range(30) if program.requires_python.contains(f"3.{n}.1")]
    assert named == allowed
    assert len(allowed) > 3
    (scripts,) = built.wheel.glob("*.dist-info/entry_points.txt")
    assert "opensora-sp = opensora_sp.cli.main:main" in scripts.read_text(encoding="utf-8")


def test_one_version_stands_everywhere() -> None:
    version = opensora_sp.__version__
    for project in (ROOT / "pyproject.toml", ROOT / SUITE / "pyproject.toml"):
        assert f'\nversion = "{version}"\n' in project.read_text(encoding="utf-8"), project
    own = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nconformance = ["{SUITE}=={version}"]\n' in own
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == version
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {version} - {citation['date-released']}\n" in changes


def test_the_doctor_asks_for_the_versions_that_the_package_asks_for() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^dependencies = \[\n(.*?)^\]", text, re.M | re.S)
    asked = dict(re.findall(r'"([A-Za-z0-9_]+)(?:>=([\d.]+))?[^"]*"', listed))
    assert len(asked) > 10
    assert set(OLDEST) == set(asked)
    for name, version in asked.items():
        if version:
            assert ".".join(map(str, OLDEST[name])) == version, name


def shown_readme(folder: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py gives to setuptools where the repository has this address."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert text.count('\nREPOSITORY = "') == 1
    text = re.sub(r'^REPOSITORY = ".*"$', f"REPOSITORY = {address!r}", text, flags=re.M)
    (folder / "setup.py").write_text(text, encoding="utf-8")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    given: dict[str, Any] = {}
    monkeypatch.setattr(pytest.importorskip("setuptools"), "setup", given.update)
    runpy.run_path(str(folder / "setup.py"))
    return given


def test_the_readme_of_an_index_has_no_relative_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    relative = [link for link in LINK.findall(readme) if not re.match(r"[a-z]+:|#", link)]
    assert len(relative) > 20
    away = shown_readme(tmp_path, "", monkeypatch)
    assert away["project_urls"] == {}
    left = LINK.findall(away["long_description"])
    assert left
    assert all(re.match(r"https?:|#", link) for link in left)
    there = shown_readme(tmp_path, "https://host.example/owner/opensora_sp", monkeypatch)
    assert "https://host.example/owner/opensora_sp" in there["project_urls"].values()
    tag = f"v{opensora_sp.__version__}"
    for link in relative:
        kind = "raw" if link.startswith("docs/images/") else "blob"
        absolute = f"](https://host.example/owner/opensora_sp/{kind}/{tag}/{link})"
        assert absolute in there["long_description"]
    assert all(re.match(r"https?:|#", link) for link in LINK.findall(there["long_description"]))


def test_setting_up_does_not_empty_what_a_link_leads_to(tmp_path: Path) -> None:
    """`python -m venv --clear` would."""
    root, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    shutil.copytree(ROOT / "constraints", root / "constraints")
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "lib.sh", root / "scripts")
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    (root / ".venv").symlink_to(elsewhere)
    words = f"source '{root}/scripts/lib.sh'; ensure_venv .venv current"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, check=False)
    assert (done.returncode, (elsewhere / "kept").exists()) == (2, True)
    assert f".venv is a link to {elsewhere}" in done.stderr
