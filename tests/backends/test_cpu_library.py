"""Building and loading the C++ quantisers, and doing without them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from fp8train.backends import cpu_library
from fp8train.backends.cpu import CpuBackend
from fp8train.backends.user_cache import cache_folder
from fp8train.quant import reference
from fp8train.quant.formats import QuantSpec
from tests.quant.specs import same_codes
from tests.shapes import matrix

load: Callable[[], cpu_library.CpuLibrary] = cpu_library.load.__wrapped__  # without the memory of this process
SPEC = QuantSpec.parse("e4m3 1x128")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def fake_compiler(folder: Path, body: str) -> str:
    """A program called c++ that runs a line of shell."""
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def needs_compiler() -> None:
    if not any(shutil.which(name) for name in cpu_library.COMPILERS):
        pytest.skip(f"no C++ compiler on this machine (looked for {', '.join(cpu_library.COMPILERS)})")


def test_without_a_compiler_the_reason_says_what_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    library = load()
    assert library.functions is None
    assert library.reason == "no C++ compiler found (looked for c++, g++, clang++)"


def test_without_a_compiler_the_backend_says_so_and_computes_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(cpu_library, "load", load)
    backend = CpuBackend()
    assert backend.note.startswith("quantisers in torch: no C++ compiler found")
    x = matrix(130, 300)
    made, made_t = backend.quantize_dual(x, SPEC, SPEC)
    assert same_codes(made, reference.quantize(x, SPEC))
    assert same_codes(made_t, reference.quantize(x, SPEC, transpose=True))


def test_failed_build_gives_the_compilers_first_line(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = 'case "$1" in --version) echo fake 1.0;; *) echo; echo "error: no such flag" >&2; exit 3;; esac'
    compiler = fake_compiler(tmp_path, body)
    monkeypatch.setattr(shutil, "which", lambda name: compiler)
    library = load()
    assert library.functions is None
    assert "could not build cpu_kernels.cpp: error: no such flag" in library.reason
    assert not list((home / ".cache" / "fp8train").iterdir())  # nothing half-written


def test_compiler_that_writes_no_library_is_reported(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # it "succeeds", but what it wrote cannot be loaded: the $out is the argument after -o
    body = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo garbage > "$2"; shift; done'
    compiler = fake_compiler(tmp_path, body)
    monkeypatch.setattr(shutil, "which", lambda name: compiler)
    library = load()
    assert library.functions is None and "could not be built or loaded" in library.reason


def test_slow_compiler_is_given_up(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = fake_compiler(tmp_path, "sleep 30")
    monkeypatch.setattr(shutil, "which", lambda name: compiler)
    monkeypatch.setattr(cpu_library, "BUILD_SECONDS", 0.2)
    library = load()
    assert library.functions is None and "timed out" in library.reason


def test_library_is_built_once_and_then_taken_from_the_cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_compiler()
    monkeypatch.setattr(cpu_library, "FLAGS", cheap_flags())
    first = load()
    assert first.functions is not None, first.reason
    (built,) = (home / ".cache" / "fp8train").iterdir()

    def refuse(compiler: str, path: Path) -> None:
        raise AssertionError("built a second time")

    monkeypatch.setattr(cpu_library, "_build", refuse)
    assert load().functions is not None
    monkeypatch.setattr(cpu_library, "FLAGS", (*cheap_flags(), "-g"))
    with pytest.raises(AssertionError, match="second time"):  # other flags are another library
        load()
    assert built.name.startswith("cpu_kernels_") and built.suffix == ".so"


def test_read_only_home_builds_for_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    needs_compiler()
    (home / ".cache").write_text("a file where the folder should be")
    monkeypatch.setattr(cpu_library, "FLAGS", cheap_flags())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    library = load()
    assert library.functions is not None, library.reason
    assert list(tmp_path.glob("fp8train-*/cpu_kernels_*.so"))


def test_user_without_a_home_builds_for_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a container that runs under a number without an entry in the password file: Path.home() raises RuntimeError
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = cache_folder()
    assert folder.parent == tmp_path and folder.name.startswith("fp8train-")
    assert cache_folder() == folder, "what is kept there is found again"


@pytest.mark.parametrize(
    ("mode", "uid", "writes_as", "said"),
    [
        (0o777, 0, 0, "can be written to by every user"),
        (0o755, 1, 1, "belongs to user"),
        (0o775, 0, 0, ""),
        (0o775, 0, 0, "by its group, and stays so (Operation not permitted)"),
        (0o755, 1, 0, ""),
    ],
    ids=[
        "open to all",
        "of another user",
        "open to a group",
        "open to a group for good",
        "NFS maps users to its owner",
    ],
)
def test_nothing_is_loaded_that_another_user_could_have_put_there(
    mode: int, uid: int, writes_as: int, said: str, home: Path, tmp_path_factory, monkeypatch, caplog
) -> None:
    planted = home / ".cache" / "fp8train"
    planted.mkdir(parents=True)
    planted.chmod(mode)
    user, fstat = os.geteuid(), os.fstat
    monkeypatch.setattr("os.geteuid", lambda: user + uid)
    monkeypatch.setattr("os.fstat", lambda file: os.stat_result((*fstat(file)[:4], user + writes_as, *fstat(file)[5:])))
    if "by its group" in said:
        monkeypatch.setattr(Path, "chmod", Mock(side_effect=PermissionError(1, "Operation not permitted")))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("tmp")))
    folder = cache_folder()
    assert not stat.S_IMODE(folder.stat().st_mode) & 0o022, "nor can anybody put something there later"
    assert (folder != planted) == bool(said) and said in caplog.text
    assert cache_folder() == folder and caplog.text.count("needs to be of user") == bool(said), "said once"


def test_new_folder_is_the_users_alone(home: Path) -> None:
    assert stat.S_IMODE(cache_folder().stat().st_mode) == 0o700


def test_processes_that_start_together_all_get_a_whole_library(home: Path) -> None:
    needs_compiler()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_load_and_count, args=(results,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    counts = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert counts == [5, 5, 5]
    assert len(list((home / ".cache" / "fp8train").iterdir())) == 1


def test_every_function_of_the_source_has_a_signature_with_as_many_arguments() -> None:
    source = cpu_library.SOURCE.read_text()
    exported = source[source.index('extern "C" {') :]
    for name, signature in cpu_library._SIGNATURES.items():
        arguments = exported.split(f"void {name}(")[1].split(")")[0].split(",")
        assert len(arguments) == len(signature), name
        pointers = [("*" in argument) for argument in arguments]
        assert pointers == [kind is ctypes.c_void_p for kind in signature], name


def cheap_flags() -> tuple[str, ...]:
    """The build's flags without optimisation, which takes most of its time."""
    return tuple("-O0" if flag == "-O3" else flag for flag in cpu_library.FLAGS)


def _load_and_count(results: multiprocessing.Queue) -> None:
    cpu_library.FLAGS = cheap_flags()
    library = load()
    results.put(sum(hasattr(library.functions, name) for name in cpu_library._SIGNATURES))
