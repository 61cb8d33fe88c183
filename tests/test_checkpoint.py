import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mmkit.checkpoint
from mmkit.checkpoint import atomic_folder, atomic_write, load_strict, load_weights, save_weights
from mmkit.errors import DataError


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "new") as work:
        (work / "sub").mkdir()
        (work / "sub" / "a.txt").write_text("a")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new" / "sub" / "a.txt").read_text() == "a"
    assert os.listdir(tmp_path) == ["new"]


@pytest.mark.parametrize("where", ["block", "fsync", "rename"])
def test_a_full_disk_leaves_the_old_folder_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old.txt").write_text("old")
    if where == "fsync":
        monkeypatch.setattr(os, "fsync", full_disk)
    if where == "rename":
        real = os.rename
        monkeypatch.setattr(os, "rename", lambda a, b: full_disk() if ".writing-" in str(a) else real(a, b))

    def replace() -> None:
        with atomic_folder(tmp_path / "run", overwrite=True) as work:
            (work / "new.txt").write_text("new")
            if where == "block":
                full_disk()

    with pytest.raises(OSError, match="No space left"):
        replace()
    assert os.listdir(tmp_path) == ["run"]
    assert (tmp_path / "run" / "old.txt").read_text() == "old"


def test_an_existing_folder_is_replaced_only_on_request(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(FileExistsError, match="exists already"), atomic_folder(tmp_path / "run"):
        pass
    with atomic_folder(tmp_path / "run", overwrite=True) as work:
        (work / "new.txt").write_text("new")
    assert os.listdir(tmp_path / "run") == ["new.txt"]


def test_a_file_is_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write(tmp_path / "deep" / "a.txt", "old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(tmp_path / "deep" / "a.txt", b"new")
    assert os.listdir(tmp_path / "deep") == ["a.txt"]
    assert (tmp_path / "deep" / "a.txt").read_text() == "old"


def test_weights_come_back_also_tied_and_sliced(tmp_path: Path) -> None:
    table = torch.randn(6, 4)
    state = {"a": table, "tied": table, "slice": table[:2], "turned": table.T, "half": table.to(torch.bfloat16)}
    save_weights(state, tmp_path / "w.safetensors")
    loaded = load_weights(tmp_path / "w.safetensors")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_weights_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    save_weights({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    atomic_write(tmp_path / "config.json", "{}")
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "model.safetensors").touch(0o600)  # as transformers' save_pretrained leaves it
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


def test_a_failed_write_of_weights_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def broken(tensors: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(mmkit.checkpoint, "save_file", broken)
    with pytest.raises(OSError, match="No space left on device"):
        save_weights({"a": torch.ones(2)}, tmp_path / "w.safetensors")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_truncated_weight_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save_weights({"a": torch.randn(100)}, path) if name.endswith("safetensors") else torch.save({"a": torch.randn(100)}, path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=name):
        load_weights(path)


def test_a_weight_file_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"a": Path("x")}, tmp_path / "w.bin")
    with pytest.raises(DataError, match="no whole weight file"):
        load_weights(tmp_path / "w.bin")


def test_strict_loading_shows_the_difference() -> None:
    model = nn.ModuleDict({"trunk": nn.Sequential(*(nn.Linear(2, 2) for _ in range(6))), "head": nn.Linear(2, 3)})
    state = {name: value.clone() + 1 for name, value in model.state_dict().items() if not name.startswith("trunk.5")}
    state["head.weight"] = torch.ones(4, 2)
    state["extra.bias"] = torch.ones(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DataError) as caught:
        load_strict(model, state, "runs/a/model.safetensors")
    message = str(caught.value)
    assert message.startswith("runs/a/model.safetensors does not fit ModuleDict:")
    assert "2 of 14 tensors missing, all under trunk.5: trunk.5.weight, trunk.5.bias" in message
    assert "1 of 13 tensors unexpected: extra.bias" in message
    assert "head.weight is [4, 2], should be [3, 2]" in message
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_strict_loading_fills() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    load_strict(model, other.state_dict(), "memory")
    assert torch.equal(model.weight, other.weight)
