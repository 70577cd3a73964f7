"""What a user installs: the wheel, the locks, the layers between the two packages."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("service", "model_export")

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# What only the train extra brings; nothing of it may be loaded by the service.
TRAINING_ONLY = ("torch", "lightning", "onnxscript", "pycocotools", "matplotlib", "safetensors")

TOP_LEVEL = {
    "Dockerfile", "pyproject.toml", "service", "model_export", "tests", "docker-compose.yml",
    "README.md", "Makefile", "LICENSE", ".ci", "requirements-cpu.lock", "requirements-gpu.lock",
    "docs", "benchmarks", ".gitignore", ".dockerignore", ".github",
}  # fmt: skip
OPTIONAL_TOP_LEVEL = {"deploy"}


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Every file under version control, relative to the repository's root."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so there is no list of tracked files")
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return [Path(name) for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return PROJECT


@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist, as an installer without our wheel would."""
    folder = tmp_path_factory.mktemp("distributions")
    _build("sdist", source=ROOT, output=folder)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    _build("wheel", source=folder / archive.name.removesuffix(".tar.gz"), output=folder)
    (path,) = folder.glob("*.whl")
    return path


def _build(kind: str, *, source: Path, output: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(output)],
        cwd=source, check=True, capture_output=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def wheel(wheel_file: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(wheel_file)


@pytest.fixture(scope="module")
def installed(wheel_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of a new environment that has the wheel, and what it needs from this one."""
    environment = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install",
         "--quiet", "--no-deps", "--no-index", str(wheel_file)],
        check=True, capture_output=True,
    )  # fmt: skip
    (packages,) = environment.glob("lib/python*/site-packages")
    # A folder that a .pth names has no .pth files of its own: this checkout stays out of sight.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin" / "retinaserve"


def test_the_wheel_holds_every_tracked_file_of_both_packages(
    wheel: zipfile.ZipFile, tracked: list[Path]
) -> None:
    wanted = {path.as_posix() for path in tracked if path.parts[0] in PACKAGES}
    assert wanted <= set(wheel.namelist())


def test_the_wheel_holds_the_page_the_bundled_model_and_the_type_markers(
    wheel: zipfile.ZipFile,
) -> None:
    names = wheel.namelist()
    assert "service/static/index.html" in names
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    models = [name for name in names if name.startswith("service/models/")]
    assert any(name.endswith("/1/model.onnx") for name in models)
    assert any(name.endswith("/1/model.sha256") for name in models)


def test_the_wheel_holds_nothing_but_the_packages(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


@pytest.mark.slow
def test_installed_wheel_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    """Version, inspect, doctor, detect and one request to the server, in an empty folder."""
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "COV"))}

    def call(*arguments: str) -> str:
        run = subprocess.run(
            [installed, *arguments], cwd=tmp_path, env=outside, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        return run.stdout

    assert call("--version").strip().endswith(f"version {PROJECT['version']}")
    python = [installed.with_name("python"), "-c", "import service; print(service.__file__)"]
    source = subprocess.run(python, cwd=tmp_path, env=outside, capture_output=True, text=True)
    package = Path(source.stdout.strip()).parent
    assert package.is_relative_to(installed.parents[1]), source.stderr
    (model,) = package.glob("models/*/*/model.onnx")
    assert "blood-cells" in call("inspect", str(model))
    assert "blood-cells" in call("doctor", "--device", "cpu")
    image = package / "static" / "sample.jpg"
    found = json.loads(call("detect", "--device", "cpu", str(image)))["detections"]
    assert len(found) > 10
    assert "train" in call("--help")
    process = subprocess.Popen(
        [installed, "serve", "--device", "cpu", "--port", "0"],
        cwd=tmp_path, env=outside, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        url = f"{address.rstrip('/')}/v1/detect"
        answer = httpx.post(url, content=image.read_bytes(), timeout=60)
        while answer.status_code == 503:
            answer = httpx.post(url, content=image.read_bytes(), timeout=60)
        labels = [each["label"] for each in answer.json()["detections"]]
        assert labels == [each["label"] for each in found]
    finally:
        process.terminate()
        assert process.wait(30) == 0
        process.stdout.close()


def test_no_module_of_the_service_names_torch_or_model_export() -> None:
    for path in (ROOT / "service").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            roots = {name.partition(".")[0] for name in names}
            assert not roots & {*TRAINING_ONLY, "model_export"}, f"{path}:{node.lineno}"


def test_importing_the_whole_service_loads_no_training_package() -> None:
    code = (
        "import importlib, pkgutil, sys, service\n"
        "for module in pkgutil.walk_packages(service.__path__, 'service.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        importlib.import_module(module.name)\n"
        "assert 'service.http.app' in sys.modules and 'service.cli' in sys.modules\n"
        f"print(sorted(set(sys.modules) & {{*{TRAINING_ONLY!r}, 'model_export'}}))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.stdout, run.returncode) == ("[]\n", 0), run.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--help"], 0, "serve"),
        (["serve", "--help"], 0, "--port"),
        (["train", "--help"], 0, "Usage: retinaserve train [OPTIONS]"),
        (["train", "--data", "docs", "--output", "x"], 2, "pip install 'retinaserve[train]'"),
    ],
)
def test_the_command_works_where_the_train_extra_is_not_installed(
    arguments: list[str], status: int, says: str
) -> None:
    # A None in sys.modules makes the import fail as it does where the package is absent.
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({TRAINING_ONLY!r}))\n"
        f"sys.argv = ['retinaserve', *{arguments!r}]\n"
        "from service.cli import main\n"
        "sys.exit(main())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == status, run.stderr
    assert says in (run.stdout if status == 0 else run.stderr)


@pytest.mark.parametrize("python", ["3.11", "3.13"])
@pytest.mark.parametrize(
    ("system", "machine", "expected"),
    [
        ("linux", "x86_64", "onnxruntime-gpu"),
        ("win32", "AMD64", "onnxruntime-gpu"),
        ("linux", "aarch64", "onnxruntime"),
        ("win32", "ARM64", "onnxruntime"),
        ("darwin", "arm64", "onnxruntime"),
        ("darwin", "x86_64", "onnxruntime"),
    ],
)
def test_one_onnxruntime_for_each_platform(
    project: dict[str, Any], system: str, machine: str, expected: str, python: str
) -> None:
    environment = {"sys_platform": system, "platform_machine": machine, "python_version": python}
    chosen = [
        requirement.name
        for requirement in map(Requirement, project["dependencies"])
        if requirement.name.startswith("onnxruntime")
        and (requirement.marker or Marker("python_version > '0'")).evaluate(environment)
    ]
    assert chosen == [expected]


def _locked(path: Path) -> dict[str, str]:
    """Versions of a lock file; every line that is not a hash must pin one."""
    lines = path.read_text().replace("\\\n", " ").splitlines()
    entries = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    for entry in entries:
        assert "--hash=sha256:" in entry, f"{path.name}: no hash: {entry}"
    pins = [Requirement(entry.partition("--hash")[0].strip()) for entry in entries]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


@pytest.mark.parametrize("variant", ["cpu", "gpu"])
def test_a_lock_pins_what_pyproject_asks_for(project: dict[str, Any], variant: str) -> None:
    path = ROOT / f"requirements-{variant}.lock"
    locked = _locked(path)
    other = {"cpu": "onnxruntime-gpu", "gpu": "onnxruntime"}[variant]
    grpc = project["optional-dependencies"]["grpc"]
    for requirement in map(Requirement, [*project["dependencies"], *grpc]):
        if requirement.name == other:
            assert other not in locked
        else:
            version = locked[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement}: run make lock"
    training = {Requirement(each).name for each in project["optional-dependencies"]["train"]}
    assert not set(map(canonicalize_name, training)) & set(locked)
    assert "://" not in path.read_text()


def test_the_gpu_lock_brings_the_cuda_libraries() -> None:
    locked = _locked(ROOT / "requirements-gpu.lock")
    libraries = {name for name in locked if name.startswith("nvidia-")}
    for wanted in ("cublas", "cudnn", "cuda-runtime", "cufft", "curand"):
        assert any(wanted in name for name in libraries), f"{wanted} not in {libraries}"
    cpu = _locked(ROOT / "requirements-cpu.lock")
    assert cpu["onnxruntime"] == locked["onnxruntime-gpu"]


def test_compose_waits_longer_than_a_drain_takes() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    fields = Settings.model_fields
    drain = fields["drain_delay_seconds"].default + fields["drain_seconds"].default
    for service in services.values():
        assert service["read_only"] is True, "observers, too"
        assert float(service["stop_grace_period"].removesuffix("s")) > drain
    (device,) = services["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert services["cpu"]["profiles"] == ["cpu"]


def test_the_image_says_which_version_and_revision_it_is(project: dict[str, Any]) -> None:
    text = (ROOT / "Dockerfile").read_text()
    labels = dict(re.findall(r'org\.opencontainers\.image\.([a-z.]+)="([^"]*)"', text))
    assert labels["version"] == project["version"]
    assert labels["licenses"] == project["license"]
    assert labels["revision"] == "${REVISION}"
    assert labels["base.name"] == "${BASE_IMAGE}"
    assert {"title", "description"} <= labels.keys()


def test_the_version_is_the_same_everywhere(tracked: list[Path]) -> None:
    """pyproject.toml has it; labels, tags and the changelog repeat it."""
    version = PROJECT["version"]
    label = re.search(r'image\.version="([^"]+)"', (ROOT / "Dockerfile").read_text())
    assert label is not None
    assert label[1] == version
    tagged = [Path("docker-compose.yml"), *(p for p in tracked if p.parts[0] in ("deploy", "docs"))]
    tags: list[str] = []
    for path in tagged:
        if path.suffix in (".yml", ".yaml", ".md"):
            text = (ROOT / path).read_text()
            tags += re.findall(r"\bretinaserve:v?(\d+\.\d+\.\d+\w*)", text)
    assert len(tags) >= 2
    assert set(tags) == {version}
    changes = (ROOT / "docs" / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", changes, flags=re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    assert headings[1][0] == version
    dates = [date for _, date in headings[1:]]
    assert all(date == "unpublished" or re.fullmatch(r"\d{4}-\d\d-\d\d", date) for date in dates)


def test_the_top_level_is_the_agreed_one(tracked: list[Path]) -> None:
    tops = {path.parts[0] for path in tracked}
    assert tops - OPTIONAL_TOP_LEVEL == TOP_LEVEL


def test_no_tracked_file_is_large(tracked: list[Path]) -> None:
    large = {str(path): (ROOT / path).stat().st_size for path in tracked}
    assert {name: size for name, size in large.items() if size > 25_000_000} == {}
