"""Writers that meet, writers that are killed, and disks that are full."""

import contextlib
import errno
import multiprocessing
import os
import shutil
import signal
import stat
import threading

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import QuantError, Rule, recipes
from jaxquant.io import atomic
from jaxquant.io.atomic import claimed, is_temporary, replacing
from jaxquant.io.safetensors import TensorSpec, write_safetensors
from jaxquant.report.compare import Comparison, Input, Layer

resource = pytest.importorskip("resource", reason="limits of POSIX")

pytestmark = [pytest.mark.skipif(atomic.fcntl is None, reason="locks of POSIX"), pytest.mark.every]
SPAWN = multiprocessing.get_context("spawn")  # a fork of a process with JAX's threads may hang


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def write_and_wait(path, begun, go):
    """Another process: writes half, and then waits for what comes."""
    with replacing(path) as file:
        file.write(b"half")
        file.flush()
        begun.set()
        go.wait(60)


@pytest.fixture
def other(tmp_path):
    """A process that writes "target"; it is killed if the test does not let it go on."""
    begun, go = SPAWN.Event(), SPAWN.Event()
    process = SPAWN.Process(target=write_and_wait, args=(tmp_path / "target", begun, go))
    process.start()
    assert begun.wait(60)
    yield process, go
    process.kill()
    process.join()


def test_the_second_writer_of_a_file_is_told_and_the_first_one_finishes(other, tmp_path):
    process, go = other
    with (
        pytest.raises(QuantError, match=r"at .*target: another process or thread is writing this"),
        replacing(tmp_path / "target"),
    ):
        pytest.fail("this must not run")
    with replacing(tmp_path / "neighbour") as file:  # looks for what is abandoned, and finds a living writer
        file.write(b"whole")
    go.set()
    process.join(60)
    assert process.exitcode == 0
    assert (tmp_path / "target").read_bytes() == b"half"
    assert names(tmp_path) == ["neighbour", "target"]


@pytest.mark.parametrize("again", ["target", "another"])
def test_what_a_killed_writer_left_is_removed_by_the_next(again, other, tmp_path):
    process, _ = other
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert [is_temporary(name) for name in names(tmp_path)] == [True]
    jq.io.save(tmp_path / again, {"w": jnp.ones(3)})
    assert names(tmp_path) == [again]


def test_two_threads_are_two_writers(tmp_path):
    failed = []

    def write():
        try:
            jq.io.save(tmp_path / "target", {"w": jnp.ones(3)})
        except QuantError as error:
            failed.append(str(error))

    with replacing(tmp_path / "target") as file:
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        file.write(b"mine")
    assert (tmp_path / "target").read_bytes() == b"mine"
    assert len(failed) == 1
    assert "another process or thread" in failed[0]
    write()
    assert len(failed) == 1


def test_one_writer_of_many_comes_through_whole(tmp_path):
    """Threads that all write one file: each is told that it is busy, or writes all of it."""
    start, done = threading.Barrier(8), []

    def write(i):
        start.wait()
        for _ in range(20):
            try:
                with replacing(tmp_path / "target") as file:
                    for _ in range(4):
                        file.write(bytes([i]) * 1000)
                        file.flush()
            except QuantError:
                continue
            done.append(i)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done
    content = (tmp_path / "target").read_bytes()
    assert len(content) == 4000
    assert len(set(content)) == 1
    assert names(tmp_path) == ["target"]


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / ".hidden.tmp").write_text("not ours")
    (tmp_path / "notes.jaxquant.tmp").write_text("not hidden")
    jq.io.save(tmp_path / "target", {"w": jnp.ones(3)})
    assert names(tmp_path) == [".hidden.tmp", "notes.jaxquant.tmp", "target"]


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    with replacing(tmp_path / "target") as file:
        file.write(b"1")
        (temporary,) = (name for name in names(tmp_path) if is_temporary(name))
    (tmp_path / temporary).symlink_to(precious)
    with pytest.raises(QuantError, match="writing this"), replacing(tmp_path / "target"):
        pytest.fail("this must not run")
    assert precious.read_text() == "precious"


def test_without_locks_files_are_written_all_the_same(tmp_path, monkeypatch):
    """As on Windows, and on file systems that have none; nothing that may be a living writer's is removed."""
    with replacing(tmp_path / "other") as file:
        file.write(b"1")
        (temporary,) = (name for name in names(tmp_path) if is_temporary(name))
    (tmp_path / temporary).write_text("of a living writer, for all we know")
    monkeypatch.setattr(atomic, "fcntl", None)
    jq.io.save(tmp_path / "target", {"w": jnp.ones(3)})
    assert names(tmp_path) == [temporary, "other", "target"]
    jq.io.save(tmp_path / "other", {"w": jnp.ones(3)})  # in the end somebody must be able to write this
    assert names(tmp_path) == ["other", "target"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs two users")
def test_other_users_may_read_what_is_written(tmp_path):
    jq.io.save(tmp_path / "target", {"w": jnp.ones(3)})
    assert stat.S_IMODE((tmp_path / "target").stat().st_mode) & 0o044 == 0o044


# -- directories -------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.mkdir()
    w = np.linspace(-1, 1, 32 * 64, dtype=np.float32).reshape(32, 64)
    tensors = {f"l.{i}.proj.weight": w * 2**i for i in range(3)}
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in tensors.items()}
    write_safetensors(path / "model.safetensors", specs, tensors.__getitem__, {})
    (path / "config.json").write_text("{}")
    return path


