"""Checkpoints: what comes back is what was saved, on any mesh, after any damage or death."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from parscale import manifest
from parscale.checkpoints import Checkpoints, SaveError, restore_params, stored_shapes
from sharding.settings import InputError


def host_state(seed: int, width: int = 16) -> dict:
    """A small state of NumPy arrays, with every kind of leaf a run has."""
    rng = np.random.default_rng(seed)
    params = {
        "embed": rng.normal(size=(8, width)).astype(np.float32),
        "layers": {
            "w": rng.normal(size=(4, width, 8)).astype(np.float32),
            "b": rng.normal(size=(4, 8)).astype(jnp.bfloat16),
        },
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)

    def fill(leaf):
        return rng.integers(0, 99, leaf.shape).astype(leaf.dtype)

    return {
        "trainable": params,
        "optimizer": jax.tree.map(fill, optimizer),
        "frozen": {},
        "step": np.int32(seed),
        "skipped": np.int32(7),
    }


def place(state: dict, sharding=None) -> dict:
    """The state on devices; arrays whose first axis divides are split by `sharding`."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, pick(leaf, sharding)), state)


def abstract(state: dict, sharding=None) -> dict:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=pick(leaf, sharding)),
        state,
    )


def pick(leaf, sharding):
    if sharding is None:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    splits = leaf.ndim and leaf.shape[0] % sharding.mesh.size == 0
    return sharding if splits else NamedSharding(sharding.mesh, PartitionSpec())


def split_over(count: int) -> NamedSharding:
    mesh = Mesh(np.array(jax.devices()[:count]), ("fsdp",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("fsdp"))


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_steps(directory: Path, *steps: int, keep: int = 3) -> None:
    with Checkpoints(directory, keep=keep) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, place(host_state(step)), {"seconds": step / 2})


