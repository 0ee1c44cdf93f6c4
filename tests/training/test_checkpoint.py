import ctypes
import errno
import os
import resource
import stat
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import in_child, tiny_gpt2
from crashes import FILE_SYSTEMS, crash_in_save, file_system

from cli.errors import SaveError
from distributed.world import World
from train import make_optimizer, train_step
from training import atomic, checkpoint
from training.atomic import remove_partial_writes, write_directory
from training.checkpoint import NoCheckpointError, load, load_tensors, prune, verify
from training.run import Run, Saved, remove_run
from training.state import describe, moments, trained_weights

TENSORS = {
    "weights": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1)},
    "optimizer": {"a:step": torch.ones(())},
    "nothing": {},
}
SHARD = "shard-00001-model-00001-of-00001.safetensors"
WEIGHTS, OPTIMIZER = f"weights/{SHARD}", f"optimizer/{SHARD}"


def save(path, tensors, state):
    checkpoint.save(path, tensors, state, World())


def newest(directory):
    return checkpoint.newest(directory, World())


def test_what_was_saved_is_loaded(tmp_path):
    save(tmp_path / "step-000010", TENSORS, {"step": 10, "loss": 0.1 + 0.2})
    assert load(tmp_path / "step-000010") == {"step": 10, "loss": 0.1 + 0.2}
    for group, content in TENSORS.items():
        loaded = {name: torch.zeros_like(tensor) for name, tensor in content.items()}
        load_tensors(tmp_path / "step-000010" / group, loaded, World())
        assert all(torch.equal(loaded[name], tensor) for name, tensor in content.items())
    assert verify(tmp_path / "step-000010") is None
    assert os.listdir(tmp_path) == ["step-000010"]


@pytest.mark.parametrize("make", [partial(make_optimizer, weight_decay=0.1), partial(torch.optim.SGD, lr=1e-2)])
def test_weights_and_optimizers_without_moments_are_resumed_to_the_bit(tmp_path, make):
    """A trained weight without a gradient has no moments. SGD has none at all."""
    batch = {name: torch.arange(64).view(4, 16) for name in ("input_ids", "labels")}

    def make_run():
        model = tiny_gpt2(64)
        model.transformer.idle = torch.nn.Linear(2, 2)
        optimizer = make([*model.parameters()] if make.func is torch.optim.SGD else model)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        return model, optimizer, scaler, partial(train_step, model, optimizer, scaler, [batch], 1e-2)

    model, optimizer, _, step = make_run()
    for _ in range(2):
        step()
    tensors = {"weights": trained_weights(model), "optimizer": moments(model, optimizer)}
    assert not any("idle" in name for name in tensors["optimizer"])
    save(tmp_path / "step-000002", tensors, {})
    resumed = make_run()
    with torch.no_grad():
        resumed[0].transformer.idle.weight.zero_()
    content = {"moments": describe(tensors["optimizer"]), "shards": [], "scaler": {}}
    data = SimpleNamespace(restore=lambda *_: None)
    Run.restore(SimpleNamespace(world=World()), Saved(tmp_path / "step-000002", content=content), *resumed[:3], data)
    assert step().loss == resumed[3]().loss
    ours, theirs = ({**trained_weights(m), **moments(m, o)} for m, o in ((model, optimizer), resumed[:2]))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def test_file_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        save(tmp_path / "step-000001", TENSORS, {})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "step-000001").rglob("*") if path.is_file()} == {
        0o640
    }


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "zero", "delete"])
def test_damage_is_noticed_and_the_checkpoint_before_it_taken(name, damage, tmp_path, capsys):
    for step in (1, 2):
        save(tmp_path / f"step-{step:06}", TENSORS, {"step": step})
    path = tmp_path / "step-000002" / name
    content = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        if damage == "flip":
            content[-3] ^= 1
        path.write_bytes({"truncate": content[:-1], "flip": content, "zero": bytes(len(content))}[damage])
    assert newest(tmp_path) == tmp_path / "step-000001"
    assert "step-000002" in capsys.readouterr().err
    (tmp_path / "step-000001" / "state.json").unlink()
    with pytest.raises(NoCheckpointError) as error:
        newest(tmp_path)
    assert error.value.exit_code == 3


