"""The store: files whole or not at all, checked, locked, resumable; a full disk is one clear line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from edgemin import artifact, toy
from edgemin.errors import UserError
from edgemin.store.artifacts import FORMAT, MANIFEST, MARK, Store
from edgemin.store.content import content_key
from edgemin.store.disk import disk_errors, write_atomically

KEY = "0123456789abcdef0123"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def filled(store: Store, key: str = KEY) -> Path:
    with store.commit(key) as folder:
        (folder / "model.safetensors").write_bytes(bytes(range(256)))
        (folder / "deeper").mkdir()
        (folder / "deeper" / "config.json").write_text("{}")
    return store.path(key)


def left(store: Store) -> list[str]:
    """The names in the store that are not its own."""
    own = {".work", ".locks", ".results", ".tokens", MARK}
    return sorted(path.name for path in store.root.iterdir() if path.name not in own)


# Commit


def test_a_commit_has_its_name_only_when_it_is_whole(store: Store) -> None:
    with store.commit(KEY) as folder:
        (folder / "a").write_text("1")
        assert not store.has(KEY) and not store.path(KEY).exists()
    assert store.has(KEY) and left(store) == [KEY]
    assert store.path(KEY).stat().st_mode & 0o777 == 0o755
    store.verify(KEY)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_inside_a_commit_leaves_nothing(store: Store, error: type[BaseException]) -> None:
    (store.work(KEY) / "last.ckpt").write_text("kept")
    with pytest.raises(error), store.commit(KEY) as folder:
        (folder / "a").write_text("1")
        raise error
    assert not store.has(KEY) and left(store) == []
    assert (store.work(KEY) / "last.ckpt").read_text() == "kept"


def test_a_commit_ends_the_work_on_its_key_alone(store: Store) -> None:
    (store.work(KEY) / "last.ckpt").write_text("x")
    (store.work("other") / "last.ckpt").write_text("y")
    filled(store)
    assert [path.name for path in (store.root / ".work").iterdir()] == ["other"]


def test_what_a_killed_commit_left_is_removed_by_the_next_of_its_key(store: Store) -> None:
    script = f"""
import os, signal, sys
from edgemin.store.artifacts import Store
with Store(sys.argv[1]).commit({KEY!r}) as folder:
    (folder / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    for _ in range(2):
        ended = subprocess.run([sys.executable, "-c", script, str(store.root)], check=False, timeout=120)
        assert ended.returncode == -signal.SIGKILL
    assert len(left(store)) == 1, "the second removed what the first left"
    (store.root / ".other-abc").mkdir()
    filled(store)
    assert left(store) == [".other-abc", KEY]
    listed = json.loads((store.path(KEY) / MANIFEST).read_text())["files"]
    assert sorted(listed) == ["deeper/config.json", "model.safetensors"]


def test_a_directory_without_a_manifest_is_not_stored_and_makes_way(store: Store) -> None:
    store.path(KEY).mkdir(parents=True)
    (store.path(KEY) / "half").write_text("x")
    assert not store.has(KEY)
    filled(store)
    store.verify(KEY)
    assert not (store.path(KEY) / "half").exists()


# The format


def test_the_first_thing_that_is_written_marks_the_store(tmp_path: Path) -> None:
    def fit(store: Store) -> None:
        (store.work(KEY) / "last.ckpt").write_text("x")

    def lock(store: Store) -> None:
        with store.lock(KEY):
            pass

    writes: list[Callable[[Store], object]] = [
        fit,
        lock,
        filled,
        lambda store: store.keep_result("evaluation", "k", {"a": 1}),
        lambda store: store.tokens.keep("a/b", lambda path: path.write_bytes(b"x")),
    ]
    for number, write in enumerate(writes):
        store = Store(tmp_path / str(number))
        write(store)
        first = min(store.root.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        assert first.name == MARK and first.read_text() == f"{FORMAT}\n"
        Store(store.root)


@pytest.mark.parametrize("name", [f"{KEY}/{MANIFEST}", ".results/static/k.json", ".tokens/k/a", f".work/{KEY}/x"])
def test_a_store_of_before_there_was_a_mark_is_told_apart_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("{}")
    seen = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as refused:
        Store(tmp_path)
    assert str(refused.value) == (
        f"paths.store: expected a new store or one of format '{FORMAT}', given one of an older version in {tmp_path}; "
        "name another directory, or delete that one, to compute its results again"
    )
    assert sorted(tmp_path.rglob("*")) == seen


@pytest.mark.parametrize("mark", ["1\n", "3\n", "", "\udcff"])
def test_a_store_of_another_format_is_told_apart_in_one_line(mark: str, tmp_path: Path) -> None:
    filled(Store(tmp_path))
    (tmp_path / MARK).write_bytes(mark.encode(errors="surrogateescape"))
    with pytest.raises(
        UserError, match=rf"^paths\.store: expected [^\n]*format '{FORMAT}', given one of format '[^\n]*$"
    ):
        Store(tmp_path)


def test_a_directory_with_other_things_in_it_is_a_new_store(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "today.txt").write_text("mine")
    store = Store(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    filled(store)
    Store(tmp_path).verify(KEY)


# Integrity


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: flip(folder / "model.safetensors"), "model.safetensors differs from its checksum"),
        (lambda folder: (folder / "deeper" / "config.json").write_text("{} "), "deeper/config.json differs"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "manifest.json cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text("{}"), "manifest.json cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text("[" * 100_000), "manifest.json cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": {}, "sha256": ""}'), "manifest.json differs from"),
        (lambda folder: (folder / MANIFEST).unlink(), "manifest.json cannot be read"),
    ],
)
def test_verify_names_what_is_damaged_and_what_to_do(store: Store, change: Callable[[Path], None], says: str) -> None:
    folder = filled(store)
    store.verify(KEY)
    change(folder)
    with pytest.raises(UserError, match=f"^artifact [^\n]*{says}[^\n]*; delete the directory to compute it again$"):
        store.verify(KEY)


