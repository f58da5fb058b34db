"""What the machine says of its memory."""

import pytest

from dart_eval.util.machine import memory

MEMINFO = "MemTotal:       1000 kB\nMemFree:        100 kB\nMemAvailable:    800 kB\n"
KB = 1024


@pytest.mark.parametrize(
    ("groups", "files", "wanted"),
    [
        ("0::/\n", {}, (800 * KB, 1000 * KB)),
        ("0::/job/step\n", {"job/memory.max": 500 * KB, "job/memory.current": 100 * KB}, (400 * KB, 500 * KB)),
        ("0::/job/step\n", {"job/memory.max": "max", "job/memory.current": 100 * KB}, (800 * KB, 1000 * KB)),
        ("0::/gone\n", {"memory.max": 900 * KB, "memory.current": 700 * KB}, (200 * KB, 900 * KB)),
        (
            "4:memory:/job\n1:cpu:/\n0::/\n",
            {"memory/job/memory.limit_in_bytes": 300 * KB, "memory/job/memory.usage_in_bytes": 310 * KB},
            (-10 * KB, 300 * KB),
        ),
        (
            "4:memory:/\n",
            {"memory/memory.limit_in_bytes": 2**63, "memory/memory.usage_in_bytes": 0},
            (800 * KB, 1000 * KB),
        ),
    ],
)
def test_memory_is_that_of_the_group_that_leaves_least(groups, files, wanted, tmp_path):
    for name, text in {"proc/meminfo": MEMINFO, "proc/self/cgroup": groups}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for name, number in files.items():
        (tmp_path / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/fs/cgroup" / name).write_text(f"{number}\n")
    assert memory(tmp_path) == wanted


def test_memory_is_unknown_where_the_system_does_not_say(tmp_path):
    assert memory(tmp_path) is None