def test_no_checkpoint_at_all(tmp_path):
    assert newest(tmp_path) is None and newest(tmp_path / "nowhere") is None


def test_prune_keeps_the_newest(tmp_path):
    (tmp_path / "step-000007.bak").mkdir()  # a user's own copy is no checkpoint
    for step in (5, 999_999, 1_000_000):  # order is by number, not by name
        save(tmp_path / f"step-{step:06}", {}, {})
    prune(tmp_path, 2, tmp_path / "step-1000000")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000007.bak", "step-1000000", "step-999999"]


def test_prune_never_takes_the_last_one_that_verifies(tmp_path):
    """Steps 6 and 8 were damaged, so the run resumed from 4 and saved at 5. The damaged ones must not displace 5."""
    for step in (4, 6, 8, 5):
        save(tmp_path / f"step-{step:06}", TENSORS, {})
    for step in (6, 8):
        (tmp_path / f"step-{step:06}" / "state.json").unlink()
    prune(tmp_path, 1, tmp_path / "step-000005")
    assert os.listdir(tmp_path) == ["step-000005"] and newest(tmp_path) == tmp_path / "step-000005"


def write(content):
    return lambda directory: (directory / "a").write_text(content)


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    write_directory(target, write("old"), 3)

    def fail(directory):
        write("half")(directory)
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        write_directory(target, fail, 4)
    assert (target / "a").read_text() == "old"
    write_directory(target, write("new"), 3)
    assert (target / "a").read_text() == "new" and os.listdir(tmp_path) == ["model"]


def test_two_writers_in_one_directory_leave_each_other_alone(tmp_path):
    def write(directory):
        (directory / "a").write_text("1")
        write_directory(tmp_path / "other", lambda other: (other / "b").write_text("2"), 1)
        (directory / "c").write_text("3")

    write_directory(tmp_path / "one", write, 1)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "one/a",
        "one/c",
        "other/b",
    ]


def test_everything_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    """A power cut may leave nothing but a renamed directory. So its content is synced first, then its parent."""
    order, fsync, rename = [], os.fsync, Path.rename

    def synced(descriptor):
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(self, target):
        order.append(f"rename to {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    save(tmp_path / "step-000001", TENSORS, {})
    assert {SHARD, "weights", "optimizer", "state.json", "manifest.json"} <= set(order[:-3])
    assert order.index("weights") > order.index(SHARD) and order.index("manifest.json") > order.index(SHARD)
    assert order[-3:] == [".step-000001.being-written", "rename to step-000001", tmp_path.name]


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k == "overlayfs")) for k in FILE_SYSTEMS])
def test_a_crash_at_any_line_of_a_save_loses_nothing(tmp_path, kind):
    """A child process saves over an older checkpoint and a newer model. It dies at its first, second, ... line."""
    outcomes, line = [], 0
    while "ended" not in outcomes:
        with file_system(kind):
            outcomes.append(crash_in_save(tmp_path / str(line), line))
        line += 17  # `make torture` takes each line
    assert len(outcomes) > 15 and {"old", "new"} <= set(outcomes)


