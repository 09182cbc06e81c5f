"""Tensors of a safetensors file read row by row, against safetensors itself."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glasstune.core.errors import InputError
from glasstune.core.tensors import read_rows, stored_tensors, tensor_shapes


@pytest.fixture
def every_type(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    values = torch.randn(7, 5) * 50
    kinds = (
        torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int16,
        torch.int32, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2,
    )  # fmt: skip
    tensors = {str(kind): values.to(kind) for kind in kinds}
    tensors["uint8"] = values.abs().to(torch.uint8)
    tensors["bool"] = values > 0
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.empty(0, 4)
    tensors["cube"] = torch.randn(3, 4, 5)
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    shapes = one.shape == other.shape
    return shapes and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def test_every_row_is_the_one_that_safetensors_reads(every_type: Path) -> None:
    truth = load_file(every_type)
    places = stored_tensors(every_type)
    assert places.keys() == truth.keys()
    for name, place in places.items():
        whole = read_rows(place)
        assert whole.dtype == truth[name].dtype
        assert place.torch_dtype == str(truth[name].dtype).removeprefix("torch.")
        assert (place.shape, place.dtype) == tensor_shapes(every_type)[name]
        assert same_bits(whole, truth[name])
        if whole.ndim:
            assert same_bits(read_rows(place, 1, 3), truth[name][1:3])


def test_rows_past_the_end_are_not_read(every_type: Path) -> None:
    place = stored_tensors(every_type)["torch.float32"]
    assert read_rows(place, 5, 99).shape == (2, 5)


def with_header(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},  # too few bytes for the shape
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 16]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
        [1, 2],
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, entry: object) -> None:
    header = json.dumps({"w": entry}).encode()
    with pytest.raises(InputError) as refused:
        stored_tensors(with_header(tmp_path / "x.safetensors", header, bytes(8)))
    assert refused.value.code == "bad_weights"
    assert "x.safetensors" in refused.value.where


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 16, b"\x02\0\0\0\0\0\0\0[]"])
def test_a_file_without_a_header_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged or was cut short"):
        stored_tensors(path)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_length_is_refused(every_type: Path, change: int) -> None:
    content = every_type.read_bytes()
    every_type.write_bytes(content[:change] if change < 0 else content + b"x")
    with pytest.raises(InputError, match="its tensors end at byte"):
        stored_tensors(every_type)


def test_a_file_that_shrinks_meanwhile_is_refused(every_type: Path) -> None:
    places = stored_tensors(every_type)
    last = max(places.values(), key=lambda place: place.offset + place.size)
    every_type.write_bytes(every_type.read_bytes()[:-3])
    with pytest.raises(InputError, match="it ends inside"):
        read_rows(last)
