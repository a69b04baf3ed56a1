"""How chunks of statistics are encoded: as they are, compressed, or rounded and compressed; always with a checksum."""

from __future__ import annotations

from typing import Any

from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.codecs.numcodecs import BitRound

from streamda.config import StatisticsCodec

KEPT_MANTISSA_BITS = 12  # bitround: relative error 1.2e-4 per entry, about the noise of a few hundred samples


def zarr_codecs(codec: StatisticsCodec) -> dict[str, Any]:
    """Arguments of create_array. The checksum stands behind compression: it guards the bytes in the file."""
    if codec == "bitround":
        return {"filters": [BitRound(keepbits=KEPT_MANTISSA_BITS)], "compressors": [ZstdCodec(level=1), Crc32cCodec()]}
    compressors: dict[StatisticsCodec, list[Any]] = {
        "none": [],
        "zstd": [ZstdCodec(level=1)],
        "blosc": [BloscCodec(cname="lz4", shuffle="bitshuffle", clevel=5)],
    }
    return {"filters": [], "compressors": [*compressors[codec], Crc32cCodec()]}