def data_file(folder: Path, item: str = "trainable") -> Path:
    """The largest file of an item: the one that holds its arrays."""
    return max((folder / item).rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize(("saved_on", "restored_on"), [(8, 4), (4, 1), (1, 8)])
def test_restored_bits_do_not_depend_on_the_mesh(tmp_path, saved_on, restored_on):
    state = host_state(3)
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.restore(abstract(state)) is None
        checkpoints.save(3, place(state, split_over(saved_on)), {"seconds": 1.5, "at": [1, 2]})
        target = abstract(state, split_over(restored_on))
        step, arrays, record = checkpoints.restore(target)
    assert step == 3
    assert record == {"seconds": 1.5, "at": [1, 2]}
    assert_same(arrays, state)
    shardings = jax.tree.map(lambda a, b: a.sharding == b.sharding, arrays, target)
    assert all(jax.tree.leaves(shardings))


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    state = host_state(1, width=1 << 14)
    advance = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        live = place(state)
        checkpoints.save(1, live, {})
        for _ in range(3):
            live = advance(live)
        jax.block_until_ready(live)
        _, arrays, _ = checkpoints.restore(abstract(state))
    assert_same(arrays, state)


def test_the_newest_are_kept_and_a_step_is_saved_once(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4, 5, keep=2)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps() == [4, 5]
        assert checkpoints.latest_complete() == 5
        assert not checkpoints.save(5, place(host_state(99)), {})
        assert_same(checkpoints.restore(abstract(host_state(0)))[1], host_state(5))
    assert names(tmp_path) == {"4", "5"}


@pytest.mark.parametrize("item", ["trainable", "optimizer", "record"])
@pytest.mark.parametrize(
    ("harm", "words"),
    [(flip_byte, "checksum"), (truncate, "bytes instead of"), (Path.unlink, "missing")],
)
def test_damage_is_named_and_the_previous_checkpoint_restored(tmp_path, capsys, item, harm, words):
    save_steps(tmp_path, 1, 2)
    harmed = data_file(tmp_path / "2", item)
    harm(harmed)
    with Checkpoints(tmp_path) as checkpoints:
        step, arrays, _ = checkpoints.restore(abstract(host_state(0)))
        assert step == 1
        assert_same(arrays, host_state(1))
        warning = capsys.readouterr().err
        assert warning.count("\n") == 1
        assert words in warning
        assert harmed.relative_to(tmp_path / "2").as_posix() in warning
        # The damaged one is not deleted before the run has come as far again.
        assert names(tmp_path) == {"1", "2.damaged"}
        assert checkpoints.save(2, place(host_state(2)), {}, wait=True)
        assert names(tmp_path) == {"1", "2"}
        assert_same(checkpoints.restore(abstract(host_state(0)))[1], host_state(2))


def test_every_file_of_a_checkpoint_is_checked(tmp_path):
    save_steps(tmp_path, 1)
    files = [path for path in (tmp_path / "1").rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        flip_byte(path)
        assert manifest.find_damage(tmp_path / "1"), path
        path.write_bytes(content)
    assert not manifest.find_damage(tmp_path / "1")


def test_when_all_are_damaged_each_is_named_and_none_is_touched(tmp_path):
    save_steps(tmp_path, 1, 2)
    flip_byte(data_file(tmp_path / "1"))
    truncate(data_file(tmp_path / "2", "optimizer"))
    for _ in range(2):  # a second try must not begin from nothing
        with (
            Checkpoints(tmp_path) as checkpoints,
            pytest.raises(InputError, match=r"1: trainable/.*; 2: optimizer/|1: train.*, 2: opt"),
        ):
            checkpoints.restore(abstract(host_state(0)))
        assert names(tmp_path) == {"1", "2"}


def test_damaged_and_incomplete_steps_never_cost_the_last_complete_one(tmp_path):
    save_steps(tmp_path, 1, 5, 6, 7, keep=9)
    for step in ("5", "6"):
        flip_byte(data_file(tmp_path / step))
    (tmp_path / "7" / manifest.NAME).unlink()  # as if killed before the save was complete
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.restore(abstract(host_state(0)))[0] == 1
        checkpoints.save(2, place(host_state(2)), {}, wait=True)
        assert checkpoints.steps() == [2]
        assert names(tmp_path) == {"2", "5.damaged", "6.damaged", "7.damaged"}
        checkpoints.save(7, place(host_state(7)), {}, wait=True)
        assert names(tmp_path) == {"7"}


def test_an_unfinished_first_save_is_a_fresh_start(tmp_path, capsys):
    save_steps(tmp_path, 1)
    (tmp_path / "1" / manifest.NAME).unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(host_state(0))) is None
        assert "not written to its end" in capsys.readouterr().err
        # What is set aside was never a checkpoint: its presence is no damage.
        (tmp_path / "1").rename(tmp_path / "1.damaged")
        assert checkpoints.restore(abstract(host_state(0))) is None
        checkpoints.save(1, place(host_state(1)), {}, wait=True)
    assert names(tmp_path) == {"1"}


def test_parameters_are_read_without_the_optimizer(tmp_path):
    state = host_state(4)
    params = state["trainable"]
    split = {
        "trainable": {"layers": {"b": params["layers"]["b"]}},
        "frozen": {"embed": params["embed"], "layers": {"w": params["layers"]["w"]}},
    }
    save_steps(tmp_path / "all", 4)
    with Checkpoints(tmp_path / "split") as checkpoints:
        checkpoints.save(4, place({**state, **split}), {"seconds": 2.0})
    shapes = stored_shapes(tmp_path / "split")
    assert shapes["frozen"]["embed"] == jax.ShapeDtypeStruct((8, 16), jnp.float32)
    assert set(shapes) == {"trainable", "frozen", "optimizer", "scalars"}
    for directory in (tmp_path / "all", tmp_path / "split"):
        data_file(directory / "4", "optimizer").unlink()
        step, read, record = restore_params(directory)
        assert (step, record) == (4, {"seconds": 2.0})
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(read))
        assert_same(read, params)
        target = abstract(params, split_over(4))
        _, read, _ = restore_params(directory, target)
        assert_same(read, params)
        assert read["embed"].sharding == target["embed"].sharding
        _, read, _ = restore_params(directory, {"embed": target["embed"]}, partial=True)
        assert_same(read, {"embed": params["embed"]})


def test_reading_parameters_passes_over_damage_and_changes_nothing(tmp_path, capsys):
    save_steps(tmp_path, 1, 2)
    flip_byte(data_file(tmp_path / "2"))
    assert restore_params(tmp_path)[0] == 1
    assert "checkpoint" in capsys.readouterr().err
    assert restore_params(tmp_path, step=1)[0] == 1
    with pytest.raises(InputError, match=r"2 is damaged: trainable/"):
        restore_params(tmp_path, step=2)
    with pytest.raises(InputError, match="no complete step 3; it has 1, 2"):
        restore_params(tmp_path, step=3)
    assert names(tmp_path) == {"1", "2"}


