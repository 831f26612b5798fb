"""Fetch the reviews that `download.source` names, check their checksum, and store them as Parquet.

From: a file on disk, or an address
To:   data/raw/reviews.parquet (all columns of the source, and `source_line`; the source's facts in its metadata)
      data/source/current (a link to a file on disk: DVC follows it, so that a changed file runs the pipeline again)
Run:  python -m stages.download
"""

import json
import logging
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq

from sentiment import files, params, sources
from sentiment.errors import DataError
from sentiment.files import atomic, remove
from sentiment.logs import run_stage

LINK = Path("data/source/current")
RAW = Path("data/raw/reviews.parquet")
log = logging.getLogger("stages.download")


def main() -> None:
    settings = params.load().download
    kind = sources.file_format(settings.source)
    link_source(settings.source, LINK)
    with atomic(RAW) as part, TemporaryDirectory(dir=RAW.parent) as folder:
        fetched = sources.fetch(settings.source, Path(folder))
        check_sha256(settings, fetched)
        licence = settings.licence or stated_licence(settings.source)
        facts: dict[str, str | int] = {
            "source": settings.source,
            "sha256": fetched.sha256,
            "bytes": fetched.bytes,
            "licence": licence,
        }
        rows = store(fetched.path, kind, part, facts)
    log.info("%d rows, %d bytes, sha256 %s, licence %s", rows, fetched.bytes, fetched.sha256, licence)


def link_source(source: str, link: Path) -> None:
    """Point `link` at a source on disk, or take it away for an address."""
    link.parent.mkdir(parents=True, exist_ok=True)
    remove(link)
    if not sources.is_remote(source) and Path(source).is_file():
        files.link(link, source)


def check_sha256(settings: params.Download, fetched: sources.Fetched) -> None:
    """Raise DataError if the content is not the one that is pinned."""
    if settings.sha256 and settings.sha256 != fetched.sha256:
        raise DataError(
            f"{settings.source} has sha256 {fetched.sha256}, but download.sha256 pins {settings.sha256}; "
            "if the new content is wanted, pin it, or set download.sha256 to null"
        )


def stated_licence(source: str) -> str:
    """What the SPDX line of a LICENSE file beside a source on disk says, or "unknown"."""
    file = Path(source).parent / "LICENSE"
    if sources.is_remote(source) or not file.is_file():
        return "unknown"
    found = re.search(r"SPDX-License-Identifier:\s*(\S+)", file.read_text(encoding="utf-8"))
    return found[1] if found else "unknown"


def store(path: Path, kind: str, target: Path, facts: dict[str, str | int]) -> int:
    """Write the file's rows to a Parquet file that carries `facts`; returns how many there are (0 raises DataError)."""
    writer, rows = None, 0
    try:
        for table in sources.tables(path, kind):
            if writer is None:
                schema = table.schema.with_metadata({"source": json.dumps(facts)})
                writer = pq.ParquetWriter(target, schema, compression="zstd")
            writer.write_table(table.cast(pa.schema(writer.schema)))
            rows += len(table)
    finally:
        if writer:
            writer.close()
    if not rows:
        raise DataError(f"{facts['source']} holds no reviews; check that the file is the one you mean")
    return rows


if __name__ == "__main__":
    run_stage("download", main)
