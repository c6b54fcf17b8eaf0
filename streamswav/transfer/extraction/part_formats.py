"""Files of a part: `.npy` with a line of JSON an image beside them, or one Parquet file."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from streamswav.errors import ConfigError
from streamswav.stream.labels import Label
from streamswav.transfer.extraction.parts import Part
from streamswav.transfer.extraction.reading import Rows

Layout = Literal["npy", "parquet"]
Arrays = dict[str, NDArray[Any]]

LAYOUTS: tuple[Layout, ...] = ("npy", "parquet")
ROWS_END = ".jsonl"

_NPY_END, _PARQUET_END = ".npy", ".parquet"
_ROW_COLUMNS = ("key", "shard", "ordinal", "label")


def check_layout(layout: Layout) -> None:
    """Refuse a layout that cannot be written or read here.

    Raises:
        ConfigError: it takes a package that is not installed.
    """
    if layout == "parquet":
        _import_pyarrow()


def encode_part(part: Part, shard: str, layout: Layout, *, multi: bool = False) -> dict[str, bytes]:
    """Return the files of a part, by what follows its name; a part without images has none.

    Args:
        part: what was computed.
        shard: key of its shard.
        layout: of the files.
        multi: whether images have several labels.
    """
    if not part.rows:
        return {}
    arrays = {name: output.numpy() for name, output in part.outputs.items()}
    if layout == "parquet":
        return {_PARQUET_END: _to_parquet(part.rows, shard, arrays, multi=multi)}
    files = {f".{name}{_NPY_END}": _to_npy(array) for name, array in arrays.items()}
    return {**files, ROWS_END: _to_lines(part.rows, shard)}


def decode_part(files: Mapping[str, bytes]) -> tuple[Rows, Arrays]:
    """Read what `encode_part` gave.

    Raises:
        ConfigError: it takes a package that is not installed.
    """
    if _PARQUET_END in files:
        return _from_parquet(files[_PARQUET_END])
    if ROWS_END not in files:
        return Rows(), {}
    arrays = {
        end[1:].removesuffix(_NPY_END): np.load(io.BytesIO(data), allow_pickle=False)
        for end, data in files.items()
        if end.endswith(_NPY_END)
    }
    return _from_lines(files[ROWS_END]), arrays


def _to_npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _to_lines(rows: Rows, shard: str) -> bytes:
    each = zip(rows.keys, rows.ordinals, rows.labels, strict=True)
    lines = (
        json.dumps({"key": key, "shard": shard, "ordinal": ordinal, "label": label})
        for key, ordinal, label in each
    )
    return "".join(f"{line}\n" for line in lines).encode()


def _from_lines(data: bytes) -> Rows:
    rows = [json.loads(line) for line in data.splitlines()]
    return Rows(
        tuple(row["key"] for row in rows),
        tuple(row["ordinal"] for row in rows),
        tuple(_label(row["label"]) for row in rows),
    )


def _to_parquet(rows: Rows, shard: str, arrays: Arrays, *, multi: bool) -> bytes:
    pa, parquet = _import_pyarrow()
    columns = {
        "key": pa.array(rows.keys, pa.string()),
        "shard": pa.array([shard] * len(rows), pa.string()),
        "ordinal": pa.array(rows.ordinals, pa.int64()),
        "label": pa.array(rows.labels, pa.list_(pa.int64()) if multi else pa.int64()),
    }
    for name, array in arrays.items():
        flat = pa.array(array.reshape(-1))
        columns[name] = flat if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, array.shape[1])
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns), buffer, compression="zstd", use_dictionary=["shard"])
    return buffer.getvalue()


def _from_parquet(data: bytes) -> tuple[Rows, Arrays]:
    _, parquet = _import_pyarrow()
    table = parquet.read_table(io.BytesIO(data))
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    labels = tuple(_label(label) for label in columns["label"].to_pylist())
    rows = Rows(tuple(columns["key"].to_pylist()), tuple(columns["ordinal"].to_pylist()), labels)
    arrays = {
        name: _to_array(column, len(rows)) for name, column in columns.items() if name not in _ROW_COLUMNS
    }
    return rows, arrays


def _to_array(column: Any, rows: int) -> NDArray[Any]:
    several = hasattr(column, "flatten") and hasattr(column.type, "list_size")
    flat: NDArray[Any] = (column.flatten() if several else column).to_numpy(zero_copy_only=False)
    return flat.reshape(rows, -1) if several else flat


def _label(value: Any) -> Label | None:
    return tuple(value) if isinstance(value, list) else value


def _import_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa  # noqa: PLC0415 - an optional dependency
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError:
        reason = "Parquet needs pyarrow: pip install 'streamswav[embed]', or use npy"
        raise ConfigError("--layout", reason, value="parquet") from None
    return pa, parquet
