"""Checkpoints: the same bits under any layout and mesh, nothing lost by a kill or a full disk, and damaged or foreign
files refused by name."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests import checkpoint_runs
from tests.checkpoint_runs import CONFIG, state, sums, wanted
from toruslab.models.programs import checkpoint_folder
from toruslab.models.programs.checkpoints import Checkpoints, restore_params
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.torus.mesh import attach

PLACES = (("ws1d", (8, 1, 1)), ("wgxyz", (1, 2, 4)), ("ws2d", (1, 1, 1)), ("auto", (4, 2, 1)), ("ws2d", (2, 2, 2)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with steps 3 and 5, written under ws2d on 2x2x2. Tests copy it before they damage it."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    checkpoints = Checkpoints(folder, CONFIG)
    for step in (3, 5):
        checkpoints.save(step, state(CONFIG, "ws2d", (2, 2, 2), step), {"losses": [5.5, 1 / 3], "layout": "ws2d"})
    checkpoints.close()
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.mark.parametrize(("name", "shape"), PLACES)
def test_read_under_any_layout_and_mesh(saved, name, shape):
    checkpoints, places = Checkpoints(saved, CONFIG), wanted(CONFIG, name, shape)
    for step in (3, 5):
        found = checkpoints.restore(places, step)
        assert sums(found) == sums(state(CONFIG, "ws2d", (2, 2, 2), step))
        assert jax.tree.all(jax.tree.map(lambda a, w: a.sharding == w.sharding and a.dtype == w.dtype, found, places))
    assert checkpoints.latest() == 5 and checkpoints.facts() == {"losses": [5.5, 1 / 3], "layout": "ws2d"}


@pytest.mark.parametrize(("name", "shape"), PLACES[:4])
def test_written_under_any_layout_and_mesh(tmp_path, name, shape):
    checkpoints = Checkpoints(tmp_path, CONFIG)
    checkpoints.save(0, state(CONFIG, name, shape, 4), {})
    assert sums(checkpoints.restore(wanted(CONFIG, "ws2d", (2, 2, 2)))) == sums(state(CONFIG, "ws2d", (2, 2, 2), 4))
    assert checkpoint_folder.read(tmp_path).config == CONFIG


def test_every_bit_of_every_dtype(tmp_path):
    """Random bits, NaNs with payloads, both zeros, subnormal numbers; and scalars."""
    bits = np.random.default_rng(0).integers(0, 2**32, (16, 24), np.uint32)
    bits[0, :4] = [0x80000000, 1, 0x7FC00123, 0xFF800001]
    made = {
        "f32": bits.view(np.float32),
        "bf16": bits.view(np.uint16).view(jnp.bfloat16),
        "i32": bits.view(np.int32),
        "i8": bits.view(np.int8),
        "flags": bits % 2 == 0,
        "scalar": np.float32(1 / 3),
    }
    mesh = attach((2, 2, 2), chip="cpu")
    places = {k: NamedSharding(mesh, P(("y", "z"), "x") if a.ndim else P()) for k, a in made.items()}
    checkpoints = Checkpoints(tmp_path, CONFIG)
    checkpoints.save(0, jax.device_put(made, places), {})
    back = {k: NamedSharding(attach((8, 1, 1), chip="cpu"), P(None, "x") if a.ndim else P()) for k, a in made.items()}
    found = checkpoints.restore(
        jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), made, back)
    )
    for name, array in made.items():
        assert found[name].dtype == array.dtype and np.asarray(found[name]).tobytes() == array.tobytes(), name


def test_what_is_donated_after_save_is_saved_as_it_was(tmp_path):
    config = checkpoint_runs.LARGE
    checkpoints, now = Checkpoints(tmp_path, config, keep=9), state(config, "ws2d", (2, 2, 2), 1)
    step = jax.jit(lambda s: jax.tree.map(lambda a: a + a, s), donate_argnums=0)
    jax.block_until_ready(step(state(config, "ws2d", (2, 2, 2), 1)))
    for number in range(4):
        exact = sums(now)
        checkpoints.save(number, now, {"sums": exact})
        before, now = now, step(now)
        assert any(a.is_deleted() for a in jax.tree.leaves(before))  # what is still being written is not reused
        now = jax.block_until_ready(step(step(now)))
    for number in range(4):
        found = checkpoints.restore(wanted(config, "wgxyz", (1, 1, 1)), number)
        assert sums(found) == checkpoints.facts(number)["sums"]


def test_parameters_alone_and_cast(copied):
    """Nothing else is read, so damage to the rest does not matter."""
    shutil.rmtree(copied / "5" / "rest")
    exact = state(CONFIG, "ws2d", (2, 2, 2), 5)["params"]
    for dtype in (jnp.bfloat16, jnp.float32):
        made, mesh = layout("wgx", "batch", (4, 2, 1), 16), attach((4, 2, 1), chip="cpu")
        found = restore_params(copied, CONFIG, made, mesh, dtype)
        assert sums(found) == sums(jax.tree.map(lambda a, dtype=dtype: a.astype(dtype), exact))
    with pytest.raises(ValueError, match=r"is damaged: rest/.* is missing"):
        Checkpoints(copied, CONFIG).restore(wanted(CONFIG, "ws2d", (1, 1, 1)))


def test_the_newest_are_kept_and_an_old_one_until_a_newer_is_whole(tmp_path, monkeypatch):
    checkpoints, now = Checkpoints(tmp_path, CONFIG, keep=2), state(CONFIG, "ws2d", (2, 2, 2), 0)
    seen, write = [], checkpoint_folder.write

    def watched(directory, **record):
        seen.append(checkpoint_folder.steps(tmp_path))
        write(directory, **record)

    monkeypatch.setattr(checkpoint_folder, "write", watched)
    for step in (1, 2, 4, 8):
        checkpoints.save(step, now, {})
    checkpoints.wait()
    assert seen == [[], [1], [1, 2], [2, 4]]
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["4", "8"]
    with pytest.raises(ValueError, match=r"step=8 must be above 8, the latest in"):
        checkpoints.save(8, now, {})


def test_a_byte_flipped_a_file_cut_or_removed(copied, tmp_path):
    """Damage to any file of a checkpoint is refused by its name, or changes nothing that is read."""
    checkpoints, places = Checkpoints(copied, CONFIG), wanted(CONFIG, "ws2d", (1, 1, 1))
    exact = sums(state(CONFIG, "ws2d", (2, 2, 2), 5))
    files = sorted(p for p in (copied / "5").rglob("*") if p.is_file())
    harmless = {"_CHECKPOINT_METADATA", "commit_success.txt"}
    assert len(files) > 15 and harmless < {str(p.relative_to(copied / "5")) for p in files}
    for path in files:
        whole, name = path.read_bytes(), str(path.relative_to(copied / "5"))
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 16]) + whole[middle + 1 :]
        for damaged in (flipped, whole[:middle], None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            if name in harmless:
                assert sums(checkpoints.restore(places)) == exact
            else:
                with pytest.raises(ValueError, match=r"damage") as refused:
                    checkpoints.restore(places)
                assert name in str(refused.value) and "\n" not in str(refused.value)
            path.write_bytes(whole)
    assert sums(checkpoints.restore(places)) == exact


def test_foreign_folders(saved, copied, tmp_path):
    def refused(folder, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            checkpoint_folder.read(folder)

    refused(tmp_path / "none", r"checkpoint='.*none' is not there: it must be a folder that training wrote")
    hugging = tmp_path / "hf"
    hugging.mkdir()
    (hugging / "model.safetensors").write_bytes(b"1234")
    refused(hugging, r"checkpoint='.*hf' has no checkpoint in it: it must be a folder that training wrote")
    refused(hugging / "model.safetensors", r"is a file, not a folder of checkpoints")
    (hugging / "7").mkdir()
    refused(hugging, r"checkpoint='.*hf/7' has no toruslab.json: it is not one of ours, or damaged")
    with pytest.raises(ValueError, match=r"has no toruslab.json"):
        Checkpoints(hugging, CONFIG)

    record = copied / "5" / "toruslab.json"
    written = json.loads(record.read_text())
    for changed, words in (
        ([], "is damaged: it must be a JSON object"),
        (written | {"format": 2}, r"toruslab.json' has format=2, but must have 1 to be read here"),
        (written | {"crc32": 1}, r"is damaged: its sum is not that of what it says"),
    ):
        record.write_text(json.dumps(changed))
        refused(copied, words)

    other = dataclasses.replace(CONFIG, d_model=48, n_layers=2, name="other")
    with pytest.raises(ValueError, match=r"is of another model, serial-16: n_layers=3 there, 2 wanted; d_m"):
        Checkpoints(saved, other)
    mesh = attach((1, 1, 1), chip="cpu")
    with pytest.raises(ValueError, match=r"is of another model, serial-16: n_layers=3 there, 2 wanted"):
        restore_params(saved, other, layout("ws2d", "heads", (1, 1, 1), 16), mesh)
    with pytest.raises(ValueError, match=r"step=4 is not in checkpoint='.*'; there are 3, 5"):
        checkpoint_folder.read(saved, 4)


def test_a_state_that_does_not_fit(saved, tmp_path):
    checkpoints, places = Checkpoints(saved, CONFIG), wanted(CONFIG, "ws2d", (1, 1, 1))
    one = NamedSharding(attach((1, 1, 1), chip="cpu"), P())

    def leaf(shape, dtype=jnp.float32, sharding: NamedSharding | None = one):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    fewer = {k: v for k, v in places.items() if k != "master"}
    counters = places["counters"]
    for changed, words in (
        (fewer, r"has an array master\.attention\.norm, which is not wanted here"),
        (places | {"ema": leaf(())}, r"has no array ema, which is wanted here"),
        (
            places | {"counters": counters | {"step": leaf((2,), jnp.int32)}},
            r"step is \[\] there, \[2\] wanted",
        ),
        (places | {"counters": counters | {"step": leaf(())}}, r"step is int32 there, float32 wanted"),
        (places | {"counters": counters | {"step": leaf((), jnp.int32, None)}}, "without a NamedSharding"),
    ):
        with pytest.raises(ValueError, match=words):
            checkpoints.restore(changed)
    empty = Checkpoints(tmp_path, CONFIG)
    with pytest.raises(ValueError, match=r"lr is a float, but must be a JAX array"):
        empty.save(1, {"lr": 0.1}, {})
    with pytest.raises(ValueError, match=r"facts must be what JSON can hold"):
        empty.save(1, {"lr": jnp.float32(0.1)}, {"seen": {1, 2}})
    with pytest.raises(ValueError, match=r"state has two arrays named 'a\.b'"):
        empty.save(1, {"a": {"b": jnp.float32(0)}, "a.b": jnp.float32(0)}, {})
    with pytest.raises(ValueError, match=r"keep=0 must be at least 1"):
        Checkpoints(tmp_path, CONFIG, keep=0)
    assert empty.latest() is None and not list(tmp_path.iterdir())


def _environment() -> dict[str, str]:
    """Without the settings of pytest's own process. Its cache of programs is one of them: a process that is killed may
    leave half a program there, and the next one would warn of it."""
    own = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR")
    return {k: v for k, v in os.environ.items() if k not in own}


def _command(what: str, *args) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "tests.checkpoint_runs", what, *map(str, args)]


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save(tmp_path):
    """SIGKILL at a random moment of a save, again and again: each run finds the last checkpoint exact and goes on."""
    folder, moments, left = tmp_path / "run", random.Random(0), 0
    expected = "from None"
    for _ in range(4):
        run = subprocess.Popen(_command("kill", folder), stdout=subprocess.PIPE, env=_environment(), text=True)
        assert run.stdout is not None
        try:
            assert run.stdout.readline().strip() == expected
            began = max(checkpoint_folder.steps(folder), default=-1)
            until = time.monotonic() + 60
            while max(checkpoint_folder.steps(folder), default=-1) < began + 2 or not _unfinished(folder):
                assert run.poll() is None and time.monotonic() < until
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.15))
        finally:
            run.kill()
            run.wait()
            run.stdout.close()
        left += len(_unfinished(folder))
        last = Checkpoints(folder, checkpoint_runs.LARGE).latest()
        found = Checkpoints(folder, checkpoint_runs.LARGE).restore(wanted(checkpoint_runs.LARGE, "wgxyz", (1, 2, 4)))
        assert sums(found) == checkpoint_folder.read(folder).facts["sums"] and int(found["counters"]["step"]) == last
        expected = f"from {last}"
    assert left >= 2, "no kill hit a save that was not finished"


def _unfinished(folder: Path) -> list[str]:
    try:
        return [p.name for p in folder.iterdir() if not p.name.isdigit()]
    except FileNotFoundError:
        return []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["disk", "limit", "before"])
def test_a_full_disk_in_the_middle_of_a_save(tmp_path, how):
    """A limit on the size of files; and a small disk that fills up, if one can be mounted."""
    command = _command("fill", tmp_path / "disk" / "run", how)
    (tmp_path / "disk").mkdir()
    if how != "limit":
        mount = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
        mount.append(f'mount -t tmpfs -o size=40m tmpfs "{tmp_path}/disk" && exec "$@"')
        if shutil.which("unshare") is None or subprocess.run([*mount, "sh", "true"], capture_output=True).returncode:
            pytest.skip("no small disk can be mounted here: it needs user namespaces")
        command = [*mount, "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert how != "before" or not done.stderr, done.stderr[-3000:]
    found = json.loads(done.stdout)
    (warning,) = found["warnings"]
    assert "run/1' could not be written, the latest is that of step 0: " in warning and "\n" not in warning
    said = {"limit": "File too large", "disk": "No space left", "before": "MB, but the disk has only 2.1 MB free"}
    assert said[how] in warning
    assert found["steps"] == ["0", "2"]


@pytest.mark.slow
def test_two_processes_to_one_and_back(tmp_path):
    """Written by two processes and read by one, and vice versa. Damage that one of two sees is refused by both."""
    for writers, readers in ((2, 1), (1, 2), (2, 2)):
        folder = tmp_path / f"{writers}-{readers}"
        assert not _run(writers, "write", folder, "ws2d").returncode
        done = _run(readers, "check", folder, "wgxyz")
        assert not done.returncode and done.stderr.count("same") == readers, done.stderr[-3000:]
    files = sorted(p for p in (folder / "8" / "params").rglob("*") if p.is_file())
    files[0].write_bytes(b"cut")  # one process's share
    done = _run(2, "refuse", folder, "ws2d")
    assert done.stderr.count("refused: ") == done.stderr.count(files[0].name) == 2, done.stderr[-3000:]


def _run(n: int, what: str, *args) -> subprocess.CompletedProcess:
    """A run in `n` processes."""
    command = _command(what, *args)
    if n > 1:
        start = f"processes.start_locally('tests.checkpoint_runs', {command[5:]!r}, {n})"
        command = [
            sys.executable,
            "-c",
            f"import sys; from toruslab.benchmarks.runs import processes; sys.exit({start})",
        ]
    return subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=300)
