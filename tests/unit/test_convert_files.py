"""Files in and out: what is read, what is refused and with which message, and what never appears half-written."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from convert_configs import tiny_config, write_checkpoint
from safetensors.torch import load_file, save_file

from asyppo_megatron.convert.atomic import atomic_directory, partial_path
from asyppo_megatron.convert.hf_io import INDEX, SINGLE, HFCheckpoint, check_checkpoint, write_sidecars
from asyppo_megatron.convert.safetensors_file import SafetensorsFile, TensorInfo, read_header
from asyppo_megatron.convert.torch_dist import read_metadata
from asyppo_megatron.models.spec import ModelSpec

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def check(path: Path, role: str = "actor") -> tuple[str, ...]:
    return check_checkpoint(HFCheckpoint(path), ModelSpec.from_hf(path), role)


def test_written_file_is_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.zeros(0, 2)}
    file = SafetensorsFile(
        tmp_path / "x.safetensors", {n: TensorInfo(tuple(t.shape), t.dtype) for n, t in tensors.items()}
    )
    for name in ("b", "c", "a"):  # in any order
        file.write(name, tensors[name])
    file.close()
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in tensors.items())
    assert found.keys() == tensors.keys() == read_header(tmp_path / "x.safetensors").keys()


def test_writer_refuses_a_tensor_of_another_shape(tmp_path: Path) -> None:
    file = SafetensorsFile(tmp_path / "x.safetensors", {"a": TensorInfo((2,), torch.float32)})
    with pytest.raises(ValueError, match=r"a: got \(3,\) torch.float32, need \(2,\) torch.float32"):
        file.write("a", torch.zeros(3))
    file.close()


@pytest.mark.parametrize("max_file_bytes", [1 << 40, 10_000])
def test_single_and_sharded_checkpoints_read_alike(tmp_path: Path, max_file_bytes: int) -> None:
    tensors = write_checkpoint(tmp_path, tiny_config(), max_file_bytes=max_file_bytes)
    assert (tmp_path / INDEX).exists() == (max_file_bytes == 10_000)
    checkpoint = HFCheckpoint(tmp_path)
    assert set(checkpoint.names) == tensors.keys()
    for name, tensor in tensors.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert torch.equal(checkpoint.read(name), tensor)
        assert torch.equal(checkpoint.read(name)[:1], tensor[:1])


@pytest.mark.parametrize("padding", [0, 1])
def test_tensor_that_lies_at_an_odd_place_is_read(tmp_path: Path, padding: int) -> None:
    tensor = torch.arange(12, dtype=torch.float32)
    header = json.dumps({"a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}})
    header += " " * (-len(header) % 8 + padding)
    raw = len(header).to_bytes(8, "little") + header.encode() + tensor.numpy().tobytes()
    (tmp_path / SINGLE).write_bytes(raw)
    checkpoint = HFCheckpoint(tmp_path)
    found = checkpoint.read("a")
    assert torch.equal(found, tensor.view(3, 4))
    assert (checkpoint.span(found) is None) == bool(padding)  # a copy lies in memory, not in the file


def test_part_of_a_mapped_tensor_knows_its_place_in_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.arange(12, dtype=torch.float32).view(3, 4)}, tmp_path / SINGLE)
    checkpoint = HFCheckpoint(tmp_path)
    whole = checkpoint.read("a")
    span = checkpoint.span(whole[1:])
    assert span is not None and span.length == 32
    raw = (tmp_path / SINGLE).read_bytes()[span.offset : span.offset + span.length]
    assert raw == whole[1:].numpy().tobytes()
    assert checkpoint.span(whole[:, 1:]) is None  # not in one piece
    assert checkpoint.span(whole + 0) is None  # not in the file


@pytest.mark.parametrize(
    "item",
    [
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        [],
    ],
)
def test_header_that_makes_no_sense_is_named(tmp_path: Path, item: object) -> None:
    text = json.dumps({"a": item}).encode()
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match=r"model\.safetensors: a: got .*fetch (the file|it) again"):
        HFCheckpoint(tmp_path)


def test_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got neither model\.safetensors nor model\.safetensors\.index\.json"):
        HFCheckpoint(tmp_path)


def test_truncated_file_names_tensor_and_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config())
    size = (tmp_path / SINGLE).stat().st_size
    os.truncate(tmp_path / SINGLE, size - 1)
    with pytest.raises(
        ValueError, match=rf"model\.safetensors: \S+weight: got a file of {size - 1} bytes, need {size}"
    ):
        HFCheckpoint(tmp_path)
    os.truncate(tmp_path / SINGLE, 100)
    with pytest.raises(ValueError, match=r"model\.safetensors: got 100 bytes, need a header of \d+"):
        HFCheckpoint(tmp_path)


def test_text_instead_of_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=r"model\.safetensors: got \d+ bytes, need a header"):
        HFCheckpoint(tmp_path)


def test_missing_shard_names_its_first_tensor(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config(), max_file_bytes=10_000)
    victim = sorted(tmp_path.glob("model-*.safetensors"))[1]
    name = next(iter(load_file(victim)))
    victim.unlink()
    with pytest.raises(ValueError, match=rf"{victim.name}: missing, but .* puts \S+ there") as e:
        HFCheckpoint(tmp_path)
    assert name.split(".")[0] in str(e.value)


def test_index_that_does_not_match_its_files_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config(), max_file_bytes=10_000)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["ghost"] = index["weight_map"][NORM]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="ghost: not in this file"):
        HFCheckpoint(tmp_path)
    del index["weight_map"]["ghost"], index["weight_map"][NORM]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{NORM}: in this file, but not in"):
        HFCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({UP: None}, f"missing tensor.s. {UP}"),
        (
            {"model.layers.0.mlp.up_proj.bias": torch.zeros(48)},
            r"unknown tensor.s. model\.layers\.0\.mlp\.up_proj\.bias",
        ),
        ({UP: torch.zeros(32, 48)}, rf"{UP}: got shape \(32, 48\), need \(48, 32\)"),
        ({UP: torch.zeros(48, 32, dtype=torch.int8)}, f"{UP}: got dtype I8"),
        ({"lm_head.weight": None}, "lm_head.weight: missing, but config.json has tie_word_embeddings false"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, changes: dict, message: str) -> None:
    write_checkpoint(tmp_path, tiny_config(), changes=changes)
    with pytest.raises(ValueError, match=message):
        check(tmp_path)


def test_config_that_lies_about_tying_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config(tied=True), changes={"lm_head.weight": torch.zeros(37, 32)})
    with pytest.raises(ValueError, match="lm_head.weight: differs from model.embed_tokens.weight"):
        check(tmp_path)


def test_tied_head_that_is_really_tied_is_ignored(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path, tiny_config(tied=True))
    head = tensors["model.embed_tokens.weight"].clone()
    write_checkpoint(tmp_path, tiny_config(tied=True), changes={"lm_head.weight": head})
    assert check(tmp_path) == ("lm_head.weight",)


def test_critic_drops_the_language_head_and_takes_a_value_head(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "actor", tiny_config())
    assert check(tmp_path / "actor", "critic") == ("lm_head.weight",)
    write_checkpoint(tmp_path / "critic", tiny_config(), role="critic")
    assert check(tmp_path / "critic", "critic") == ()


def test_config_and_tokenizer_are_carried_along(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "from", tiny_config())
    (tmp_path / "to").mkdir()
    write_sidecars(tmp_path / "from", tmp_path / "to", "critic", torch.float32)
    assert sorted(p.name for p in (tmp_path / "to").iterdir()) == [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
    ]
    config = json.loads((tmp_path / "to" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForTokenClassification"]
    assert config["torch_dtype"] == "float32" and len(config["id2label"]) == 1


def test_directory_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OSError, match="stop"), atomic_directory(target) as partial:
        (partial / "half").write_text("x")
        assert not target.exists()
        raise OSError("stop")
    assert list(tmp_path.iterdir()) == []
    with atomic_directory(target) as partial:
        (partial / "whole").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (target / "whole").exists()


def test_existing_directory_stays_without_force(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("x")
    with pytest.raises(ValueError, match="got an existing directory"), atomic_directory(target):
        pass
    with pytest.raises(OSError, match="stop"), atomic_directory(target, force=True):
        raise OSError("stop")
    assert (target / "precious").exists()
    with atomic_directory(target, force=True) as partial:
        (partial / "new").write_text("x")
    assert [p.name for p in target.iterdir()] == ["new"] and len(list(tmp_path.iterdir())) == 1


def test_leftovers_of_a_killed_run_are_removed_and_a_running_one_is_respected(tmp_path: Path) -> None:
    target = tmp_path / "out"
    partial_path(target).mkdir()
    (partial_path(target) / "leftover").write_text("x")
    with atomic_directory(target) as partial:
        assert list(partial.iterdir()) == []
        with pytest.raises(ValueError, match="another process"), atomic_directory(target):
            pass
        assert partial.exists()
    assert list(target.iterdir()) == []


def test_metadata_of_a_distributed_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "owned"),)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"got posix\.system in checkpoint metadata"):
        read_metadata(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_safetensors_library_agrees_on_what_is_damaged(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(10)}, tmp_path / "x.safetensors")
    assert {n: p.info for n, p in read_header(tmp_path / "x.safetensors").items()} == {
        "a": TensorInfo((10,), torch.float32)
    }