def test_a_run_in_a_lower_layer_of_overlayfs_is_saved_pruned_and_deleted(tmp_path):
    run = tmp_path / "lower/run"
    for name in ("lower", "layers"):
        (tmp_path / name).mkdir()
    for step in (1, 2):
        save(run / f"checkpoints/step-{step:06}", TENSORS, {"step": step})
    write_directory(run / "model", write("old"), 3)
    user, group = os.getuid(), os.getgid()

    def mount(kind, target, options=""):
        libc = ctypes.CDLL(None, use_errno=True)
        return libc.mount(*(os.fsencode(word) for word in (kind, target, kind)), 0, os.fsencode(options)) == 0

    def work():
        if ctypes.CDLL(None).unshare(0x10000000 | 0x00020000):  # a user namespace, and a mount namespace
            return 77
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(text)
        layers = tmp_path / "layers"
        if not mount("tmpfs", layers):
            return 77
        for name in ("upper", "work", "merged"):
            (layers / name).mkdir()
        lower = f"lowerdir={tmp_path}/lower,upperdir={layers}/upper,workdir={layers}/work,userxattr"
        if not mount("overlay", layers / "merged", lower):
            return 77
        run = layers / "merged/run"
        with pytest.raises(OSError, match="cross-device"):
            (run / "model").rename(run / "other")
        save(run / "checkpoints/step-000002", TENSORS, {"step": 20})  # replaces a checkpoint of the lower layer
        save(run / "checkpoints/step-000003", TENSORS, {"step": 3})
        prune(run / "checkpoints", 2, run / "checkpoints/step-000003")
        assert sorted(os.listdir(run / "checkpoints")) == ["step-000002", "step-000003"]
        assert load(run / "checkpoints/step-000002") == {"step": 20}
        write_directory(run / "model", write("new"), 3)
        assert (run / "model/a").read_text() == "new" and sorted(os.listdir(run)) == ["checkpoints", "model"]
        remove_run(run)
        assert os.listdir(run) == []

    if (code := in_child(work)) == 77:
        pytest.skip("no mount of overlayfs is permitted here")
    assert code == 0 and (run / "model/a").read_text() == "old"


def test_a_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, capfd):
    """Root may delete everything, so the child is another user."""
    for step in (1, 2):
        save(tmp_path / f"step-{step:06}", TENSORS, {"step": step})
    if os.geteuid() == 0:
        for path in (tmp_path, *tmp_path.rglob("*")):
            os.chown(path, 65534, 65534)
    (tmp_path / "step-000001").chmod(0o555)

    def work():
        os.chdir(tmp_path)  # another user may not enter the directories above
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 65534)
        prune(Path(), 1, Path("step-000002"))
        remove_partial_writes(Path(), "step-*")  # as --resume does

    code = in_child(work)
    (left,) = tmp_path.glob("*step-000001*")
    left.chmod(0o755)
    assert code == 0 and newest(tmp_path) == tmp_path / "step-000002"
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2 and all("cannot be deleted (Permission denied)" in line for line in said)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EPERM])
def test_without_modes_and_syncs_of_directories_saves_work_with_one_warning(tmp_path, monkeypatch, capsys, number):
    """CIFS and some FUSE file systems are like this. A file that cannot be synced is always an error."""
    unsupported, fsync = OSError(number, os.strerror(number)), os.fsync

    def refuse(*given, **named):
        raise unsupported

    monkeypatch.setattr(os, "chmod", refuse)
    monkeypatch.setattr(os, "fsync", lambda file: refuse() if stat.S_ISDIR(os.fstat(file).st_mode) else fsync(file))
    atomic._warn_once.cache_clear()
    for step in (1, 2):
        save(tmp_path / f"step-{step:06}", TENSORS, {})
    atomic.write_file(tmp_path / "a", "text")
    assert newest(tmp_path) == tmp_path / "step-000002"
    (warning,) = capsys.readouterr().err.splitlines()
    assert "cannot sync directories or set file modes" in warning
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(SaveError):
        save(tmp_path / "step-000003", TENSORS, {})


def test_another_writer_is_left_alone_whatever_its_name_is(tmp_path):
    for name in (".run 1.being-written", ".run [1].being-written"):
        (tmp_path / name).mkdir()
    write_directory(tmp_path / "run [1]", write("a"), 1)
    write_directory(tmp_path / "run *", write("a"), 1)
    assert sorted(os.listdir(tmp_path)) == [".run 1.being-written", "run *", "run [1]"]


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path):
    save(tmp_path / "step-000001", TENSORS, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"weights": {"a": torch.zeros(100_000)}}
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        for path in (tmp_path / "step-000002", tmp_path / "step-000001"):
            with pytest.raises(SaveError) as error:
                save(path, large, {})
            assert error.value.exit_code == 5 and "\n" not in str(error.value)
            assert str(path) in str(error.value) and "needs 400,000 bytes" in str(error.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["step-000001"]
    assert verify(tmp_path / "step-000001") is None
