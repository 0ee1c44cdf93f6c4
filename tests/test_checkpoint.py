import os
import stat

import pytest
import torch

from checkpoint import NoCheckpointError, load, newest, prune, save, verify, write_directory

TENSORS = {
    "weights": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1)},
    "optimizer": {"a:step": torch.ones(())},
}


def test_what_was_saved_is_loaded(tmp_path):
    save(tmp_path / "step-000010", TENSORS, {"step": 10, "loss": 0.1 + 0.2})
    state, tensors = load(tmp_path / "step-000010")
    assert state == {"step": 10, "loss": 0.1 + 0.2}
    assert tensors.keys() == TENSORS.keys()
    for group, content in TENSORS.items():
        assert all(torch.equal(tensors[group][name], tensor) for name, tensor in content.items())
    assert verify(tmp_path / "step-000010") is None
    assert os.listdir(tmp_path) == ["step-000010"]


def test_file_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        save(tmp_path / "step-000001", TENSORS, {})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "step-000001").iterdir()} == {0o640}


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
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
    prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000007.bak", "step-1000000", "step-999999"]


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    write_directory(target, lambda directory: (directory / "a").write_text("old"))

    def fail(directory):
        (directory / "a").write_text("half")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        write_directory(target, fail)
    assert (target / "a").read_text() == "old"
    write_directory(target, lambda directory: (directory / "b").write_text("new"))
    assert os.listdir(target) == ["b"] and os.listdir(tmp_path) == ["model"]


def test_a_crash_between_the_renames_loses_nothing(tmp_path, monkeypatch):
    target = tmp_path / "model"
    write_directory(target, lambda directory: (directory / "a").write_text("old"))
    real, renamed = type(target).rename, []

    def rename(self, other):
        renamed.append(self.name)
        if len(renamed) == 2:
            raise OSError("crash")
        return real(self, other)

    monkeypatch.setattr(type(target), "rename", rename)
    with pytest.raises(OSError, match="crash"):
        write_directory(target, lambda directory: (directory / "a").write_text("new"))
    assert (target / "a").read_text() == "old"