def test_arrays_that_do_not_fit_are_named(tmp_path):
    save_steps(tmp_path, 1)
    wrong = abstract(host_state(0))
    wrong["trainable"]["layers"]["w"] = jax.ShapeDtypeStruct((4, 16, 9), jnp.float32)
    wrong["trainable"]["layers"]["b"] = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    wrong["trainable"]["head"] = wrong["trainable"].pop("embed")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(InputError) as error:
            checkpoints.restore(wrong)
        with pytest.raises(
            InputError, match="holds optimizer, scalars, trainable, but scalars, trainable"
        ):
            checkpoints.restore({"trainable": wrong["trainable"], "step": wrong["step"]})
    for words in (
        "missing: head;",
        "not expected: embed;",
        "layers/w is float32[4, 16, 8] instead of float32[4, 16, 9]",
        "layers/b is bfloat16[4, 8] instead of float32[4, 8]",
    ):
        assert words in str(error.value)
    with pytest.raises(InputError, match="missing: head"):
        restore_params(tmp_path, wrong["trainable"])


def test_what_is_not_a_checkpoint_directory_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(InputError, match=r"is not a checkpoint directory .* numbered folder"):
            Checkpoints(path)
        with pytest.raises(InputError, match=r"is not a checkpoint directory .* numbered folder"):
            restore_params(path)
    with pytest.raises(InputError, match="there is no such"):
        restore_params(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no checkpoint that can be read"):
        restore_params(tmp_path / "empty")
    with pytest.raises(InputError, match="keep=0"):
        Checkpoints(tmp_path / "empty", keep=0)


def test_a_record_that_is_not_json_is_refused_at_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(TypeError):
        checkpoints.save(1, place(host_state(1)), {"ids": np.zeros(3)})
    assert names(tmp_path) == set()


@pytest.mark.parametrize("surfaces_at", ["wait", "save", "close"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the writer's own
def test_a_full_device_is_one_error_and_costs_nothing(tmp_path, surfaces_at):
    """A limit on the size of files stands in for the full device."""
    save_steps(tmp_path, 1)
    large = place(host_state(2, width=1 << 14))
    checkpoints = Checkpoints(tmp_path)
    surface = {
        "wait": checkpoints.wait,
        "save": lambda: checkpoints.save(3, large, {}),
        "close": checkpoints.close,
    }[surfaces_at]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        checkpoints.save(2, large, {})
        with pytest.raises(SaveError, match=r"step 2 .* step 1 is intact.*space left"):
            surface()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    if surfaces_at == "close":
        checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(abstract(host_state(0)))[0] == 1
    checkpoints.save(2, large, {}, wait=True)  # there is space again
    checkpoints.close()
    assert names(tmp_path) == {"1", "2"}


SAVER = """
import sys
import jax, numpy as np
from parscale.checkpoints import Checkpoints
with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    target = {"trainable": {"w": jax.ShapeDtypeStruct((6_000_000,), np.float32)}}
    found = checkpoints.restore(target)
    step = found[0] if found else 0
    if found:
        assert found[2] == {"step": step}, found[2]
        assert (np.asarray(found[1]["trainable"]["w"]) == step).all()
    while True:
        step += 1
        w = jax.numpy.full(6_000_000, step, jax.numpy.float32)
        checkpoints.save(step, {"trainable": {"w": w}}, {"step": step}, wait=True)
        print(step, flush=True)
"""


@pytest.mark.multiprocess
def test_kill_during_a_save_leaves_the_previous_checkpoint(tmp_path):
    """Each trial goes on from what the one before left, and is killed inside a save."""
    directory = tmp_path / "run"
    rng = np.random.default_rng(0)
    reported = 0
    killed_during_save = 0
    for _ in range(4):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        first = process.stdout.readline()
        assert first, process.stderr.read()
        assert int(first) > reported, "a complete checkpoint was lost"
        deadline = time.monotonic() + 10
        while not any("tmp" in name for name in names(directory)) and time.monotonic() < deadline:
            pass
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        reported = max(int(line) for line in [first, *process.stdout] if line.endswith("\n"))
        process.wait()
        process.stderr.close()
        left = names(directory)
        killed_during_save += any(
            not name.isdecimal() or not (directory / name / manifest.NAME).exists() for name in left
        )
        step, params, record = restore_params(directory)
        assert step >= reported
        assert record == {"step": step}
        assert (params["w"] == step).all()
    assert killed_during_save >= 2
