"""The package works as a bare checkout, an editable install, a wheel, and a wheel built from the sdist: in any folder.

The build backend is called directly, and torch is borrowed from the environment that runs the tests: no downloads.
"""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fp8train
from tests.source_tree import ROOT, files

pytestmark = pytest.mark.slow

KINDS = ("checkout", "editable", "wheel", "sdist_wheel")
PROBE = """
import importlib.util, json, fp8train, fp8train.configs, fp8train.kernels, fp8train.recipes, kernels
print(json.dumps({
    "version": fp8train.__version__,
    "owner": kernels.OWNER,
    "folders": [next(iter(part.__path__)) for part in (fp8train.kernels, fp8train.configs, fp8train.recipes)],
    "strays": [name for name in ("fp8train.tests", "fp8train.fp8train") if importlib.util.find_spec(name)],
}))
"""
CONFIGURE = """
import fp8train
from fp8train.config import load_config
print(fp8train.load_recipe("blockwise").name, load_config(["model=llama_125m"]).model.name)
"""
TINY_RUN = (
    "model.num_layers=1 steps=1 seq_len=32 global_batch_tokens=64 data.eval_windows=1 data.path=text.txt data=text"
)


@dataclass(frozen=True)
class Installed:
    """One way to have the package."""

    kind: str
    python: Path
    above: Path  # holds the checkout, in a folder called fp8train like the package
    variables: dict[str, str]

    def run(self, *arguments: str, cwd: Path) -> str:
        done = subprocess.run([self.python, *arguments], cwd=cwd, env=self.variables, capture_output=True, text=True)
        assert done.returncode == 0, f"{self.kind}: {arguments} in {cwd}:\n{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources in a folder called fp8train."""
    copy = tmp_path_factory.mktemp("above") / "fp8train"
    for path in files():
        (copy / path.parent).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, copy / path)
    return copy


@pytest.fixture(scope="module")
def distributions(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> the file: the sdist, and the three wheels."""
    out = tmp_path_factory.mktemp("distributions")
    made = {kind: build(checkout, kind, out / kind) for kind in ("editable", "wheel", "sdist")}
    with tarfile.open(made["sdist"]) as archive:
        archive.extractall(out / "unpacked", filter="data")
    unpacked = next((out / "unpacked").iterdir())
    return made | {"sdist_wheel": build(unpacked, "wheel", out / "sdist_wheel")}


@pytest.fixture(scope="module", params=KINDS)
def installed(
    request: pytest.FixtureRequest,
    checkout: Path,
    distributions: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Installed:
    """A fresh virtual environment with the package, and a foreign package called kernels beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    python, site = make_environment(folder)
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if request.param == "checkout":
        variables["PYTHONPATH"] = str(checkout)
    else:
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "-qq", "--no-deps", "--no-index"]
        subprocess.run([*pip, distributions[request.param]], check=True)
    (site / "kernels").mkdir()
    (site / "kernels/__init__.py").write_text("OWNER = 'somebody else'\n")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Installed(request.param, python, checkout.parent, variables)


def build(source: Path, kind: str, folder: Path) -> Path:
    """Build a distribution as pip would: calls the hook of the build backend in the source folder."""
    code = f"import hatchling.build; hatchling.build.build_{kind}({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return next(folder.iterdir())


def make_environment(folder: Path) -> tuple[Path, Path]:
    """A virtual environment without pip: its Python, and its site-packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin/python", next(folder.glob("lib/python*/site-packages"))


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize("place", ["inside the checkout", "above the checkout", "elsewhere"])
def test_package_and_its_folders_are_found_from_any_folder(installed: Installed, place: str, tmp_path: Path) -> None:
    inside = installed.above / "fp8train"
    cwd = {"inside the checkout": inside, "above the checkout": installed.above, "elsewhere": tmp_path}[place]
    found = json.loads(installed.run("-c", PROBE, cwd=cwd))
    local = installed.kind in ("checkout", "editable") or cwd == inside
    base = inside if local else installed.python.parent.parent
    assert found["version"] == fp8train.__version__
    assert found["owner"] == "somebody else", "our kernels/ shadows another package"
    assert [Path(folder).name for folder in found["folders"]] == ["kernels", "configs", "recipes"]
    assert all(Path(folder).is_relative_to(base) for folder in found["folders"])
    assert not found["strays"]


def test_recipes_and_configs_are_found(installed: Installed, tmp_path: Path) -> None:
    assert installed.run("-c", CONFIGURE, cwd=tmp_path).split() == ["blockwise", "llama_125m"]


def test_torchrun_starts_a_module_of_the_package(installed: Installed, tmp_path: Path) -> None:
    if installed.kind not in ("editable", "wheel"):
        pytest.skip(
            "the sdist's wheel has the same files as the wheel; the checkout the same path as the editable install"
        )
    (tmp_path / "text.txt").write_text("\n".join(f"{n} squared is {n * n}." for n in range(800)))
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "fp8train.train"]
    installed.run(*run, "run_dir=run", *TINY_RUN.split(), cwd=tmp_path)
    assert (tmp_path / "run/metrics.jsonl").read_text()


def test_installed_command_lists_the_commands(distributions: dict[str, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(distributions["wheel"]) as archive:
        name = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "fp8train = fp8train.__main__:run" in archive.read(name).decode()
    done = subprocess.run([sys.executable, "-m", "fp8train", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "compare" in done.stdout


@pytest.mark.parametrize("kind", ["wheel", "sdist_wheel"])
def test_wheel_holds_every_file_under_one_name(distributions: dict[str, Path], kind: str) -> None:
    inside = {name for name in contents(distributions[kind]) if ".dist-info/" not in name}
    package = {str(path) for path in files() if path.parts[0] == "fp8train"}
    mounted = {f"fp8train/{path}" for path in files() if path.parts[0] in ("kernels", "configs", "recipes")}
    assert inside == package | mounted
    assert {name.split("/")[0] for name in contents(distributions[kind])} == {
        "fp8train",
        f"fp8train-{fp8train.__version__}.dist-info",
    }


def test_editable_install_copies_nothing(distributions: dict[str, Path]) -> None:
    names = {name for name in contents(distributions["editable"]) if ".dist-info/" not in name}
    assert names == {"_fp8train.pth"}


def test_extras_and_licence_are_in_the_metadata(distributions: dict[str, Path]) -> None:
    with zipfile.ZipFile(distributions["wheel"]) as archive:
        text = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()
    metadata = email.message_from_string(text)
    assert {"triton", "te", "wandb", "hf", "dev"} <= set(metadata.get_all("Provides-Extra", []))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == "<3.14,>=3.11"
    assert "torch>=2.11" in metadata.get_all("Requires-Dist", [])


def test_constraints_lie_within_the_ranges_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [*project["dependencies"], *(need for extra in project["optional-dependencies"].values() for need in extra)]
    pins = [line for line in (ROOT / "launch/constraints.txt").read_text().splitlines() if "==" in line]
    assert "torch==2.13.0" in pins
    versions = dict(line.lower().split("==") for line in pins)
    ranges = {need.name.lower(): need.specifier for need in map(Requirement, needs)}
    outside = [f"{name} {version}" for name, version in versions.items() if not ranges[name].contains(version)]
    assert not outside
