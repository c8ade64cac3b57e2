"""How much memory rows take that are read when they are drawn: peaks while an epoch is drawn, and its speed.

    python tests/bench/streaming.py --folder /tmp/rows --rows 10000 100000 1000000

Writes rows of a picture of 8 x 8 pixels, a question and an answer, once: as tar shards and, where the `datasets`
library is there, as parquet files. Then draws every row of an epoch in the order of training, in a process of its own.
Printed are the peak of the whole process, the peak of what is its own (the rest is code and mapped files, which the
system takes back when it needs room), and what was its own before the rows were opened.
"""

import argparse
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from PIL import Image

from moadapt.registry import TASKS
from moadapt.sampling import Proportional
from moadapt.training.loaders import Rows
from moadapt.training.order import MixedOrder

SHARD, BATCH = 50_000, 32
FORMS = {"webdataset": ("*.tar", "{png}"), "datasets": ("*.parquet", "{image}")}


def picture() -> bytes:
    """Return a tiny PNG."""
    held = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(held, "PNG")
    return held.getvalue()


def write_tar(file: Path, rows: range) -> None:
    """Write one shard."""
    shown = picture()
    with tarfile.open(file, "w") as tar:
        for row in rows:
            text = json.dumps({"question": f"which row is {row}?", "answer": str(row)}).encode()
            for ending, data in (("png", shown), ("json", text)):
                info = tarfile.TarInfo(f"{row:08d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_parquet(file: Path, rows: range) -> None:
    """Write one file of a table."""
    import pyarrow
    import pyarrow.parquet

    columns = {
        "image": [picture()] * len(rows),
        "question": [f"which row is {row}?" for row in rows],
        "answer": [str(row) for row in rows],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), file)


def write(folder: Path, form: str, rows: int) -> None:
    """Write all files of a form, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, rows, SHARD):
        file = folder / FORMS[form][0].replace("*", f"{start:08d}")
        if not file.exists():
            part = range(start, min(start + SHARD, rows))
            (write_tar if form == "webdataset" else write_parquet)(file, part)


def mebibytes(key: str) -> float:
    """Return a figure of this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) / 1024


def draw(folder: Path, form: str) -> None:
    """Draw every row of an epoch and print what it took."""
    before = mebibytes("RssAnon")
    start = time.perf_counter()
    pattern, image = FORMS[form]
    examples, _ = TASKS.get(form)(rows=f"{folder}/{pattern}", images=[image]).read("train")
    rows = Rows({form: examples})
    order = MixedOrder(rows.sizes, BATCH, Proportional(), 0)
    opened, own, seen = time.perf_counter() - start, 0.0, 0
    start = time.perf_counter()
    place = order.start
    for step in range(order.steps):
        draws, place = order.batch(place)
        seen += len(rows.__getitems__(draws))
        if step % 100 == 0:
            own = max(own, mebibytes("RssAnon"))
    each = (time.perf_counter() - start) / seen
    print(
        f"{form}, {len(rows):>9,} rows: peak {mebibytes('VmHWM'):.0f} MiB, its own {own:.0f}, {before:.0f} before; "
        f"opened in {opened:.1f} s, {1e6 * each:.0f} us a row"
    )


def main() -> None:
    """Write the files and start a process for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/rows"))
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--draw", choices=FORMS)
    given = parser.parse_args()
    if given.draw:
        draw(given.folder, given.draw)
        return
    for form in FORMS if importlib.util.find_spec("datasets") else ["webdataset"]:
        for rows in given.rows:
            folder = given.folder / f"{form}-{rows}"
            write(folder, form, rows)
            subprocess.run([sys.executable, __file__, "--folder", str(folder), "--draw", form], check=True)


if __name__ == "__main__":
    main()