RULES = [Rule("proj", recipes.w8a16())]


def test_the_second_writer_of_a_directory_is_told_before_it_writes(source, tmp_path):
    out, told = tmp_path / "out", []

    def progress(done, total, name):
        if not told and done:
            with pytest.raises(QuantError, match=r"at .*out: another process or thread is writing this") as error:
                jq.io.quantize_hf(source, out, RULES, shard_bytes=1000)
            told.append(error)

    jq.io.quantize_hf(source, out, RULES, shard_bytes=1000, progress=progress)
    assert told
    params, _ = jq.io.load_hf(out)
    np.testing.assert_array_equal(params["l.2.proj.weight"].dequantize(), 4 * params["l.0.proj.weight"].dequantize())
    assert names(tmp_path) == ["out", "source"]
    with pytest.raises(QuantError, match="the destination exists"):
        jq.io.quantize_hf(source, out, RULES, shard_bytes=1000)


def test_a_claim_ends_with_its_block(tmp_path):
    for _ in range(2):
        with claimed(os.fspath(tmp_path / "d"), function="f", target="t"):
            assert (tmp_path / "d").is_dir()
    with pytest.raises(KeyError), claimed(os.fspath(tmp_path / "empty"), function="f", target="t"):
        raise KeyError
    assert names(tmp_path) == ["d"]
    (tmp_path / "file").touch()
    with (
        pytest.raises(QuantError, match="a file is in the way"),
        claimed(os.fspath(tmp_path / "file"), function="f", target="t"),
    ):
        pytest.fail("this must not run")


# -- disks -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def limited(nbytes):
    """No file may be larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


ARRAYS = {"w": np.zeros((1 << 8, 64), np.float32)}
METADATA = {"general.architecture": "x"}


def quantized():
    return jq.quantize(ARRAYS["w"], jq.QuantSpec("int8"), reduce_axes=(-1,))


WRITE = {
    "save": lambda source, out: jq.io.save(out, ARRAYS),
    "save_gguf": lambda source, out: jq.io.save_gguf(out, ARRAYS, metadata=METADATA),
    "save_hf": lambda source, out: jq.io.save_hf(out, {"m.weight": quantized()}),
    "quantize_hf": lambda source, out: jq.io.quantize_hf(source, out, RULES, shard_bytes=1000),
}


@pytest.mark.parametrize("write", WRITE)
def test_a_full_disk_is_known_before_anything_is_written(write, source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 1 << 40, 1000))
    with pytest.raises(QuantError, match=r"at .*out: the disk is too full; got needed=\d+, free=1000"):
        WRITE[write](source, tmp_path / "out")
    assert names(tmp_path) == ["source"]


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("write", ["save", "save_gguf", "page"])
def test_a_disk_that_fills_up_leaves_the_old_file(write, exists, tmp_path):
    """The limit of a process on the size of files stands for the disk."""
    layer = Layer("w", "dot", "int8", (2,), 16, 8, 40.0, 1.0, None, None)
    page = Comparison((layer,), (Input(0, "", 0.0, 1.0, 0.0),), 16, 8, 40.0)
    call = {**WRITE, "page": lambda source, out: page.save(out)}[write]
    out = tmp_path / "out"
    if exists:
        out.write_text("old")
    with limited(1000), pytest.raises(QuantError, match=r"at .*out: the disk is full; got error='File too large'"):
        call(None, out)
    assert names(tmp_path) == ["out"] * exists
    assert not exists or out.read_text() == "old"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_directory_is_continued_when_there_is_room_again(error, source, tmp_path, monkeypatch):
    """It is not there before it is complete."""
    WRITE["quantize_hf"](source, tmp_path / "whole")
    out, synchronize, room = tmp_path / "out", os.fsync, iter(range(3))  # for the plan and two files

    def full(descriptor):
        if next(room, None) is None:
            raise OSError(error, os.strerror(error))
        synchronize(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QuantError, match="the disk is full"):
        WRITE["quantize_hf"](source, out)
    monkeypatch.undo()
    assert names(tmp_path) == ["out.partial", "source", "whole"]
    assert not any(is_temporary(name) for name in names(tmp_path / "out.partial"))
    WRITE["quantize_hf"](source, out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }


# -- links -------------------------------------------------------------------------------------------------------------


def test_links_are_followed_to_files_only_and_it_is_said_where(source, tmp_path):
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / "abc"
    blob.write_text('{"a": 1}')
    (source / "tokenizer.json").symlink_to(blob)
    (source / "model.safetensors").rename(tmp_path / "blobs" / "weights")
    (source / "model.safetensors").symlink_to("../blobs/weights")
    (source / "elsewhere").symlink_to(tmp_path / "blobs")
    (source / "broken.json").symlink_to("nowhere")
    os.mkfifo(source / "pipe.json")
    (source / "1_Pooling").mkdir()
    plan = jq.io.quantize_hf(source, tmp_path / "out", RULES)
    assert plan.links == {"model.safetensors": str(tmp_path / "blobs" / "weights"), "tokenizer.json": str(blob)}
    assert plan.left_out == ("1_Pooling", "broken.json", "elsewhere", "pipe.json")
    copied = tmp_path / "out" / "tokenizer.json"
    assert copied.read_text() == '{"a": 1}'
    assert not copied.is_symlink()
