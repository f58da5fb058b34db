"""Building the kernels for CPUs: with a compiler or without, twice at once, over a damaged file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dart_eval.kernels import mask_rows
from dart_eval.kernels.cpu import build

SMALL = '__attribute__((visibility("default"))) int cpu_level(void) { return 1; }\n'  # a library that is made quickly

has_compiler = pytest.mark.skipif(build.why_no_kernel() is not None, reason=f"{build.why_no_kernel()}")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The source is small, and the cache folder empty. Gives the folder of libraries."""
    source = tmp_path / "small.c"
    source.write_text(SMALL)
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setenv("DART_EVAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def fresh():
    """What `library` would do in a new process."""
    return build.library.__wrapped__()


def fails():
    with pytest.raises(build.Missing) as caught:
        fresh()
    return str(caught.value)


@has_compiler
def test_a_library_that_is_there_needs_no_temporary_folder(small, monkeypatch):
    fresh()

    def full(*_args, **_kwargs):
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(build.tempfile, "TemporaryDirectory", full)
    assert fresh().cpu_level() == 1
    next(small.glob("*.so")).unlink()
    assert "no folder" in fails()


@has_compiler
def test_it_is_built_once_and_kept_by_what_it_is_made_of(small, monkeypatch):
    assert fresh().cpu_level() == 1
    (file,) = small.iterdir()
    made = file.stat().st_mtime_ns
    monkeypatch.setattr(build, "_compile", None)  # not called again
    assert fresh().cpu_level() == 1 and file.stat().st_mtime_ns == made
    monkeypatch.setenv("PATH", "")  # an image without the compiler that built it
    assert fresh().cpu_level() == 1


@has_compiler
def test_another_source_or_other_flags_are_another_file(small, monkeypatch):
    fresh()
    build.SOURCE.write_text(SMALL + "// more\n")
    fresh()
    build.SOURCE.with_suffix(".h").write_text("// read by it\n")
    fresh()
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O1"))
    fresh()
    assert len(list(small.iterdir())) == 4


@has_compiler
def test_a_damaged_or_foreign_file_is_made_anew(small):
    fresh()
    (file,) = small.iterdir()
    whole = file.read_bytes()
    half, (first, *more) = len(whole) // 2, whole[len(whole) // 2 :]
    for damaged in (b"", b"\x7fELF", whole[:half], whole[:half] + bytes([first ^ 1, *more])):
        file.unlink()  # the process has the old one mapped
        file.write_bytes(damaged)
        assert not build._is_intact(file) and fresh().cpu_level() == 1 and build._is_intact(file)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("", "no C compiler"),
        ("exit 1", "no C compiler"),
        ('[ "$1" = --version ] || { echo "cc: cannot do that" >&2; exit 1; }', "(cc: cannot do that)"),
        ('[ "$1" = --version ] || exec sleep 30', "took more than 0.2 s"),
    ],
)
def test_a_compiler_that_fails_is_named_with_its_first_line(small, tmp_path, monkeypatch, script, words):
    folder = tmp_path / "bin"
    folder.mkdir()
    if script:
        (folder / "cc").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "cc").chmod(0o755)
    (folder / "sleep").symlink_to("/bin/sleep")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(build, "SECONDS", 0.2)
    found = fails()
    assert words in found and "\n" not in found
    assert not small.exists() or not list(small.iterdir())


def test_nothing_of_the_working_folder_is_run(small, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    (tmp_path / "cc").write_text(f"#!/bin/sh\ntouch {ran}\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join((".", "")))
    assert "no C compiler" in fails() and not ran.exists()


@has_compiler
def test_a_cache_that_follows_the_working_folder_or_is_open_to_others_is_not_used(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DART_EVAL_CACHE", "cache")
    assert fresh().cpu_level() == 1 and not small.exists()
    monkeypatch.setenv("DART_EVAL_CACHE", str(tmp_path / "open"))
    (tmp_path / "open" / "kernels").mkdir(parents=True)
    (tmp_path / "open" / "kernels").chmod(0o777)
    assert fresh().cpu_level() == 1 and not list((tmp_path / "open" / "kernels").iterdir())


@has_compiler
def test_a_cache_that_cannot_be_written_costs_a_build_each_time(small, monkeypatch):
    def write(path, data):
        if small in path.parents:
            raise OSError("no room")
        path.write_bytes(data)

    monkeypatch.setattr(build, "write_atomically", write)
    assert fresh().cpu_level() == 1


@has_compiler
def test_another_machine_and_a_processor_without_avx2_are_told(small, monkeypatch):
    build.SOURCE.write_text(SMALL.replace("return 1", "return 0"))
    assert "AVX2" in fails()
    for machine, system in (("aarch64", "posix"), ("x86_64", "nt")):
        monkeypatch.setattr(build.platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(build.os, "name", system)
        assert f"not {machine}" in fails()


@has_compiler
def test_instructions_are_as_told_or_the_best(monkeypatch):
    monkeypatch.delenv("DART_EVAL_CPU_LEVEL", raising=False)
    best = build.library().cpu_level()
    assert build.level() == best and build.level("avx2") == 1
    monkeypatch.setenv("DART_EVAL_CPU_LEVEL", "avx2")
    assert build.level() == 1
    for wrong in ("sse2", "avx1024"):
        with pytest.raises(build.Missing, match=wrong):
            build.level(wrong)


@has_compiler
def test_instructions_that_there_are_none_of_leave_the_work_to_torch(monkeypatch):
    monkeypatch.setenv("DART_EVAL_CPU_LEVEL", "")
    assert build.why_no_kernel() is None and build.level() == build.library().cpu_level()
    monkeypatch.setenv("DART_EVAL_CPU_LEVEL", "AVX2")
    assert "avx2, avx512" in build.why_no_kernel()
    weight = torch.zeros(4, 8, dtype=torch.bfloat16)
    assert mask_rows.why_no_kernel(weight, None) == build.why_no_kernel()


@has_compiler
@pytest.mark.process
@pytest.mark.slow
def test_two_processes_that_build_at_once_both_have_it(small):
    code = (
        "import sys, pathlib\nfrom dart_eval.kernels.cpu import build\nbuild.SOURCE = pathlib.Path(sys.argv[1])\n"
        "print(build.library().cpu_level(), build.why_no_kernel())"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(build.SOURCE)], stdout=subprocess.PIPE, text=True,
                         cwd=Path(build.__file__).parents[3])
        for _ in range(2)
    ]  # fmt: skip
    assert [p.communicate(timeout=120)[0].strip() for p in started] == ["1 None"] * 2
    (file,) = small.iterdir()
    assert build._is_intact(file)
