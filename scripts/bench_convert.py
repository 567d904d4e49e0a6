"""Measure conversion against plain reading and writing: `python scripts/bench_convert.py --json convert.json`

Makes data in the layout of Echo-4o-Image (half text to image, half with two references; .tar.gz shards of JPEG files in
the order of the rows) and converts it to upstream parquet. The yardstick does no more than it must: it reads the same
shards with `tarfile` from front to back and writes the same bytes to parquet with the same settings, in one process,
without syncing. Runs of both alternate, each in a process of its own, and medians are compared; Python's imports are
not counted on either side. On a busy machine seconds of processor time say more. Unpacked shards are thrown away before
every run. The second, smaller size shows that memory does not grow with the rows.

    python scripts/bench_convert.py --rows 2000 --runs 1            # a quick look
    python scripts/bench_convert.py --side 512                      # larger images
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_SHARD = 5000
REFERENCES = 2
T2I, MULTI_REF = "Surrel-Fantasy-Image", "Multi-Reference-Image"
CAPTION = "A glass whale swims through a library where every book is a lit window, number {}"
INSTRUCTION = "Put the object of image 1 into the scene of image 2, seen from above, number {}"
WRITING = {"use_dictionary": False, "write_statistics": False}


def jpegs(side: int, count: int = 64) -> list[bytes]:
    """Crops of photographs, as a camera would store them."""
    import skimage.data
    import sklearn.datasets
    from PIL import Image

    photographs = [skimage.data.astronaut(), skimage.data.coffee(), *sklearn.datasets.load_sample_images().images]
    files = []
    for number in range(count):
        picture = Image.fromarray(photographs[number % len(photographs)])
        zoom = 1 + number % 7 / 4
        width, height = picture.width / zoom, picture.height / zoom
        left, top = (picture.width - width) * (number % 5) / 4, (picture.height - height) * (number % 3) / 2
        buffer = io.BytesIO()
        box = (left, top, left + width, top + height)
        picture.resize((side, side), Image.Resampling.BICUBIC, box=box).save(buffer, "JPEG", quality=92)
        files.append(buffer.getvalue())
    return files


def numbered(content: bytes, number: int) -> bytes:
    """The JPEG with a comment of its own, so that no two files are equal."""
    comment = f"{number:010d}".encode()
    return content[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + content[2:]


def write_part(folder: Path, rows: int, references: int, pool: list[bytes]) -> int:
    """A part of the data set. Returns the bytes of its images."""
    images = folder / "images"
    images.mkdir(parents=True)
    total, lines = 0, []
    for start in range(0, rows, ROWS_PER_SHARD):
        end = min(start + ROWS_PER_SHARD, rows)
        with tarfile.open(images / f"{start}-{end}.tar.gz", "w:gz", compresslevel=1) as shard:
            for row in range(start, end):
                names = [f"{row:05d}_{place}.jpg" for place in range(references)] + [f"{row:05d}.jpg"]
                for place, name in enumerate(names):
                    number = row * len(names) + place
                    content = numbered(pool[number % len(pool)], number)
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))
                    total += len(content)
                *inputs, target = [f"/Echo-4o-Image/{folder.name}/images/{name}" for name in names]
                text = (INSTRUCTION if references else CAPTION).format(row)
                row_values = {"task_type": "multi_ref" if references else "t2i", "instruction": text}
                lines.append(
                    json.dumps({**row_values, **({"input_images": inputs} if inputs else {}), "output_image": target})
                )
    (folder / f"{folder.name}.jsonl").write_text("\n".join(lines) + "\n")
    return total


def write_data(root: Path, rows: int, side: int) -> int:
    pool = jpegs(side)
    return write_part(root / T2I, rows // 2, 0, pool) + write_part(root / MULTI_REF, rows - rows // 2, REFERENCES, pool)


def plain(root: Path, out: Path) -> dict:
    """Front to back: a shard's members in order, 64 rows at a time."""
    started, cpu_started = time.perf_counter(), cpu_seconds()
    num_rows = 0
    for part, references in ((T2I, 0), (MULTI_REF, REFERENCES)):
        names = ("image", "captions") if not references else ("image_list", "instruction_list")
        types = (
            (pa.binary(), pa.string()) if not references else (pa.list_(pa.binary()), pa.list_(pa.list_(pa.string())))
        )
        schema = pa.schema(list(zip(names, types, strict=True)))
        shards = sorted((root / part / "images").glob("*.tar.gz"), key=lambda path: int(path.name.split("-")[0]))
        lines = (root / part / f"{part}.jsonl").open()
        with pq.ParquetWriter(out / f"{part}.parquet", schema, compression="none", **WRITING) as writer:
            pictures: list = []
            texts: list = []

            def flush(writer=writer, names=names, pictures=pictures, texts=texts, schema=schema) -> None:
                writer.write_table(pa.table(dict(zip(names, (pictures, texts), strict=True)), schema))
                pictures.clear()
                texts.clear()

            waiting: list[bytes] = []
            for shard in shards:
                with tarfile.open(shard) as tar:
                    for member in tar:
                        content = tar.extractfile(member).read()  # type: ignore[union-attr]
                        waiting.append(content)
                        if len(waiting) <= references:
                            continue
                        text = json.loads(next(lines))["instruction"]
                        pictures.append(waiting if references else content)
                        texts.append([[text]] if references else json.dumps({"caption": text}))
                        waiting = []
                        num_rows += 1
                        if len(texts) == 64:
                            flush()
            if texts:
                flush()
    return {"seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds() - cpu_started, "rows": num_rows}


def cpu_seconds() -> float:
    """Of this process and of children that have ended."""
    uses = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


def ours(root: Path, out: Path, workers: int | None) -> dict:
    from echo4o.data.formats.convert import ConvertOptions, convert

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started, cpu_started = time.perf_counter(), cpu_seconds()
    report = convert(ConvertOptions(str(root), "bagel_parquet"), out / "converted", workers=workers)
    seconds = time.perf_counter() - started
    peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds() - cpu_started,
        "rows": report.result.num_written,
        "imports_mb": before,
        "peak_mb": peaks[0],
        "worker_peak_mb": peaks[1],
    }


