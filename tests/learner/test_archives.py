"""A byte that has changed in a file of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from learner.archives import check_archives
from learner.checkpoint import DamagedCheckpoint

WEIGHTS = torch.arange(1000, dtype=torch.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with two files of weights."""
    (tmp_path / "step-000003" / "deepspeed").mkdir(parents=True)
    for name in ("a.pt", "b.pt"):
        torch.save({"w": WEIGHTS}, tmp_path / "step-000003" / "deepspeed" / name)
    return tmp_path / "step-000003"


def flip_a_bit(file: Path) -> None:
    """Of the 500th weight."""
    content = bytearray(file.read_bytes())
    content[content.index(WEIGHTS[500:510].numpy().tobytes())] ^= 1
    file.write_bytes(content)


def test_files_as_they_were_written_pass(folder):
    check_archives(folder, rank=0, world_size=1)


def test_a_flipped_bit_that_torch_reads_as_another_weight_is_damage(folder):
    flip_a_bit(folder / "deepspeed" / "b.pt")
    assert torch.load(folder / "deepspeed" / "b.pt")["w"][500] != 500
    with pytest.raises(DamagedCheckpoint, match=rf"deepspeed/b\.pt is damaged \(.*checksum\).*remove {folder} to"):
        check_archives(folder, rank=0, world_size=1)


def test_of_two_ranks_one_reads_each_file(folder):
    flip_a_bit(folder / "deepspeed" / "b.pt")
    check_archives(folder, rank=0, world_size=2)
    with pytest.raises(DamagedCheckpoint):
        check_archives(folder, rank=1, world_size=2)