def test_an_artifact_is_read_once_while_it_stays_as_it_is(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = filled(store), []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: (read.append(file.name), digest(file, name))[1])
    for path in folder.rglob("*.*"):
        os.utime(path, (0, 0))
    for _ in range(3):
        store.verify(KEY)
    assert len(read) == 2
    flip(folder / "model.safetensors")
    os.utime(folder / "model.safetensors", (0, 0))
    with pytest.raises(UserError, match=r"model\.safetensors differs from its checksum"):
        store.verify(KEY)


def test_a_key_is_the_hash_of_its_content_whatever_the_order() -> None:
    first = content_key({"a": 1, "b": [1, {"c": None}]})
    assert first == content_key({"b": [1, {"c": None}], "a": 1})
    assert len(first) == 20 and set(first) <= set("0123456789abcdef")
    assert first not in {content_key({"a": 1.5, "b": [1, {"c": None}]}), content_key({"a": 1})}


# Locks

HOLDER = """
import sys
from edgemin.store.artifacts import Store
store = Store(sys.argv[1])
with store.lock(sys.argv[2], lambda: print("waiting", flush=True)):
    print("held", flush=True)
    sys.stdin.readline()
"""
Start = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def start(store: Store) -> Iterator[Start]:
    processes: list[subprocess.Popen[str]] = []

    def start(key: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(store.root), key]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_key_is_held_by_one_process_and_other_keys_are_free(store: Store, start: Start) -> None:
    holder = start(KEY)
    assert says(holder) == "held"
    second = start(KEY)
    assert says(second) == "waiting"
    with store.lock("another", lambda: pytest.fail("another key is free")):
        pass
    holder.communicate("\n")
    assert says(second) == "held"


def test_kill_minus_nine_lets_go_of_the_key(store: Store, start: Start) -> None:
    holder = start(KEY)
    assert says(holder) == "held"
    waited, done = threading.Event(), threading.Event()

    def take() -> None:
        with store.lock(KEY, waited.set):
            done.set()

    thread = threading.Thread(target=take)
    thread.start()
    assert waited.wait(60) and not done.is_set()
    os.kill(holder.pid, signal.SIGKILL)
    assert done.wait(60)
    thread.join()


def test_a_lock_is_free_again_after_an_error(store: Store) -> None:
    with pytest.raises(KeyError), store.lock(KEY):
        raise KeyError
    with store.lock(KEY, lambda: pytest.fail("nobody holds it")):
        pass


# A disk that refuses