def in_process(args: argparse.Namespace, what: str, root: Path) -> dict:
    for cache in root.rglob(".echo4o_cache"):
        shutil.rmtree(cache)
    with tempfile.TemporaryDirectory(dir=args.folder) as out:
        command = [sys.executable, __file__, "--measure", what, "--data", str(root), "--out", out]
        command += [] if args.workers is None else ["--workers", str(args.workers)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20000, help="rows of the data set (default 20000)")
    parser.add_argument("--small-rows", type=int, help="rows of the smaller one, for memory (default: a quarter)")
    parser.add_argument("--side", type=int, default=192, help="pixels of a side of every image (default 192)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each (default 5)")
    parser.add_argument("--workers", type=int, help="worker processes of the conversion (default: its own)")
    parser.add_argument("--folder", type=Path, help="where data is made and converted (default: the temporary folder)")
    parser.add_argument("--json", type=Path, help="write every run here")
    parser.add_argument("--measure", choices=("plain", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(
            json.dumps(
                plain(args.data, args.out) if args.measure == "plain" else ours(args.data, args.out, args.workers)
            )
        )
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        large, small = Path(folder) / "large", Path(folder) / "small"
        size = write_data(large, args.rows, args.side)
        write_data(small, args.small_rows or args.rows // 4, args.side)
        print(f"{args.rows} rows, {args.rows * 2} images of {size / args.rows / 2e3:.1f} kB, {size / 1e6:.0f} MB")
        runs: dict[str, list[dict]] = {"plain": [], "ours": []}
        for _ in range(args.runs):
            for what, results in runs.items():
                results.append(in_process(args, what, large))
        smaller = in_process(args, "ours", small)
    for clock in ("seconds", "cpu_seconds"):
        print(clock.replace("_", " "))
        medians = {what: statistics.median(run[clock] for run in results) for what, results in runs.items()}
        for what, value in medians.items():
            spread = ", ".join(f"{run[clock]:.2f}" for run in runs[what])
            rate = f"{args.rows / value:7.0f} rows/s  {size / value / 1e6:5.0f} MB/s"
            print(f"  {what:6} {value:6.2f} s  {rate}   ({spread})")
        print(f"  ratio of speeds, ours to plain: {medians['plain'] / medians['ours']:.2f}")
    print("peak resident MB (imports, then whole process; largest worker):")
    for rows, run in ((smaller["rows"], smaller), (args.rows, runs["ours"][-1])):
        print(f"  {rows:6} rows: {run['imports_mb']:.0f}, {run['peak_mb']:.0f}; {run['worker_peak_mb']:.0f}")
    if args.json:
        args.json.write_text(json.dumps({"rows": args.rows, "bytes": size, "runs": runs, "smaller": smaller}))


if __name__ == "__main__":
    main()
