"""``robust-train manifest`` and ``robust-train verify``: verdicts, exit status, and errors of one line."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import TensorDataset

from robust_train.custody.command import manifest_main, verify_main
from robust_train.custody.manifest import Manifest


class Loader:
    """What the command line would load; ``data=bad`` cannot be."""

    def __init__(self):
        self.asked: list[list[str]] = []
        self.x = {name: torch.rand(20, 3, generator=torch.Generator().manual_seed(len(name))) for name in ("toy", "t2")}

    def __call__(self, overrides: list[str]) -> SimpleNamespace:
        self.asked.append(overrides)
        if "data=bad" in overrides:
            raise ValueError("data=bad: there is\nno such data set")
        x = self.x[overrides[0].partition("=")[2]]
        return SimpleNamespace(
            dataset=TensorDataset(x, torch.arange(20) % 2), label_of=lambda row: int(row[1]), schema=None
        )


@pytest.fixture
def load(tmp_path, monkeypatch) -> Loader:
    monkeypatch.chdir(tmp_path)
    return Loader()


@pytest.fixture
def images(tmp_path):
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(name.encode())
    return tmp_path / "images"


def status(main, load, *arguments: str) -> object:
    try:
        main(list(arguments), load)
    except SystemExit as stopped:
        return stopped.code
    return 0


def refused(capsys, main, load, *arguments: str) -> str:
    """The one line that it says."""
    assert status(main, load, *arguments) == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.count("\n") == 1
    return said.err


def test_a_dataset_is_recorded_and_verified(capsys, load):
    about = ["--source", "a shop", "--licence", "MIT", "--acquired", "2024-05-01"]
    assert status(manifest_main, load, "data=toy", *about, "seed=1") == 0
    recorded = Manifest.read("manifest.json")
    assert recorded.parts[0].arguments == ("data=toy", "seed=1")
    assert (recorded.source, recorded.licence, recorded.acquired) == ("a shop", "MIT", "2024-05-01")
    assert recorded.classes == {"0": 10, "1": 10}
    out = capsys.readouterr().out
    assert f"root     {recorded.root}\nrows     20\nclasses  0: 10, 1: 10\nwritten  manifest.json\n" == out

    assert status(verify_main, load, "manifest.json", "data=toy") == 0
    assert f"root  {recorded.root}\nrows  20\nEqual" in capsys.readouterr().out
    load.x["toy"][13, 1] += 1e-6
    assert status(verify_main, load, "manifest.json", "data=toy") == 1
    out = capsys.readouterr().out
    assert f"{recorded.root} recorded" in out
    assert "20 recorded, 20 found\nDIFFERENT:\nchanged   1 (13)\n" in out


def test_the_manifest_knows_its_data(capsys, load):
    manifest_main(["data=toy", "data.root=a/folder with spaces"], load)
    assert status(verify_main, load, "manifest.json") == 0
    assert load.asked == [["data=toy", "data.root=a/folder with spaces"]] * 2


def test_json(capsys, load):
    manifest_main(["data=toy"], load)
    load.x["toy"] = load.x["toy"][:19]
    capsys.readouterr()
    load.x["toy"] = torch.cat([load.x["toy"], torch.zeros(1, 3)])
    assert status(verify_main, load, "manifest.json", "--json", "data=toy") == 1
    said = json.loads(capsys.readouterr().out)
    assert said["changed"] == [{"row": 19}]
    assert said["recorded"]["count"] == said["found"]["count"] == 20
    assert said["recorded"]["root"] != said["found"]["root"]
    assert said["equal"] is False
    manifest_main(["data=t2", "--out", "other.json"], load)
    capsys.readouterr()
    assert status(verify_main, load, "--json", "other.json") == 0
    assert json.loads(capsys.readouterr().out)["equal"] is True


def test_rows_are_named_up_to_a_limit(capsys, load):
    manifest_main(["data=toy"], load)
    load.x["toy"][::2] += 1
    status(verify_main, load, "manifest.json", "--limit", "2")
    assert "changed   10 (0, 2, and 8 more)" in capsys.readouterr().out


def test_a_folder_is_recorded_and_verified(capsys, load, images):
    assert status(manifest_main, load, "--folder", "images", "--out", "images/manifest.json") == 0
    assert status(verify_main, load, "images/manifest.json") == 0  # the manifest itself is not part of the data
    assert status(verify_main, load, "images/manifest.json", "--folder", str(images)) == 0
    assert load.asked == []
    (images / "cat" / "2.png").write_bytes(b"tampered")
    (images / "dog" / "9.png").write_bytes(b"smuggled in")
    (images / "cat" / "1.png").unlink()
    capsys.readouterr()
    assert status(verify_main, load, "images/manifest.json") == 1
    out = capsys.readouterr().out
    assert "changed   1 (1 cat/2.png)\nappeared  1 (2 dog/9.png)\nvanished  1 (0 cat/1.png)" in out


def test_a_folder_and_its_manifest_may_move_together(load, images, tmp_path, monkeypatch):
    manifest_main(["--folder", "images", "--out", "m.json"], load)
    (tmp_path / "elsewhere").mkdir()
    images.rename(tmp_path / "elsewhere" / "images")
    (tmp_path / "m.json").rename(tmp_path / "elsewhere" / "m.json")
    assert status(verify_main, load, "elsewhere/m.json") == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert status(verify_main, load, "m.json") == 0


def test_rows_are_appended(capsys, load, images):
    manifest_main(["data=toy"], load)
    first = Manifest.read("manifest.json")
    manifest_main(["data=t2", "--append", "manifest.json", "--source", "may"], load)
    manifest_main(["--folder", "images", "--append", "manifest.json"], load)
    grown = Manifest.read("manifest.json")
    assert grown.count == 43
    assert grown.digests[:20] == first.digests
    assert [(part.kind, part.count, part.source) for part in grown.parts] == [
        ("dataset", 20, ""),
        ("dataset", 20, "may"),
        ("folder", 3, ""),
    ]
    assert status(verify_main, load, "manifest.json") == 0
    load.x["t2"][1] = 0
    capsys.readouterr()
    assert status(verify_main, load, "manifest.json") == 1
    assert "changed   1 (21)" in capsys.readouterr().out


def test_appending_leaves_the_old_manifest_where_another_name_is_given(load):
    manifest_main(["data=toy"], load)
    manifest_main(["data=t2", "--append", "manifest.json", "--out", "both.json"], load)
    assert Manifest.read("manifest.json").count == 20
    assert Manifest.read("both.json").count == 40


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name the data: either by overrides, such as data=fashion_mnist, or by --folder DIR"),
        (["data=toy", "--folder", "images"], "either by overrides"),
        (["--folder", "none"], "none is no folder"),
        (["data=bad"], "data=bad: there is no such data set"),
        (["data=toy", "--acquired", "May"], "part.acquired must be a day such as 2024-12-31, got 'May'"),
        (["data=toy", "--append", "none.json"], "none.json: there is no such file"),
        (["data=toy", "--out", "there.json"], "there.json exists: verify the data against it"),
        (["data=toy", "--out", "none/m.json"], "No such file"),
        (["data=toy", "--append", "there.json", "--out", "images/m.json"], "--out must lie in the folder of --append"),
        (["--folder", "images", "--append", "folder.json"], "folder.json has images already"),
        (["data=toy", "--colour", "red"], "unrecognized arguments: --colour"),
    ],
)
def test_what_cannot_be_recorded_is_one_line(capsys, load, images, arguments, says):
    manifest_main(["data=toy", "--out", "there.json"], load)
    manifest_main(["--folder", "images", "--out", "folder.json"], load)
    capsys.readouterr()
    assert says in refused(capsys, manifest_main, load, *arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the following arguments are required: MANIFEST"),
        (["none.json"], "none.json: there is no such file"),
        (["toy.json", "data=bad"], "data=bad: there is no such data set"),
        (["toy.json", "data=toy", "--folder", "images"], "not by both"),
        (["toy.json", "--folder", "none"], "none is no folder"),
        (["toy.json", "--limit", "0"], "--limit must be >= 1, got 0"),
        (["silent.json"], "silent.json does not say where its rows come from"),
        (["images/cat/1.png"], "1.png: "),
    ],
)
def test_what_cannot_be_verified_is_one_line(capsys, load, images, arguments, says):
    manifest_main(["data=toy", "--out", "toy.json"], load)
    Manifest.of([1, 2]).write("silent.json")
    capsys.readouterr()
    assert says in refused(capsys, verify_main, load, *arguments)


@pytest.mark.parametrize(
    "override",
    [
        "data._target_=os.system",
        "data={_target_: os.system}",
        "data.features._target_=my_module.f",
        "data.root=${oc.env:HOME}",
        "allow=[os]",
        "hydra.searchpath=[file:///tmp]",
        "--config-dir=/tmp",
        "data=../../elsewhere",
        "~data",
        "data.root=a\nallow=[os]",
    ],
)
def test_a_manifest_cannot_run_code(capsys, load, override):
    Manifest.of([1, 2], overrides=["data=toy", override]).write("strange.json")
    said = refused(capsys, verify_main, load, "strange.json")
    assert "which could run code: if you trust it, repeat its overrides on the command line" in said
    assert load.asked == []


def test_a_reader_that_leaves_changes_nothing(load):
    manifest_main(["data=toy"], load)
    code = (
        "import sys, types; from robust_train.custody.command import verify_main\n"
        "sys.stdin.read()\n"
        "data = types.SimpleNamespace(dataset=[1], label_of=None, schema=None)\n"
        "verify_main(['manifest.json', 'data=x'], lambda _: data)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_a_folder_needs_no_torch(load, images):
    code = (
        "import sys; from robust_train.custody.command import manifest_main, verify_main\n"
        "manifest_main(['--folder', 'images'], None); verify_main(['manifest.json'], None)\n"
        "print(*(m for m in ('torch', 'numpy', 'hydra') if m in sys.modules), 'end')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "end"


@pytest.mark.parametrize("main", [manifest_main, verify_main])
def test_help_has_an_example(capsys, load, main):
    assert status(main, load, "--help") == 0
    assert "examples: robust-train" in capsys.readouterr().out
