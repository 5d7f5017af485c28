"""What is decided before and beside a run of several processes, on one."""

import dataclasses
import time
import types

import pytest
from processes import free_port

from experiments import train
from sharding import agreement, hosts
from sharding.hosts import HostsConfig
from sharding.settings import InputError

CLUSTERS = {
    "SLURM": {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "node[1-2]"},
    "Open MPI": {"OMPI_COMM_WORLD_SIZE": "4"},
}
ALONE = {
    "a shell in an allocation": {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    "one rank": {"OMPI_COMM_WORLD_SIZE": "1"},
    "a pod that is no indexed job": {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    "nothing": {},
}


@pytest.fixture
def environment(monkeypatch):
    """Sets variables, and none of any cluster else."""
    for variables in (*CLUSTERS.values(), *ALONE.values()):
        for name in variables:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")

    def set_all(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize("name", CLUSTERS)
def test_clusters_are_found(environment, name):
    environment(CLUSTERS[name])
    assert hosts.find_cluster() == name


@pytest.mark.parametrize("name", ALONE)
def test_a_process_alone_starts_nothing(environment, name):
    environment(ALONE[name])
    assert hosts.find_cluster() == ""
    assert not hosts.start(HostsConfig())
    assert not hosts.several()
    hosts.leave()


def test_one_process_in_a_cluster_may_be_alone(environment):
    environment(CLUSTERS["SLURM"])
    assert not hosts.start(HostsConfig(num_processes=1))


def test_a_kubernetes_job_needs_the_package_that_asks_for_its_hosts(environment, monkeypatch):
    environment({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"kubernetes.*--num_processes=1"):
        hosts.find_cluster()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"coordinator": "a:1"}, "--num_processes, --process_id missing"),
        ({"num_processes": 2}, "--coordinator, --process_id missing"),
        ({"process_id": 1}, "--coordinator, --num_processes missing"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "expected 0 to 1"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "expected host:port"),
        ({"coordinator": "a:x", "num_processes": 2, "process_id": 0}, "expected host:port"),
        ({"heartbeat_seconds": 1}, "heartbeat_seconds=1: expected at least 2"),
    ],
)
def test_flags_that_do_not_fit_together(fields, told):
    with pytest.raises(InputError, match=told):
        HostsConfig(**fields)


def test_the_program_refuses_them_before_anything_else(capsys):
    from experiments import program

    with pytest.raises(SystemExit) as ended:
        program.run(train.main, train.FLAGS, ["train", "--config=tiny", "--num_processes=3"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --coordinator, --process_id missing")
    assert error.count("\n") == 1


def test_a_coordinator_that_cannot_be_reached(tmp_path):
    address = f"localhost:{free_port()}"
    config = HostsConfig(
        coordinator=address, num_processes=2, process_id=1, initialization_seconds=1
    )
    with pytest.raises(InputError, match=rf"--coordinator={address} could not be reached within 1"):
        hosts.start(config)
    assert not hosts.several()


def test_who_waits_least_is_slow():
    waits = {0: 0.021, 1: 0.0019, 2: 0.022, 3: 0.020}
    slow = agreement.slowest(waits, 0.01)
    assert slow.process == 1
    assert slow.seconds == pytest.approx(0.021 - 0.0019)
    assert agreement.slowest(waits, 0.02) is None
    assert agreement.slowest({0: 1.0}, 0.0) is None


def test_on_one_process_nothing_has_to_be_agreed(tmp_path):
    agreement.check_same("anything", {"a": object()})
    agreement.check_shared(tmp_path)
    assert not any(tmp_path.iterdir())
    assert agreement.from_process_0(lambda: "value") == "value"
    assert agreement.stop_at(3, lambda: True)
    assert not agreement.stop_at(3, lambda: False)
    assert agreement.Meetings().meet(3, lambda: True) == (True, None)


class Store:
    """A coordination service with three other processes, of which process 2 comes last."""

    def __init__(self):
        self.kept = {"parscale/host/2": "host-c"}

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.kept
        self.kept[key] = value

    def key_value_try_get(self, key):
        return self.kept[key]

    def key_value_dir_get(self, key):
        return [(name, value) for name, value in self.kept.items() if name.startswith(key + "/")]

    def wait_at_barrier(self, key, timeout):
        time.sleep(0.05)
        for process, wait in ((1, 0.04), (2, 0.001), (3, 0.05)):
            self.kept[f"parscale/wait/{process}"] = str(wait)


def test_who_is_slow_twice_in_a_row_is_named(monkeypatch):
    store = Store()
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(hosts, "client", lambda: store)
    meetings = agreement.Meetings()
    found = [meetings.meet(step, lambda step=step: step == 2) for step in range(4)]
    assert [due for due, _ in found] == [False, False, True, False]
    assert [slow and slow.process for _, slow in found] == [None, None, 2, 2]
    assert found[3][1].describe().startswith("process 2 on host-c is slow: the others wait 0.0")


@dataclasses.dataclass(frozen=True)
class Device:
    """One of a host's."""

    process_index: int
    number: int


def laid_out(monkeypatch, *parts):
    """Lets device i of a run hold these rows of a batch; every two devices are one host."""
    held = {Device(i // 2, i): (slice(*part),) for i, part in enumerate(parts)}
    sharding = types.SimpleNamespace(devices_indices_map=lambda shape: held)
    monkeypatch.setattr(agreement.rules, "named_sharding", lambda mesh, axis: sharding)
    return types.SimpleNamespace(shape={"data": len(parts)})


def test_rows_of_a_host_are_those_of_its_devices(monkeypatch):
    read = lambda *parts: agreement.host_rows(laid_out(monkeypatch, *parts), 8).tolist()
    assert read((0, 2), (2, 4), (4, 6), (6, 8)) == [0, 1, 2, 3]
    assert read((0, 4), (0, 4), (4, 8), (4, 8)) == [0, 1, 2, 3]
    assert read((0, 4), (0, 4), (0, 4), (0, 4), (4, 8), (4, 8)) == [0, 1, 2, 3]
    assert read((0, 2), (4, 6), (2, 4), (6, 8)) == [0, 1, 4, 5]
    assert read((0, 8), (0, 8), (0, 8), (0, 8)) == list(range(8))
    with pytest.raises(InputError, match="processes 0 and 1 share some rows"):
        read((0, 2), (2, 4), (2, 4), (4, 6))