def test_a_full_disk_is_one_line_and_loses_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    (store.work(KEY) / "last.ckpt").write_text("kept")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"^paths\.store: the disk is full \([^\n]*run again to go on$"):
        filled(store)
    with pytest.raises(UserError, match="the disk is full"):
        store.keep_result("evaluation", "k", {"a": 1})
    monkeypatch.undo()
    assert left(store) == [] and not list((store.root / ".results").rglob("*.json"))
    assert not [path for path in (store.root / ".results").rglob("*") if path.is_file()]
    assert (store.work(KEY) / "last.ckpt").read_text() == "kept"
    filled(store)
    store.verify(KEY)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 KiB, less than a tiny model needs."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("this machine has no mount")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this machine lets no test mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_model_that_does_not_fit_on_the_disk_is_one_line(small_disk: Path) -> None:
    store = Store(small_disk)
    with pytest.raises(UserError, match="the disk is full"), store.commit(KEY) as folder:
        artifact.save(folder, tiny.model(), toy.tokenizer(), {})
    assert left(store) == []


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "no permission to write"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.ENOTDIR, "a file stands where a directory is needed"),
        (errno.EEXIST, "a file stands where a directory is needed"),
        (errno.EFBIG, "a file would be larger than the limit for files"),
        (errno.EISDIR, "a directory stands where a file is needed"),
    ],
)
def test_what_a_file_system_refuses_is_one_line_and_other_errors_pass(number: int, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^paths\.store: {says}[^\n]*$"), disk_errors(tmp_path):
        raise OSError(number, "refused")
    with pytest.raises(OSError, match="interrupted"), disk_errors(tmp_path):
        raise OSError(errno.EINTR, "interrupted")
    with pytest.raises(KeyError), disk_errors(tmp_path):
        raise KeyError


def test_a_full_disk_is_recognised_by_the_message_of_libraries_that_raise_errors_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^paths\.store: the disk is full [^\n]*$"), disk_errors(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError), disk_errors(tmp_path):
        raise SafetensorError("Error while serializing: InvalidTensorView")


def test_a_store_where_a_file_stands_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(UserError) as refused:
            Store(path)
        line = f"paths.store: expected a directory that can be made, given {path} (Not a directory)"
        assert str(refused.value) == line


# What stands in the place of something else


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_what_stands_in_a_keys_place_makes_way(store: Store, tmp_path: Path, kind: str) -> None:
    store.root.mkdir()
    target = tmp_path / "elsewhere"
    if kind == "file":
        store.path(KEY).write_text("a note")
    else:
        if kind == "link":
            target.mkdir()
            (target / "mine").write_text("stays")
        store.path(KEY).symlink_to(target)
    assert not store.has(KEY)
    store.check_writable({KEY: "student"})
    filled(store)
    store.verify(KEY)
    assert not store.path(KEY).is_symlink()
    assert kind != "link" or (target / "mine").read_text() == "stays"


@pytest.mark.parametrize("name", [".work", ".locks"])
def test_a_file_in_the_place_of_a_directory_is_refused_before_anything_is_computed(store: Store, name: str) -> None:
    store.root.mkdir()
    (store.root / name).write_text("")
    with pytest.raises(UserError, match=rf"^paths\.store: expected a store that can be written[^\n]*{name}[^\n]*$"):
        store.check_writable({KEY: "student"})


def test_a_directory_in_the_place_of_a_lock_or_a_result_is_one_line(store: Store) -> None:
    (store.root / ".locks" / KEY).mkdir(parents=True)
    with pytest.raises(UserError, match=r"^paths\.store: a directory stands where a file is needed"), store.lock(KEY):
        pass
    (store.root / ".results" / "evaluation" / "k.json").mkdir(parents=True)
    assert store.result("evaluation", "k") is None
    with pytest.raises(UserError, match=r"^paths\.store: a directory stands where a file is needed"):
        store.keep_result("evaluation", "k", {"a": 1})


# Permissions


def test_looking_makes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", tmp_path / "outputs")
    assert not store.has(KEY) and store.result("evaluation", "k") is None and store.tokens.find("a/b") is None
    store.check_writable({KEY: "student"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_all_files_have_the_permissions_that_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        store = Store(tmp_path / "store")
        with store.lock(KEY), store.commit(KEY) as folder:
            artifact.save(folder, tiny.model(), toy.tokenizer(), {})
        store.keep_result("static", "k", {"params": 1})
        store.tokens.keep("a/b.safetensors", lambda path: save_file({"a": torch.ones(2)}, path))
    finally:
        os.umask(before)
    for path in store.root.rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert path.stat().st_mode & 0o777 == wanted, path


def forbid(monkeypatch: pytest.MonkeyPatch, below: Path, number: int = errno.EROFS) -> None:
    """Nothing can be made below a directory, for root neither; nothing is to be found out by trying."""
    touch, mkdir, access = Path.touch, os.mkdir, os.access

    def refuse(path: Path) -> None:
        if path.is_relative_to(below):
            raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "touch", lambda path, **named: (refuse(path), touch(path, **named)))
    monkeypatch.setattr(os, "mkdir", lambda path, *mode: (refuse(Path(path)), mkdir(path, *mode)))
    monkeypatch.setattr(
        "edgemin.store.disk.is_allowed",
        lambda path, mode: not (mode & os.W_OK and Path(path).is_relative_to(below)) and access(path, mode),
    )


def test_what_is_new_goes_to_the_outputs_where_the_store_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store", tmp_path / "outputs")
    store.keep_result("evaluation", "old", {"a": 1})
    filled(store)
    seen = sorted(store.root.rglob("*"))
    forbid(monkeypatch, store.root)
    store.keep_result("evaluation", "new", {"a": 2})
    path = store.tokens.keep("key/encoded.safetensors", lambda path: path.write_bytes(b"x"))
    assert path == tmp_path / "outputs" / ".tokens" / "key" / "encoded.safetensors"
    assert store.tokens.find("key/encoded.safetensors") == path
    assert [store.result("evaluation", name) for name in ("old", "new")] == [{"a": 1}, {"a": 2}]
    assert sorted(store.root.rglob("*")) == seen
    store.check_writable({KEY: "student"})
    with pytest.raises(UserError) as refused:
        store.check_writable({KEY: "student", "0" * 20: "student/finetune", "1" * 20: "student/finetune/distill"})
    assert str(refused.value) == (
        "paths.store: expected a store that can be written, as 2 of 3 results are not in it (such as "
        f"student/finetune), given {store.root} (Permission denied)"
    )


def test_a_disk_that_is_full_is_no_reason_to_go_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store", tmp_path / "outputs")
    forbid(monkeypatch, store.root, errno.ENOSPC)
    with pytest.raises(UserError, match=r"^paths\.store: the disk is full"):
        store.keep_result("evaluation", "k", {"a": 2})


TOO_LARGE = """
import resource, sys
from edgemin.errors import UserError
from edgemin.store.artifacts import Store
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
store = Store(sys.argv[1])
for write in (
    lambda: store.keep_result("evaluation", "k", {"a": "x" * 2000}),
    lambda: store.tokens.keep("k", lambda path: save_file({"a": torch.ones(1000)}, path)),
    lambda: fill(store),
):
    try:
        write()
    except UserError as error:
        print(error)
"""


def test_a_file_beyond_the_users_limit_is_one_line(tmp_path: Path) -> None:
    head = "import torch\nfrom safetensors.torch import save_file\n"
    fill = f"""
def fill(store):
    with store.commit({KEY!r}) as folder:
        save_file({{"a": torch.ones(1000)}}, folder / "model.safetensors")
"""
    script = head + fill + TOO_LARGE
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and done.stderr == ""
    assert all(line.startswith("paths.store: a file would be larger than the limit for files") for line in lines)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [MARK]


# Results


def test_a_result_comes_back_as_it_was_kept(store: Store) -> None:
    content = {"metrics": {"accuracy": 0.1 + 0.2, "n": 872}, "none": None, "list": [1, 2]}
    assert store.result("evaluation", "k") is None
    store.keep_result("evaluation", "k", content)
    store.keep_result("static", "k", {"params": 1})
    assert store.result("evaluation", "k") == content
    assert store.result("static", "k") == {"params": 1}
    store.keep_result("evaluation", "k", {"new": 1})
    assert Store(store.root).result("evaluation", "k") == {"new": 1}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"{}", b'{"a": 2}'])
def test_a_damaged_result_counts_as_absent_and_is_made_again(store: Store, content: bytes) -> None:
    store.keep_result("evaluation", "k", {"a": 1})
    (store.root / ".results" / "evaluation" / "k.json").write_bytes(content)
    assert store.result("evaluation", "k") is None
    store.keep_result("evaluation", "k", {"a": 1})
    assert store.result("evaluation", "k") == {"a": 1}


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\n", b"0" * 64])
def test_a_file_without_its_checksum_counts_as_absent(store: Store, content: bytes | None) -> None:
    path = store.tokens.keep("a/encoded.safetensors", lambda path: path.write_bytes(b"tokens"))
    checksum = path.with_name(f"{path.name}.sha256")
    if content is None:
        checksum.unlink()
    else:
        checksum.write_bytes(content)
    assert store.tokens.find("a/encoded.safetensors") is None
    assert store.tokens.keep("a/encoded.safetensors", lambda path: path.write_bytes(b"tokens")) == path
    assert store.tokens.find("a/encoded.safetensors") == path


def test_an_atomic_write_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    write_atomically(path, b"old")
    assert path.stat().st_mode & 0o777 == 0o644

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["run.json"]
