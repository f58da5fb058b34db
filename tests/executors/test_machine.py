"""What the machine says of its memory."""

import pytest

from dart_eval.util.machine import memory

MEMINFO = "MemTotal:       1000 kB\nMemFree:        100 kB\nMemAvailable:    800 kB\n"
KB = 1024


@pytest.mark.parametrize(("groups", "files", "wanted"), [
    (None, {}, None),  # the system does not say
    ("0::/\n", {}, (800, 1000)),
    ("0::/job/step\n", {"job/memory.max": 500, "job/memory.current": 100}, (400, 500)),
    ("0::/job/step\n", {"job/memory.max": "max", "job/memory.current": 100}, (800, 1000)),
    ("0::/gone\n", {"memory.max": 900, "memory.current": 700}, (200, 900)),
    ("4:memory:/job\n1:cpu:/\n0::/\n",
     {"memory/job/memory.limit_in_bytes": 300, "memory/job/memory.usage_in_bytes": 310}, (-10, 300)),
    ("4:memory:/\n", {"memory/memory.limit_in_bytes": 2**53, "memory/memory.usage_in_bytes": 0}, (800, 1000)),
])  # fmt: skip
def test_memory_is_that_of_the_group_that_leaves_least(groups, files, wanted, tmp_path):
    texts = {} if groups is None else {"proc/meminfo": MEMINFO, "proc/self/cgroup": groups}
    texts |= {f"sys/fs/cgroup/{name}": f"{kb if kb == 'max' else kb * KB}\n" for name, kb in files.items()}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory(tmp_path) == (wanted and tuple(kb * KB for kb in wanted))
