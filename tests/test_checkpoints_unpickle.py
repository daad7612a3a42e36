"""Pickled checkpoints: tensors come out right, and nothing in the file is ever run."""

from __future__ import annotations

import io
import os
import pickle
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.checkpoints.tensors import dtype_name, open_tensors, read_tensors
from utils.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"


class Attack:
    """Creates a file when it is unpickled without care."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def attacks(mark: Path) -> list[Any]:
    code = f"open({str(mark)!r}, 'w').close()"
    return [
        Attack(os.system, f"touch {mark}"),
        Attack(eval, code, {}),
        Attack(exec, code, {}),
        Attack(__import__, "os"),
        Attack(getattr, OrderedDict, "fromkeys"),
        {"weight": np.ones(3, np.float32), "other": Attack(os.system, f"touch {mark}")},
    ]


@pytest.mark.parametrize("which", range(6))
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", ["bin", "pdparams"])
def test_attacks_are_refused(tmp_path: Path, which: int, protocol: int, kind: str) -> None:
    mark = tmp_path / "attacked"
    content = pickle.dumps(attacks(mark)[which], protocol)
    path = tmp_path / f"model.{kind}"
    if kind == "pdparams":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
    with pytest.raises(UserError) as caught:
        list(read_tensors(path))
    assert not mark.exists()
    assert str(path) in str(caught.value)
    if which in (0, 2, 5):
        assert "refused: it asks for" in str(caught.value)
    # the same file does harm to who loads it carelessly: the test would notice
    if which in (0, 1, 2):
        pickle.loads(content)
        assert mark.exists()


@pytest.mark.parametrize("name", ["_rebuild_qtensor", "_rebuild_tensor_v3", "_rebuild_sparse_tensor"])
def test_other_kinds_of_tensors_are_told_from_attacks(name: str, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", f"\x80\x02ctorch._utils\n{name}\n)R.".encode("latin-1"))
    with pytest.raises(UserError, match=rf"a kind that is not read here \({name}: quantized") as caught:
        open_tensors(path)
    assert "asks for" not in str(caught.value)


def test_bin_of_pytorch() -> None:
    """Types and shapes of what torch.save wrote; the values are checked by the logits test."""
    tensors = open_tensors(FIXTURES / "llama_plain" / "pytorch_model.bin")
    assert tensors["model.embed_tokens.weight"].shape == (264, 32)
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (32, 64)
    assert {tensor.dtype for tensor in tensors.values()} == {"float32"}
    values = tensors["model.norm.weight"].read()
    assert not values.flags.writeable
    assert values.shape == (32,)


@pytest.mark.parametrize("entry", ["data.pkl", "byteorder"])
def test_a_compressed_entry_is_refused_before_it_is_unpacked(entry: str, tmp_path: Path) -> None:
    """PyTorch compresses nothing; a few kilobytes may stand for any amount of memory."""
    path = tmp_path / "pytorch_model.bin"
    contents = {"data.pkl": pickle.dumps({}), "byteorder": b"little", entry: bytes(100_000_000)}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            kind = zipfile.ZIP_DEFLATED if name == entry else zipfile.ZIP_STORED
            archive.writestr(f"archive/{name}", content, kind, 1)
    del contents, content
    assert path.stat().st_size < 1_000_000
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=f"{entry} is compressed"):
            open_tensors(path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pdparams_of_paddle(tmp_path: Path, protocol: int) -> None:
    import paddle

    state = {
        "large": paddle.randn([200, 300]),
        "fortran": paddle.randn([3, 5]),
        "half": paddle.randn([7]).astype("float16"),
        "brain": paddle.randn([70, 80]).astype("bfloat16"),
        "whole": paddle.arange(50_000).reshape([100, 500]),
        "empty": paddle.zeros([0, 4]),
        "scalar": paddle.to_tensor(3.5),
    }
    path = tmp_path / "model_state.pdparams"
    saved: dict[str, Any] = {**state, "fortran": np.asfortranarray(state["fortran"].numpy())}
    paddle.save(saved, str(path), protocol=protocol)
    found = dict(read_tensors(path))
    assert list(found) == list(state)
    for name, value in state.items():
        assert dtype_name(found[name]) == str(value.dtype).removeprefix("paddle.")
        assert found[name].shape == tuple(value.shape)
        assert np.array_equal(found[name], value.numpy())
    assert isinstance(found["large"], np.memmap) or protocol == 2


def test_state_of_a_layer(tmp_path: Path) -> None:
    import paddle

    layer = paddle.nn.Linear(3, 4)
    paddle.save(layer.state_dict(), str(tmp_path / "layer.pdparams"))
    found = dict(read_tensors(tmp_path / "layer.pdparams"))
    assert np.array_equal(found["weight"], layer.weight.numpy())
    assert set(found) == {"weight", "bias"}


def other_contents() -> list[bytes]:
    objects = [
        {"a": {"b": np.ones(2)}},
        [1, 2],
        {"a": np.array([{}], object)},
        {"a": np.ones(2, np.complex64)},
        {"a": np.ones(2, ">f4")},
        {"a": "text"},
    ]
    return [pickle.dumps(value, 4) for value in objects] + [b"", b"\x80", b"\x80\x04.", b"\x80\x04]."]


@pytest.mark.parametrize("content", other_contents())
def test_what_is_no_tensor_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model_state.pdparams"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable file of tensors"):
        open_tensors(path)


def whole_bin() -> bytes:
    return (FIXTURES / "llama_plain" / "pytorch_model.bin").read_bytes()


def whole_pdparams() -> bytes:
    buffer = io.BytesIO()
    arrays = {"a": np.arange(6000, dtype=np.float32), "b": np.ones((2, 3), np.float16)}
    pickle.dump({**arrays, "StructuredToParameterName@@": {}}, buffer, 4)
    return buffer.getvalue()


@pytest.mark.parametrize(("name", "make"), [("m.bin", whole_bin), ("m.pdparams", whole_pdparams)])
def test_cut_files_are_errors(tmp_path: Path, name: str, make: Callable[[], bytes]) -> None:
    content = make()
    for share in (0.1, 0.5, 0.9, 0.999):
        (tmp_path / name).write_bytes(content[: int(len(content) * share)])
        with pytest.raises(UserError, match="not a readable file of tensors"):
            open_tensors(tmp_path / name)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_raise_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any byte changed: an error of ours or tensors, never another exception."""
    content = bytearray(whole_pdparams())
    places = [*range(60), *range(len(content) - 120, len(content))]
    for place in data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "m.pdparams"
    path.write_bytes(bytes(content))
    try:
        list(read_tensors(path))
    except UserError as error:
        assert str(path) in str(error)
