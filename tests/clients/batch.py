#!/usr/bin/env python3
"""`nbn score` as its users meet it: sources, forms read back by other programs, kills, a full disk, shares.

    batch.py PROGRAM [--model models/cifar10-lt] [--images 20000] [--bad 10000] [--kills 50]

Needs jq, and unshare (util-linux) for a small disk of its own.
"""

import argparse
import csv
import io
import json
import logging
import math
import os
import random
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

import boto3
import polars
import pyarrow
import pyarrow.parquet
from common import Report, encoded, picture
from moto.server import ThreadedMotoServer


def pictures(folder, n):
    """`n` small PNGs that differ; by hundreds, since large folders are slow to look at."""
    base = [picture(40, 36, seed) for seed in range(64)]
    for i in range(n):
        path = folder / f"{i // 1000:03}" / f"{i:06}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = base[i % 64].copy()
        image.putpixel((i % 40, i // 40 % 36), (i % 251, i // 251 % 241, 7))
        path.write_bytes(encoded(image))


class Score:
    def __init__(self, options):
        self.line = [str(options.program.resolve()), "score", "--model", str(options.model.resolve())]
        self.line += ["--cache", str(options.cache)]

    def __call__(self, *args, status=0, **more):
        done = subprocess.run([*self.line, *map(str, args)], capture_output=True, text=True, **more)
        assert done.returncode == status, f"status {done.returncode}: {done.stderr[-600:]}"
        return done

    def start(self, *args):
        line = [*self.line, *map(str, args)]
        return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def rows(folder):
    """All rows of a folder's parts, in the parts' order."""
    found = []
    for part in sorted(folder.glob("part-*.jsonl")):
        found += [json.loads(line) for line in part.read_text().splitlines()]
    return found


# What says of each row which model scored it, and how.
ORIGIN = ("model", "version", "scale", "calibration", "prior")


def forms(report, score, images, work):
    args = ["--alpha", "0.1", "--probabilities", "--logits", "--labels", "folder", "--top-k", "3", images / "000", work / "gone.png"]
    reference = [json.loads(line) for line in score(*args, status=1).stdout.splitlines()]
    with report.check("JSON lines are read by jq"):
        query = 'select(.error == null) | [.path, .predictions[0].label, .predictions[0].score, (.set | length)] | @json'
        text = score(*args, status=1).stdout
        read = subprocess.run(["jq", "-r", query], input=text, capture_output=True, text=True, check=True).stdout
        got = [json.loads(line) for line in read.splitlines()]
        want = [[r["path"], r["predictions"][0]["label"], r["predictions"][0]["score"], len(r["set"])] for r in reference[:-1]]
        assert got == want
    with report.check("CSV is read by Python's csv"):
        got = list(csv.DictReader(io.StringIO(score(*args, "--format", "csv", status=1).stdout)))
        assert len(got) == len(reference)
        for row, want in zip(got, reference):
            assert [row[n] for n in ORIGIN] == [want[n] for n in ORIGIN]
            assert row["path"] == want["path"] and row["error"] == want.get("error", "") and row["label"] == want["label"]
            if "error" not in want:
                assert json.loads(row["set"]) == want["set"] and json.loads(row["logits"]) == want["logits"]
                for k, best in enumerate(want["predictions"], 1):
                    assert row[f"label_{k}"] == best["label"] and float(row[f"score_{k}"]) == best["score"]
    path = work / "rows.parquet"
    score(*args, "--format", "parquet", "--output", path, status=1)
    with report.check("Parquet is read by pyarrow, with its types"):
        table = pyarrow.parquet.read_table(path)
        of = {field.name: field.type for field in table.schema}
        assert [of[n] for n in ("path", "label", "error", "decision", "reason")] == [pyarrow.string()] * 5, of
        assert of["probabilities"].value_type == pyarrow.float64() and of["logits"].value_type == pyarrow.float32()
        assert of["set"].value_type == pyarrow.string()
        prediction = of["predictions"].value_type
        kinds = {field.name: field.type for field in prediction}
        assert kinds == {"class_id": pyarrow.int32(), "label": pyarrow.string(), "score": pyarrow.float64(), "group": pyarrow.string()}
        same(table.to_pylist(), reference)
        about = json.loads(table.schema.metadata[b"nbn"])
        labels = about.pop("classes")
        assert about == {name: reference[0][name] for name in ORIGIN}, about
        assert all(p["label"] == labels[p["class_id"]] for row in reference for p in row.get("predictions", []))
    with report.check("Parquet is read by polars"):
        same(polars.read_parquet(path).to_dicts(), reference)


def same(got, reference):
    assert len(got) == len(reference), (len(got), len(reference))
    for row, want in zip(got, reference):
        for name in ("path", "label", "error", "decision", "predictions", "set", "probabilities", *ORIGIN):
            assert row[name] == want.get(name), (name, row[name], want.get(name))
        logits = want.get("logits")
        assert (row["logits"] is None) == (logits is None)
        assert all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(logits or [], row["logits"] or [], strict=True))


def sources(report, score, images, work):
    files = sorted((images / "000").glob("*.png"))[:60]
    table = {}
    for line in score(*files).stdout.splitlines():
        row = json.loads(line)
        table[Path(row["path"]).name] = row["predictions"]

    def agree(*args, count=60, **more):
        done = score(*args, **more)
        read = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(read) == count, (len(read), done.stderr)
        return read

    lists = work / "lists"
    lists.mkdir()
    relative = [os.path.relpath(file, lists) for file in files]
    with report.check("lists: text, CSV, JSON lines, a pattern"):
        (lists / "a.txt").write_text("".join(f"{path} {i % 10}\n" for i, path in enumerate(relative)))
        (lists / "b.csv").write_text("id,path,label\n" + "".join(f"{i},{p},{i % 10}\n" for i, p in enumerate(relative)))
        (lists / "c.jsonl").write_text("".join(json.dumps({"file_name": p, "label": i % 10}) + "\n" for i, p in enumerate(relative)))
        (lists / "d.txt").write_text("\n".join(relative))
        for args in (["--labels", "line", lists / "a.txt"], [lists / "b.csv"], [lists / "c.jsonl"]):
            summary = work / "summary.json"
            read = agree(*args, "--summary", summary)
            assert [r["predictions"] for r in read] == [table[f.name] for f in files]
            assert [r["label"] for r in read] == [str(i % 10) for i in range(60)]
            said = json.loads(summary.read_text())
            hits = sum(r["predictions"][0]["class_id"] == i % 10 for i, r in enumerate(read))
            assert said["accuracy"]["images"] == 60 and abs(said["accuracy"]["top1"] - hits / 60) < 1e-12
        assert "label" not in agree(lists / "d.txt")[0]
        agree(images / "000" / "*0.png", count=len(list((images / "000").glob("*0.png"))))
        agree(images / "**" / "00001?.png", count=10)
    with report.check("tables: Parquet with paths, with bytes, with Hugging Face's struct"):
        data = [file.read_bytes() for file in files]
        tables = {
            "path": pyarrow.table({"path": relative, "label": [i % 10 for i in range(60)]}),
            "bytes": pyarrow.table({"bytes": data, "class": [str(i % 10) for i in range(60)]}),
            "image": pyarrow.table({"image": [{"bytes": b, "path": "x.png"} for b in data]}),
        }
        for (name, content), compression in zip(tables.items(), ("snappy", "zstd", "none")):
            path = lists / f"{name}.parquet"
            pyarrow.parquet.write_table(content, path, compression=compression)
            read = agree(path)
            assert [r["predictions"] for r in read] == [table[f.name] for f in files]
            assert name == "path" or read[5]["path"].endswith(f"{name}.parquet#5")
            assert name == "image" or read[7]["label"] == "7"
        polars.DataFrame({"picture": data}).write_parquet(lists / "e.parquet")
        agree("--image-column", "picture", lists / "e.parquet")
        done = score(lists / "e.parquet", status=1)
        assert "--image-column" in done.stderr and "picture" in done.stderr, done.stderr
    with report.check("archives: tar shards as WebDataset writes them, plain, packed, and cut short"):
        for name, mode in (("s.tar", "w"), ("s.tar.gz", "w:gz")):
            with tarfile.open(lists / name, mode) as out:
                for i, file in enumerate(files):
                    for ending, content in (("png", file.read_bytes()), ("cls", str(i % 10).encode()), ("json", b"{}")):
                        member = tarfile.TarInfo(f"sample/{i:04}.{ending}")
                        member.size = len(content)
                        out.addfile(member, io.BytesIO(content))
            read = agree(lists / name)
            assert [r["predictions"] for r in read] == [table[f.name] for f in files]
            assert [r["label"] for r in read] == [str(i % 10) for i in range(60)]
            assert read[3]["path"] == f"{lists / name}/sample/0003.png"
        whole = (lists / "s.tar").read_bytes()
        (lists / "cut.tar").write_bytes(whole[: len(whole) // 2])
        done = score(lists / "cut.tar", status=1)
        read = [json.loads(line) for line in done.stdout.splitlines()]
        assert 20 < len(read) < 40 and "cut.tar cannot be read further" in done.stderr, done.stderr
        assert all("error" not in r for r in read)
        # Not done, however often it is tried.
        for more in ([], ["--resume"]):
            said = score("--errors-exit-zero", "--output-dir", work / "cut", *more, lists / "cut.tar", status=1).stderr
            assert "cannot be read further" in said, said
        assert len(rows(work / "cut")) == len(read)
    with report.check("archives: a label that is no text, a link, many pictures of one stem"):
        with tarfile.open(lists / "odd.tar", "w") as out:
            def add(name, content, **more):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                for key, value in more.items():
                    setattr(member, key, value)
                out.addfile(member, io.BytesIO(content))
            data = files[0].read_bytes()
            add("0.png", data)
            add("0.cls", b"\xff\xfe")
            add("1.png", data)
            add("2.png", b"", type=tarfile.LNKTYPE, linkname="1.png")
            for i in range(20):
                add(f"clip.{i:04}.png", data)
        read = [json.loads(line) for line in score(lists / "odd.tar", status=1).stdout.splitlines()]
        assert len(read) == 23 and [r["path"] for r in read if "error" in r] == [f"{lists / 'odd.tar'}/2.png"], read
    with report.check("shares of archives and files agree on their columns"):
        for i in range(4):
            score("--output-dir", work / "mixed", "--shard", f"{i}/4", lists / "s.tar", files[0], files[1])
        assert len(rows(work / "mixed")) == 62
    with report.check("odd names: bytes that are no text, a byte-order mark, a pipe"):
        odd = work / "odd"
        odd.mkdir()
        names = [os.fsencode(odd) + b"/a\xfe.png", os.fsencode(odd) + b"/a\xff.png"]
        for name in names:
            shutil.copyfile(files[0], name)
        read = agree("--duplicates", "skip", odd, count=2)
        assert [r["path"] for r in read] == [f"{odd}/a\\xfe.png", f"{odd}/a\\xff.png"], read
        (lists / "bom.txt").write_text("\ufeff" + "\n".join(relative))
        agree(lists / "bom.txt")
        os.mkfifo(odd / "pipe.png")
        done = score(odd, status=1, timeout=30)
        assert "not a regular file" in done.stdout, done.stdout
    with report.check("damaged tables are errors, never the end"):
        chance = random.Random(3)
        whole = (lists / "path.parquet").read_bytes()
        for _ in range(12):
            broken = bytearray(whole)
            for at in chance.sample(range(4, len(whole) - 8), 40):
                broken[at] ^= 1 << chance.randrange(8)
            (lists / "damaged.parquet").write_bytes(broken)
            done = subprocess.run([*score.line, str(lists / "damaged.parquet")], capture_output=True, text=True, timeout=60)
            lines = done.stdout.splitlines()
            assert done.returncode in (0, 1) and (len(lines) == 60 or done.returncode == 1), (done.returncode, done.stderr)
    with report.check("an image that is named twice"):
        assert len(agree(*files, files[0], count=61)) == 61
        assert "left out    1 that the source names twice" in score("--duplicates", "skip", *files, files[0]).stderr
        out = work / "twice"
        score("--output-dir", out, *files, files[0], files[1])
        score("--output-dir", out, "--resume", *files, files[0], files[1])
        assert len(rows(out)) == 62


def objects(report, score, images, work):
    """A real S3 server on this machine."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    settings = {
        "AWS_ENDPOINT": endpoint, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
    }
    client = boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="secret"
    )
    client.create_bucket(Bucket="photos")
    files = sorted((images / "000").glob("*.png"))[:60]
    want = [json.loads(line)["predictions"] for line in score(*files).stdout.splitlines()]
    for file in files:
        client.upload_file(str(file), "photos", f"a b/{file.name}")
    for name in ("s.tar", "s.tar.gz", "bytes.parquet"):
        client.upload_file(str(work / "lists" / name), "photos", f"lists/{name}")
    client.put_object(Bucket="photos", Key="a b/list.txt", Body="\n".join(file.name for file in files).encode())
    client.put_object(Bucket="photos", Key="a b/notes.md", Body=b"no picture")
    environment = os.environ | settings

    def read(*args, status=0):
        return [json.loads(line) for line in score(*args, status=status, env=environment).stdout.splitlines()]

    with report.check("S3: a prefix, a list, archives, a table, single objects") as figures:
        for source in ("a b/", "a b", "a b/list.txt", "lists/s.tar", "lists/s.tar.gz", "lists/bytes.parquet"):
            got = read(f"s3://photos/{source}")
            assert [row["predictions"] for row in got] == want, source
            figures.append(f"{source}: {got[0]['path']};")
        (work / "remote.csv").write_text("path\n" + "".join(f"s3://photos/a b/{file.name}\n" for file in files))
        assert [row["predictions"] for row in read(work / "remote.csv")] == want
        assert read(f"file://{files[3]}")[0]["predictions"] == want[3]
    with report.check("S3: what is not there"):
        (row,) = read("s3://photos/gone.png", status=1)
        assert "gone.png" in row["error"], row
        for url, words in (("s3://photos/none/", "holds no file"), ("s3://nobody/", "nobody"), ("ftp://x/", "not an object store")):
            said = score(url, status=1, env=environment).stderr
            assert words in said, said
        # Not settings of a store, though its builder knows them.
        other = environment | {"TIMEOUT": "30", "TOKEN": "x", "ENDPOINT": "http://127.0.0.1:1"}
        score("s3://photos/lists/s.tar", env=other)
    server.stop()
    with report.check("S3: a server that is away is an error in time"):
        for away in ({"AWS_ENDPOINT": endpoint}, {"AWS_ENDPOINT": "https://127.0.0.1:1", "AWS_ALLOW_HTTP": "false"}):
            began = time.monotonic()
            said = score("s3://photos/a b/", status=1, env=environment | away, timeout=120).stderr
            assert "photos" in said and "panicked" not in said, said
            assert time.monotonic() - began < 60


def bad(report, score, images, work, n):
    folder = work / "bad"
    shutil.copytree(images, folder)
    files = sorted(folder.rglob("*.png"))
    kinds = {3: b"", 5: b"GIF89a nonsense", 7: b"just text", 11: files[0].read_bytes()[:200]}
    broken = {}
    for at, content in kinds.items():
        for file in files[at::97]:
            file.write_bytes(content)
            broken[str(file)] = at
    huge = files[50]
    huge.write_bytes(encoded(picture(100, 100).resize((9000, 9000))))
    big = files[51]
    with open(big, "wb") as out:
        out.truncate(70 << 20)
    with report.check(f"broken, empty, huge and foreign files among {n}") as figures:
        began = time.monotonic()
        done = score("--output", work / "bad.jsonl", folder, status=1)
        read = [json.loads(line) for line in (work / "bad.jsonl").read_text().splitlines()]
        assert [r["path"] for r in read] == [str(f) for f in files]
        wrong = {r["path"] for r in read if "error" in r}
        assert wrong == set(broken) | {str(huge), str(big)}, len(wrong)
        assert f"scored      {len(files) - len(wrong)} images" in done.stderr, done.stderr
        assert f"failed      {len(wrong)}: " in done.stderr, done.stderr
        for word in ("empty_image", "unknown_format", "damaged_image", "too_many_pixels", "file_too_large"):
            assert word in done.stderr, (word, done.stderr)
        figures.append(f"{len(wrong)} error rows, {time.monotonic() - began:.1f} s")
    with report.check("a folder that vanishes midway"):
        gone = work / "gone"
        shutil.copytree(images / "000", gone)
        process = subprocess.Popen([*score.line, "--output", str(work / "gone.jsonl"), "--readers", "1", str(gone)], stderr=subprocess.PIPE, text=True)
        while not (work / "gone.jsonl").exists() or (work / "gone.jsonl").stat().st_size == 0:
            time.sleep(0.01)
        shutil.move(gone, work / "moved")
        _, said = process.communicate()
        assert process.returncode == 1 and "file_not_found" in said, said
        assert len((work / "gone.jsonl").read_text().splitlines()) == len(list((images / "000").iterdir()))


def killed(report, score, images, work, n, kills):
    want, part = work / "whole", max(20, n // 100)
    began = time.monotonic()
    score("--output-dir", want, "--part-rows", part, images)
    took = time.monotonic() - began
    with report.check(f"{kills} SIGKILLs over {n} images, with --resume: row for row the unbroken run") as figures:
        out = work / "killed"
        chance = random.Random(7)
        done = 0
        while done < kills:
            process = score.start("--output-dir", out, "--part-rows", part, "--resume", images)
            try:
                # Short enough that the run does not end before the kills are through.
                process.wait(chance.uniform(0, 2.0 * took / kills) + 0.05)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                done += 1
        score("--output-dir", out, "--part-rows", part, "--resume", images)
        assert rows(out) == rows(want)
        assert len(rows(out)) == n
        figures.append(f"{done} kills took place; unbroken run {took:.1f} s")
        assert done > kills // 2, f"only {done} kills took place"
    with report.check("SIGTERM commits what is done; what is committed is not scored again"):
        out = work / "stopped"
        process = subprocess.Popen([*score.line, "--output-dir", str(out), "--part-rows", str(part), str(images)], stderr=subprocess.PIPE, text=True)
        time.sleep(took / 2)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130 and "continue with --resume" in said, (process.returncode, said)
        before = rows(out)
        assert 0 < len(before) < n
        said = score("--output-dir", out, "--part-rows", part, "--resume", images).stderr
        assert f"{len(before)} that already had a row" in said, said
        assert rows(out) == rows(want)
        said = score("--output-dir", out, images, status=1).stderr
        assert "--resume" in said, said
        said = score("--output-dir", out, "--resume", "--top-k", "2", images, status=1).stderr
        assert "columns" in said, said
    with report.check("SIGTERM ends a run whose list on stdin keeps silent"):
        process = subprocess.Popen([*score.line, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdin.write(f"{images}/000/000000.png\n")
        process.stdin.flush()
        time.sleep(1.5)
        process.send_signal(signal.SIGTERM)
        process.wait(10)
        assert process.returncode == 130 and len(process.stdout.read().splitlines()) == 1
    with report.check("4 shares in 4 processes are the whole"):
        out = work / "shares"
        started = [score.start("--output-dir", out, "--part-rows", part, "--shard", f"{i}/4", "--workers", "1", images) for i in range(4)]
        assert [process.wait() for process in started] == [0] * 4
        key = lambda row: row["path"]
        assert sorted(rows(out), key=key) == sorted(rows(want), key=key)
        counts = [sum(len(p.read_text().splitlines()) for p in out.glob(f"part-{i:05}-*")) for i in range(4)]
        assert min(counts) > n / 8, counts
    return want


def full(report, score, images, work, want):
    with report.check("a disk that fills midway; the run goes on elsewhere") as figures:
        disk, out = work / "disk", work / "elsewhere"
        disk.mkdir()
        line = [*score.line, "--probabilities", "--logits", "--part-rows", "500", str(images)]
        size = sum(p.stat().st_size for p in want.glob("part-*")) // 1024
        script = f"""
            mount -t tmpfs -o size={max(size // 2, 128)}k tmpfs {disk} || exit 90
            "$@" --output-dir {disk}/rows 2>{work}/full.err
            echo $? >{work}/full.status
            cp -r {disk}/rows {out}
        """
        done = subprocess.run(["unshare", "-rm", "sh", "-c", script, "sh", *line], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said = (work / "full.err").read_text()
        assert (work / "full.status").read_text().strip() == "1", said
        assert "no space left for" in said and "bytes are free" in said and "--resume" in said, said
        before = rows(out)
        assert before and f"{len(before)} rows are committed" in said, (len(before), said)
        assert not list(out.glob(".part-*")), "an unfinished part was left"
        score(*line[len(score.line):], "--output-dir", out, "--resume")
        got = rows(out)
        assert [r["path"] for r in got] == [r["path"] for r in rows(want)]
        figures.append(f"{len(before)} of {len(got)} rows fitted")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path)
    parser.add_argument("--model", type=Path, default=Path("models/cifar10-lt"))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--bad", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=8)
    options = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        options.cache = work / "cache"
        score = Score(options)
        images = work / "images"
        pictures(images, options.images)
        few = work / "few"
        pictures(few, options.bad)
        forms(report, score, few, work)
        sources(report, score, few, work)
        objects(report, score, few, work)
        bad(report, score, few, work, options.bad)
        want = killed(report, score, images, work, options.images, options.kills)
        full(report, score, images, work, want)
    raise SystemExit(report.end())


if __name__ == "__main__":
    main()
