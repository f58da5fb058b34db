"""Several nodes and GPUs, as far as one machine can play them: Ray takes its word for what a node has."""

import psutil
import pytest

from dart_eval.cluster import cluster
from dart_eval.cluster.pool import Pool
from dart_eval.sweep.config import config_from
from dart_eval.sweep.jobs import Silent
from dart_eval.util.errors import UserError
from tests.helpers.commands import program
from tests.helpers.nursery import LOCAL
from tests.helpers.pools import Handler, Worker, task_of

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("quick_workers")]
NODE = {"object_store_memory": 80_000_000}


@pytest.fixture
def nodes(quick_workers):
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **NODE})
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_lost_node_is_made_up_for(nodes, tmp_path):
    second = nodes.add_node(num_cpus=1, **NODE)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="error")

    class Losing(Handler):
        lost_at = None

        def on_message(self, task, message):
            super().on_message(task, message)
            if self.lost_at is None and len({n for n, text in self.lines if "runs on" in text}) == 2:
                self.lost_at = len(self.results)
                nodes.remove_node(second, allow_graceful=False)

    handler = Losing(tmp_path)
    with Pool(Worker, 2, {"num_cpus": 1}) as pool:
        pool.run([task_of("sleep", f"t{i}") for i in range(12)], handler)
    assert handler.lost_at is not None and handler.lost_at < 12
    assert sorted(handler.results) == sorted(f"T{i}" for i in range(12))
    assert handler.deaths and not handler.given_up


def test_the_loss_of_the_own_node_ends_the_run(tmp_path):
    """Ray would let it wait for ever."""
    earlier = psutil.Process().children()  # other clusters' may not be reaped
    ray.init(num_cpus=2, **LOCAL)
    (raylet,) = [p for p in psutil.Process().children() if p not in earlier and p.name() == "raylet"]

    class Losing(Handler):
        def on_message(self, task, message):
            raylet.kill()
            return super().on_message(task, message)

    handler = Losing(tmp_path)
    try:
        with (
            pytest.raises(UserError, match=r"node that this process belongs to is lost.*the same command"),
            Pool(Worker, 2, {"num_cpus": 1}) as pool,
        ):
            pool.run([task_of("sleep", f"t{i}") for i in range(100)], handler)
    finally:
        ray.shutdown()
    assert len(handler.results) < 100


def test_what_is_killed_for_memory_is_tried_again_with_less(tmp_path, monkeypatch):
    """By Ray's own monitor, which here takes every process for too large, whenever it looks."""
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.0001")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "5000")
    ray.init(num_cpus=1, **LOCAL)
    try:
        handler = Handler(tmp_path)
        with Pool(Worker, 1, {"num_cpus": 1}) as pool:
            pool.run([task_of("long", "a")], handler)
    finally:
        ray.shutdown()
    assert handler.begun == [("a", False, 0), ("a", True, 1), ("a", True, 2)]
    assert "low on memory" in handler.given_up["a"][0]


def test_a_cell_takes_the_gpus_that_there_are(nodes, saved_llama, tmp_path, monkeypatch):
    nodes.add_node(num_cpus=8, num_gpus=4, **NODE)
    nodes.add_node(num_cpus=3, num_gpus=4, **NODE)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="error")

    class Asked(Exception):
        """What a run wants of a pool: its workers' configuration and their number."""

    def asked(make, size, options):
        raise Asked(make.args[0], size)

    monkeypatch.setattr(cluster, "Pool", asked)
    sweep = {"model": saved_llama, "tasks": "smoke_questions", "output": str(tmp_path / "out"), "executor": "ray"}

    def room(**given):
        with pytest.raises(Asked) as found:
            cluster.run_all([config_from(None, {**sweep, **given})], Silent())
        placed, size = found.value.args
        return size, placed.device, placed.device_map

    assert room() == (7, "cuda", None)  # four cells, and three for want of CPUs
    assert room(gpus_per_cell=2) == (4, "cuda", "auto")  # a model over two GPUs
    assert room(gpus_per_cell=0.5, cpus_per_cell=0.5) == (14, "cuda", None)
    assert room(gpus_per_cell=0.2, cpus_per_cell=0.1) == (40, "cuda", None)  # 0.2 fits five times into 1
    assert room(device="cpu", cpus_per_cell=3) == (3, "cpu", None)
    with pytest.raises(UserError, match="no node of the cluster has 1 CPUs and 5 GPUs for a cell"):
        room(gpus_per_cell=5)
    for given in (
        {"device": "cuda:1"}, {"device": "mps"}, {"gpus_per_cell": 1.5}, {"device": "cpu", "gpus_per_cell": 1},
        {"device": "cuda", "gpus_per_cell": 0},
    ):  # fmt: skip
        with pytest.raises(UserError):
            config_from(None, {"tasks": "smoke", "executor": "ray", **given}).check()


@pytest.mark.process
def test_a_running_cluster_is_used_and_left_running(nodes, saved_llama, tmp_path):
    nodes.add_node(num_cpus=1, **NODE)
    sweep = ("--tasks", "smoke_questions", "--method", "dense,griffin", "--limit", "4", "--output", tmp_path / "out")
    done = program("run", "--model", saved_llama, *sweep, "--executor", "ray", "--ray-address", nodes.address)
    assert done.returncode == 0, done.stderr
    logs = [p.read_text() for p in (tmp_path / "out" / "logs").glob("worker-*.log")]
    assert len(logs) == 2 and "".join(logs).count(" is done") == 2
    ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
    assert sum(node["Alive"] for node in ray.nodes()) == 2
    job = ray.get_runtime_context().get_job_id()
    assert int.from_bytes(bytes.fromhex(job), "little") == 2  # the run was this cluster's first


def test_no_cluster_at_that_address(saved_llama, tmp_path):
    config = config_from(None, {
        "model": saved_llama, "tasks": "smoke", "executor": "ray", "ray_address": "127.0.0.1:1",
        "output": str(tmp_path / "o"),
    })  # fmt: skip
    with pytest.raises(UserError, match="no Ray cluster at 127"):
        cluster.run_all([config], Silent())
    assert not (tmp_path / "o").exists()
