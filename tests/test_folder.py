"""folder.py and decoded.py: folders as people have them, listed with their captions, and decoded once."""

import hashlib
import json
import os
import re
import shutil
import socket
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import DAMAGE, EPS, RED, captioned, colours, contents, count_reads, damage, picture
from PIL import EpsImagePlugin, Image

import decoded
from decoded import open_pictures
from files import digest, read_stamp
from folder import crop_places, list_folder, natural, split_rows
from pictures import open_image
from ragged import Strings, key_of, places


def opened(path, cache, size=(8, 8)):
    """The pictures of a folder, decoded."""
    return open_pictures(list_folder(Path(path)), size, cache)


# ---- captions

def test_captions_beside_pictures(tmp_path):
    captioned(tmp_path / "a", ["none", "two \n words  緑", ""])
    folder = list_folder(tmp_path / "a", "captions")
    assert [path.name for path in folder.pictures] == ["0.png", "1.png", "2.png"]
    assert folder.words == ["none", "two words 緑", ""] and folder.labels is None and folder.classes == []
    assert list_folder(tmp_path / "a").words is None                       # not asked for
    (tmp_path / "a/1.txt").write_text("a red circle", "utf-8-sig")         # as Notepad does
    assert list_folder(tmp_path / "a", "captions").words == ["none", "a red circle", ""]
    (tmp_path / "a/1.txt").write_text("a red circle", "utf-16")
    with pytest.raises(ValueError, match="1.txt: not in UTF-8"):
        list_folder(tmp_path / "a", "captions")
    captioned(tmp_path / "b", ["x", None, "y"])
    with pytest.raises(ValueError, match="1 of 3 pictures have no caption, such as .*1.png"):
        list_folder(tmp_path / "b", "captions")


def test_pictures_without_words(tmp_path):
    captioned(tmp_path / "flat", [None, None])
    with pytest.raises(ValueError, match="pictures without words; put NAME.txt beside each, or metadata"):
        list_folder(tmp_path / "flat", "captions")
    with pytest.raises(ValueError, match="0.npz beside its picture, as --text-encoder none needs"):
        list_folder(tmp_path / "flat", "embeddings")
    captioned(tmp_path / "classes/green-thing", [None, None])
    assert list_folder(tmp_path / "classes", "captions").words is None     # class names must serve


def test_vectors_beside_pictures(tmp_path):
    captioned(tmp_path / "p", [None, None])
    for i in range(2):
        (tmp_path / f"p/{i}.npz").touch()
    folder = list_folder(tmp_path / "p", "embeddings")
    assert folder.words == [str(tmp_path / f"p/{i}.npz") for i in range(2)]
    assert folder.root == str(tmp_path / "p")


def test_captions_in_metadata(tmp_path):
    """It goes before files beside the pictures, and may lie in any folder."""
    captioned(tmp_path / "a", ["beside", "beside"])
    rows = [json.dumps({"file_name": f"{i}.png", "text": f"line  {i}"}) for i in range(2)]
    (tmp_path / "a/metadata.jsonl").write_text("\n".join(rows) + "\n\n")
    assert list_folder(tmp_path / "a", "captions").words == ["line 0", "line 1"]
    captioned(tmp_path / "b/class", [None, None])
    (tmp_path / "b/class/metadata.jsonl").write_text("\n".join(rows))
    assert list_folder(tmp_path / "b", "captions").words == ["line 0", "line 1"]
    (tmp_path / "b/class/metadata.jsonl").write_text(json.dumps({"file_name": "no.png", "text": "x"}))
    with pytest.raises(ValueError, match="2 of 2 pictures have no caption"):
        list_folder(tmp_path / "b", "captions")


@pytest.mark.parametrize("content, captions", [
    (b"file_name,text\n0.png,zero\n1.png,one\n", ["zero", "one"]),
    (b"\xef\xbb\xbftext,file_name,more\r\n\"a, b\",0.png,x\r\n\"two\nlines\",1.png,\r\n",
     ["a, b", "two lines"]),
    ("file_name,text\n0.png,\u7dd1\n\n1.png,\n".encode(), ["\u7dd1", ""]),
    (b"file_name,text\n0.png,zero,\n1.png," + b"x" * 200_000, ["zero", "x" * 200_000]),
])
def test_metadata_csv(tmp_path, content, captions):
    captioned(tmp_path / "p", [None, None])
    (tmp_path / "p/metadata.csv").write_bytes(content)
    assert list_folder(tmp_path / "p", "captions").words == captions
    (tmp_path / "p/metadata.jsonl").write_text('{"file_name": "1.png", "text": "of the other"}')
    assert list_folder(tmp_path / "p", "captions").words == [captions[0], "of the other"]


NO_COLUMNS = "; it must name the columns file_name and text, separated by commas"


@pytest.mark.parametrize("name, content, message", [
    ("csv", b"name,text\n0.png,zero\n", ": its first line is 'name,text'" + NO_COLUMNS),
    ("csv", b"file_name;text\n0.png;zero\n", ": its first line is 'file_name;text'" + NO_COLUMNS),
    ("csv", b"0.png,zero\n", ": its first line is '0.png,zero'" + NO_COLUMNS),
    ("csv", b"file_name\n", ": its first line is 'file_name'" + NO_COLUMNS),
    ("csv", b"file_name,text\n0.png\n", ", line 2: has no text"),
    ("csv", b"file_name,text\n0.png,a red, round ball\n", ", line 2: has more columns than the first line"),
    ("csv", b"file_name,text\n0.png,\xff\xfe\n", ": not in UTF-8; save it"),
    ("csv", b"file_name,text\n0.png,caf\xe9\n", ": not in UTF-8; save it"),
    ("csv", b"file_name,text\n0.png," + b"x" * (2**24 + 1), ", line 1: field larger than field limit"),
    ("jsonl", b"[" * 100_000, ", line 1: not an"), ("jsonl", b"[1]", ", line 1: not an"),
    ("jsonl", b"3", ", line 1: not an"), ("jsonl", b'{"file_name": 3, "text": "x"}', ", line 1: not an"),
    ("jsonl", b'{"file_name": "0.png", "text": null}', ", line 1: not an"),
    ("jsonl", b'{"file_name": "0.png", "text": ["a"]}', ", line 1: not an"),
    ("jsonl", b'{"file_name": "0.png", "text": "x"}\r\n\r\n{"text": 3}', ", line 3: not an"),
    ("jsonl", b"\xff\xfe{", ": not in UTF-8; save it")])
def test_bad_metadata_is_one_line_with_its_name(tmp_path, name, content, message):
    captioned(tmp_path / "p", [None])
    (tmp_path / f"p/metadata.{name}").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"metadata.{name}{message}")) as error:
        list_folder(tmp_path / "p", "captions")
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400


@pytest.mark.parametrize("name, content", [("metadata.csv", "file_name,text\n0.png,zero\nzz.png,x\n"),
                                           ("metadata.jsonl", '{"file_name": "zz.png", "text": "x"}')])
def test_metadata_that_names_other_pictures_is_said(tmp_path, name, content):
    captioned(tmp_path / "p", [None, None])
    (tmp_path / "p" / name).write_text(content)
    with pytest.raises(ValueError, match=f"or into {name}, which names 1 picture not there, such as zz.png$"):
        list_folder(tmp_path / "p", "captions")


@pytest.mark.parametrize("name", ["0.txt", "metadata.csv", "metadata.jsonl"])
def test_words_that_may_not_be_read_are_named(tmp_path, monkeypatch, name):
    captioned(tmp_path / "p", [None])
    (tmp_path / "p" / name).write_text("x")
    plain = Path.open

    def refuse(path, *args, **options):                         # the superuser may read everything
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=rf"p/{name}: cannot be read \(Permission denied\)$"):
        list_folder(tmp_path / "p", "captions")


# ---- what real folders hold

def test_bad_folders(tmp_path, capsys):
    (tmp_path / "p").mkdir()
    with pytest.raises(ValueError, match="no pictures in this folder .*never PostScript"):
        list_folder(tmp_path / "p")
    (tmp_path / "p/a.png").write_bytes(b"")
    for count, what in enumerate(("its one picture cannot", "none of its 2 pictures can"), 1):
        with pytest.raises(ValueError, match=f"p: {what} be used$"):
            opened(tmp_path / "p", tmp_path / "cache")
        assert not (tmp_path / "cache").exists()                # nothing is created for nothing
        error = capsys.readouterr().err
        assert error.count("\n") == count
        assert "p/a.png: not a picture of a format that is opened (PNG, JPEG, WEBP, GIF, ...)\n" in error
        (tmp_path / "p/b.png").write_bytes(b"\x1b[31m")
    picture(tmp_path / "p/sub/b.png")
    with pytest.raises(ValueError, match="a.png lies beside class folders"):
        list_folder(tmp_path / "p")


@pytest.mark.parametrize("name, content", [
    ("a.png", EPS), ("a.jpg", EPS.replace(b" EPSF-3.0", b"")),
    ("a.tif", b"\xc5\xd0\xd3\xc6" + bytes(28) + EPS),
    ("a.png", b"%PDF-1.4\n"), ("a.bmp", b"\xd7\xcd\xc6\x9a" + bytes(40)), ("a.webp", b"GRIB" + bytes(40)),
    ("a.eps", EPS), ("a.ps", EPS), ("a.wmf", b"\xd7\xcd\xc6\x9a" + bytes(40))])
def test_pictures_start_no_program(tmp_path, monkeypatch, capsys, name, content):
    """PostScript and its relatives are not opened, whatever the file is called."""
    def started(*args, **options):
        raise AssertionError("a program was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    monkeypatch.setattr("subprocess.Popen", started)
    picture(tmp_path / "p" / "b.png")
    (tmp_path / "p" / name).write_bytes(content)
    with pytest.raises(ValueError, match="not a picture of a format that is opened"):
        open_image(tmp_path / "p" / name, (8, 8))
    assert colours(opened(tmp_path / "p", tmp_path / "cache").images) == [RED]
    assert f"p/{name}" in capsys.readouterr().err


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))              # the name of a socket has a short limit


def make_device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.skipif(os.name == "nt", reason="no such files")
@pytest.mark.parametrize("make", [make_pipe, make_socket, make_device])
@pytest.mark.parametrize("name", ["1.png", "2.txt", "metadata.jsonl", "metadata.csv", "clip"])
def test_what_is_no_file_is_named_and_not_read(tmp_path, monkeypatch, capsys, make, name):
    """Reading a pipe or /dev/zero would never end."""
    monkeypatch.chdir(tmp_path)
    captioned(tmp_path / "p", ["one", None, "three"][:2 if name == "1.png" else 3])
    if name == "1.png":
        (tmp_path / "p/1.png").unlink()
    else:
        (tmp_path / "p/1.txt").write_text("two")
        (tmp_path / "p/2.txt").unlink()
        (tmp_path / "p/2.txt").write_text("three")
    (tmp_path / "p" / name).unlink(missing_ok=True)
    make(tmp_path / "p" / name)
    if name == "2.txt":
        with pytest.raises(ValueError, match="1 of 3 pictures have no caption, such as .*2.png"):
            list_folder(Path("p"), "captions")
    else:
        words = ["one"] if name == "1.png" else ["one", "two", "three"]
        assert list_folder(Path("p"), "captions").words == words
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"p/{name}: a pipe, socket or device" in error
    with pytest.raises(ValueError, match="a folder, pipe, socket or device"):
        open_image(tmp_path / "p" / name, (8, 8))


def test_links_are_followed_once(tmp_path, capsys):
    """Class folders and pictures that are links; links in a circle, out of the folder and to nothing."""
    picture(tmp_path / "store/cats/deep/1.png", (10, 10, 10))
    picture(tmp_path / "store/cats/2.png", (20, 20, 20))
    picture(tmp_path / "store/one.png", (30, 30, 30))
    picture(tmp_path / "p/dogs/1.png", (40, 40, 40))
    picture(tmp_path / "p/dogs/9.png", (50, 50, 50))
    for name, target in {"p/cats": "store/cats", "p/dogs/2.png": "store/one.png", "p/dogs/self": "p/dogs",
                         "p/dogs/up": "p", "p/dogs/top": ".", "store/cats/back": "store/cats",
                         "p/more-dogs": "p/dogs", "p/twice": "store/cats", "p/dogs/3.png": "nothing.png",
                         "p/gone": "nothing"}.items():
        (tmp_path / name).symlink_to((tmp_path / target).resolve())
    folder = list_folder(tmp_path / "p")
    assert folder.classes == ["cats", "dogs"] and folder.labels.tolist() == [0, 0, 1, 1, 1]
    assert [path.name for path in folder.pictures] == ["2.png", "1.png", "1.png", "2.png", "9.png"]
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for name in ("dogs/self", "dogs/up", "dogs/top", "more-dogs", "twice", "dogs/3.png", "gone"):
        assert f"p/{name}: " in error, name
    (tmp_path / "whole").symlink_to(tmp_path / "p")
    assert list_folder(tmp_path / "whole").labels.tolist() == folder.labels.tolist()
    found = opened(tmp_path / "whole", tmp_path / "cache").images
    assert [colour[0] for colour in colours(found)] == [20, 10, 40, 30, 50]


LITTER = [".ipynb_checkpoints/a.png", "__MACOSX/a.png", "cat/@eaDir/a.png", "cat/._1.png", ".Trash/a.png",
          "$RECYCLE.BIN/a.png", "lost+found/a.png", ".thumbnails/a.png", "cat/.hidden.png", "#recycle/a.png",
          "@Recycle/a.png", "@tmp/a.png", "#snapshot/a.png", "cat/__pycache__/a.png"]


@pytest.mark.parametrize("name", LITTER)
def test_hidden_and_system_files_are_ignored(tmp_path, capsys, name):
    picture(tmp_path / "p/cat/1.png")
    picture(tmp_path / "p" / name, (1, 2, 3))
    for silent in (".DS_Store", "cat/Thumbs.db", "cat/desktop.ini", ".gitignore"):
        (tmp_path / "p" / silent).write_bytes(b"x")
    folder = list_folder(tmp_path / "p")
    assert folder.classes == ["cat"] and [path.name for path in folder.pictures] == ["1.png"]
    error = capsys.readouterr().err
    shown = name.removesuffix("/a.png")
    assert error.count("\n") == 1
    assert f"ignored as hidden or left by a system: {tmp_path}/p/{shown}\n" in error
    picture(tmp_path / "p/@home/1.png")                         # a class, as are other names like these
    assert list_folder(tmp_path / "p").classes == ["@home", "cat"]
    picture(tmp_path / ".hidden/cat/1.png")                     # unless it is the folder that was asked for
    assert list_folder(tmp_path / ".hidden").classes == ["cat"]


def test_what_is_left_out_is_told_in_one_line(tmp_path, capsys):
    for i in range(500):
        (tmp_path / f"p/.{i}").mkdir(parents=True)
    picture(tmp_path / "p/1.png")
    list_folder(tmp_path / "p")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "and 488 more" in error and len(error) < 2000


@pytest.mark.parametrize("unreadable", ["p/b", "p/a/deep", "p/c"])
def test_folders_that_may_not_be_read_are_named(tmp_path, monkeypatch, capsys, unreadable):
    for name in ("a/1", "a/deep/1", "b/1", "c/1", "d/1"):
        picture(tmp_path / f"p/{name}.png")
    plain = os.listdir

    def listdir(path):                                          # the superuser may read everything
        if str(path) == str(tmp_path / unreadable):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "listdir", listdir)
    folder = list_folder(tmp_path / "p")
    assert len(folder.pictures) == 4
    assert f"{tmp_path / unreadable}: Permission denied" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"p/.*: this folder may not be read \(Permission denied\)"):
        list_folder(tmp_path / unreadable)


def test_a_folder_that_may_be_listed_but_not_entered_is_named(tmp_path, monkeypatch, capsys):
    for name in ("a/1", "a/2", "b/1"):
        picture(tmp_path / f"p/{name}.png")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "p/a")
    plain = Path.stat

    def closed(path, **options):                                # the superuser may enter everything
        if path.parent == tmp_path / "p/a":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, **options)

    monkeypatch.setattr(Path, "stat", closed)
    assert colours(opened(tmp_path / "p", tmp_path / "cache").images) == [RED]
    assert capsys.readouterr().err.startswith(f"--data {tmp_path}/p: skipped: {tmp_path}/p/a: it may be "
                                              "listed, but not entered\n")
    monkeypatch.setattr(os, "access", lambda path, mode: True)  # where that is not known beforehand
    assert colours(opened(tmp_path / "p", tmp_path / "cache2").images) == [RED]
    assert "p/a/2.png: Permission denied" in capsys.readouterr().err


def test_a_picture_that_is_removed_after_the_listing_is_skipped(tmp_path, capsys):
    for name in "ab":
        picture(tmp_path / f"p/{name}.png")
    folder = list_folder(tmp_path / "p")
    (tmp_path / "p/b.png").unlink()
    assert open_pictures(folder, (8, 8), tmp_path / "cache").keep.tolist() == [0]
    assert "p/b.png: No such file" in capsys.readouterr().err


def test_profiles_that_cannot_be_used_are_told_in_one_line(tmp_path, capsys):
    for i in range(20):
        picture(tmp_path / f"p/{i:02d}.png", icc_profile=b"no profile")
    opened(tmp_path / "p", tmp_path / "cache")
    error = [line for line in capsys.readouterr().err.splitlines() if "profile cannot be used" in line]
    assert len(error) == 1 and "p/00.png: " in error[0] and error[0].endswith("and 8 more")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_in_utf_8(tmp_path):
    """As of pictures and folders from another system; the names of others give what they always gave."""
    name = os.fsdecode(b"caf\xe9")
    picture(tmp_path / "p" / name / f"{name}.png").with_suffix(".txt").write_text("one")
    picture(tmp_path / "p/a/b.png")
    row = json.dumps({"file_name": "b.png", "text": "two"})
    (tmp_path / "p/a/metadata.jsonl").write_text(row)
    folder = list_folder(tmp_path / "p", "captions")
    assert folder.classes == ["a", name] and folder.words == ["two", "one"]
    found = open_pictures(folder, (8, 8), tmp_path / "cache", crops=2)
    again = open_pictures(folder, (8, 8), tmp_path / "cache", crops=2)
    assert len(found.images) == 4 and again.fingerprint == found.fingerprint
    want = np.random.default_rng(list("\u7dd1".encode())).random()
    assert crop_places("\u7dd1", 2) == [0.5, want]
    (tmp_path / "p/a/metadata.jsonl").unlink()
    shutil.move(tmp_path / "p" / name / f"{name}.png", tmp_path / "p" / name / f"{name}2.png")
    row = json.dumps({"file_name": f"{name}2.png", "text": "x"})
    (tmp_path / "p" / name / "metadata.jsonl").write_text(row)
    with pytest.raises(ValueError, match="1 of 2 pictures have no caption, such as .*a/b.png"):
        list_folder(tmp_path / "p", "captions")


def test_pictures_that_may_not_be_read_are_named(tmp_path, monkeypatch, capsys):
    for name in ("a/1", "a/2", "b/1"):
        picture(tmp_path / f"p/{name}.png")
    plain = open

    def refuse(path, *args, **options):
        if str(path).endswith(("a/2.png", "b/1.png")):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *args, **options)

    monkeypatch.setattr("builtins.open", refuse)
    found = opened(tmp_path / "p", tmp_path / "cache")
    error = capsys.readouterr().err
    assert found.keep.tolist() == [0] and colours(found.images) == [RED]
    assert "a/2.png" in error and "b/1.png" in error and error.endswith("can be used: b\n")


@pytest.mark.parametrize("names, order", [
    (["1", "10", "11", "2"], ["1", "2", "10", "11"]), (["a10", "a9", "b1"], ["a9", "a10", "b1"]),
    (["v1.10", "v1.9", "v1"], ["v1", "v1.9", "v1.10"]), (["01", "1", "001"], ["001", "01", "1"]),
    (["cat", "7", "-", "x2y"], ["7", "-", "cat", "x2y"]),
    (["\u0663", "10", "\u00b2"], ["\u0663", "10", "\u00b2"])])
def test_classes_sort_naturally(tmp_path, names, order):
    for name in names:
        for i in (10, 9):
            picture(tmp_path / "p" / name / f"{i}.png")
    folder = list_folder(tmp_path / "p")
    assert folder.classes == order
    for path, label in zip(folder.pictures, folder.labels, strict=True):
        assert path.parent.name == order[label]


# ---- the split

@pytest.mark.parametrize("counts, held_out", [
    ([1, 1, 1], None), ([1, 30, 2], [0, 2, 1]), ([40, 41, 1], [2, 3, 0]), ([1, 2], [0, 1]), ([1], None),
    ([2], [1]), ([6000], [256]), ([5000, 1000, 1], [None, None, 0])])
def test_validation_is_taken_per_class(counts, held_out):
    labels = np.repeat(np.arange(len(counts)), counts)
    train, val = split_rows(len(labels), labels)
    left = np.bincount(labels[train], minlength=len(counts))
    assert (left > 0).all() and 0 < len(val) <= 256
    if held_out is None:                                        # nothing to spare: all serve for both
        assert len(train) == len(labels)
        return
    assert sorted([*train, *val]) == list(range(len(labels)))
    found = np.bincount(labels[val], minlength=len(counts))
    assert all(want in (None, count) for want, count in zip(held_out, found))
    if counts[0] == 5000:                                       # the limit is shared by all classes
        assert len(val) == 256 and abs(found[0] / found[1] - 5) < 0.2


@pytest.mark.parametrize("count", [1, 2, 20, 21, 100, 6000])
def test_a_flat_folder_is_split_as_ever(count):
    train, val = split_rows(count, None)
    assert val.tolist() == list(range(count))[::20][:256]
    assert train.tolist() == ([0] if count == 1 else [i for i in range(count) if i not in set(val.tolist())])


# ---- crops

def test_places_of_crops():
    """The first is the centre; each of the others lies at random in a part of its own, by the name alone."""
    assert crop_places("a.png", 1) == [0.5]
    places = np.array([crop_places(f"{i}.png", 4) for i in range(300)])
    assert (places[:, 0] == 0.5).all()
    for part in range(3):
        inside = 3 * places[:, part + 1] - part
        assert 0 <= inside.min() < 0.1 < 0.9 < inside.max() < 1 and abs(inside.mean() - 0.5) < 0.06
    assert crop_places("7.png", 4) == places[7].tolist() != crop_places("70.png", 4)


def test_several_crops_of_each_picture(tmp_path):
    ramp = np.zeros((8, 64, 3), np.uint8) + 4 * np.arange(64, dtype=np.uint8)[:, None]
    (tmp_path / "p").mkdir()
    for name in ("a", "c"):
        Image.fromarray(ramp).save(tmp_path / f"p/{name}.png")
    (tmp_path / "p/b.png").write_bytes(b"broken")
    folder = list_folder(tmp_path / "p")
    found = open_pictures(folder, (8, 8), tmp_path / "cache", crops=3)
    assert found.keep.tolist() == [0, 2] and found.images.shape == (6, 8, 8, 3) and found.former is None
    for i, name in enumerate(("a.png", "c.png")):
        for k, place in enumerate(crop_places(name, 3)):                       # 56 pixels are cut off
            assert abs(found.images[3 * i + k, 0, 0, 0] - 4 * 56 * place) <= 4
    again = open_pictures(folder, (8, 8), tmp_path / "cache", crops=3)         # from the cache
    assert (again.images == found.images).all() and again.fingerprint == found.fingerprint
    centre = open_pictures(folder, (8, 8), tmp_path / "cache")
    assert (centre.images == found.images[::3]).all() and centre.fingerprint != found.fingerprint


# ---- fingerprints and the cache of decoded pictures

def make_some(folder):
    rng = np.random.default_rng(0)
    for i in range(6):
        path = folder / f"{'ab'[i % 2]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path, compress_level=0)


def fingerprint(path, cache):
    """What is found twice, as for the parts for training and for validation."""
    first, second = (opened(path, cache).fingerprint for _ in range(2))
    assert first == second
    return first


def test_the_same_bytes_are_the_same_data(tmp_path, monkeypatch):
    """Copied, touched, moved, by another path: not decoded again, and read again only where times differ."""
    monkeypatch.chdir(tmp_path)
    make_some(tmp_path / "p")
    want = fingerprint("p", tmp_path / "cache")
    calls = count_reads(monkeypatch)
    for name in ("p", "p/", "./p", str(tmp_path / "p"), "p/../p"):
        assert fingerprint(name, tmp_path / "cache") == want and not calls, name
    shutil.copytree("p", "copy", copy_function=shutil.copyfile)
    assert fingerprint("copy", tmp_path / "cache") == want
    assert len(calls) == 6                                          # each hashed once, none decoded
    calls.clear()
    for path in (tmp_path / "copy").rglob("*.png"):
        os.utime(path, (1, 1))
    assert fingerprint("copy", tmp_path / "cache") == want and len(calls) == 6
    (tmp_path / "copy").rename(tmp_path / "moved")
    assert fingerprint("moved", tmp_path / "cache") == want
    assert fingerprint("moved", tmp_path / "other-cache") == want    # and without a cache as well


def edit_one(folder):
    path = folder / "a/2.png"
    raw = bytearray(path.read_bytes())
    times = path.stat()
    Image.fromarray(np.full((8, 8, 3), 7, np.uint8)).save(path, compress_level=0)
    assert path.stat().st_size == len(raw)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))       # size and time as before


def swap_two(folder):
    (folder / "a/0.png").rename(folder / "x")
    (folder / "a/2.png").rename(folder / "a/0.png")
    (folder / "x").rename(folder / "a/2.png")


@pytest.mark.parametrize("change", [
    edit_one, swap_two, lambda folder: picture(folder / "a/9.png"),
    lambda folder: (folder / "b/1.png").unlink(), lambda folder: (folder / "a").rename(folder / "c"),
    lambda folder: (folder / "b/1.png").write_bytes(b"broken")])
def test_other_pictures_are_other_data(tmp_path, change):
    make_some(tmp_path / "p")
    before = fingerprint(tmp_path / "p", tmp_path / "cache")
    change(tmp_path / "p")
    after = fingerprint(tmp_path / "p", tmp_path / "cache")
    assert before != after
    assert fingerprint(tmp_path / "p", tmp_path / "new-cache") == after
    kept, fresh = (opened(tmp_path / "p", tmp_path / cache) for cache in ("cache", "new-cache"))
    assert (kept.images == fresh.images).all() and (kept.keep == fresh.keep).all()


@pytest.mark.parametrize("place", [0, 0.3, 0.5, 0.99])
def test_large_files_are_compared_at_many_places(tmp_path, place):
    content = bytearray(9 << 20)
    (tmp_path / "a").write_bytes(content)
    start = int(place * len(content)) // 65536 * 65536
    content[start:start + 400_000] = b"x" * len(content[start:start + 400_000])
    (tmp_path / "b").write_bytes(content)
    assert decoded._hash_content(tmp_path / "a") != decoded._hash_content(tmp_path / "b")
    assert decoded._hash_content(tmp_path / "missing") == "unreadable"


def test_the_cache_of_other_pictures_is_rebuilt(tmp_path):
    picture(tmp_path / "p/a.png")
    first = opened(tmp_path / "p", tmp_path / "cache")
    picture(tmp_path / "p/a.png", (0, 0, 255))
    second = opened(tmp_path / "p", tmp_path / "cache")
    assert colours(first.images) == [RED] and colours(second.images) == [(0, 0, 255)]
    assert first.fingerprint != second.fingerprint
    third = opened(tmp_path / "p", tmp_path / "cache", size=(4, 8))
    assert third.images.shape == (1, 4, 8, 3) and third.fingerprint != second.fingerprint


@pytest.mark.parametrize("how", [*DAMAGE, "few rows"])
@pytest.mark.parametrize("name", ["images.npy", "images.json", "images.about.npy"])
def test_a_damaged_cache_of_pictures_is_rebuilt(tmp_path, capsys, name, how):
    make_some(tmp_path / "p")
    want = colours(opened(tmp_path / "p", tmp_path / "cache").images)
    if how == "few rows":
        np.save(tmp_path / "cache/images.npy", np.load(tmp_path / "cache/images.npy")[:3])
    else:
        damage(tmp_path / "cache" / name, how)
    assert colours(opened(tmp_path / "p", tmp_path / "cache").images) == want
    if name != "images.json":
        state = "missing" if how == "missing" else "damaged"
        name = "images.npy" if how == "few rows" else name
        assert f"{name} is {state}: rebuilding it" in capsys.readouterr().out
    assert contents(tmp_path / "cache") == {"images.npy", "images.json", "images.about.npy", "images.lock"}


@pytest.mark.parametrize("field, value", [
    ("keep", None), ("keep", []), ("keep", {}), ("keep", [0, 99]), ("keep", [-1]), ("keep", ["0"]),
    ("keep", [1, 0]), ("keep", 3), ("files", []), ("files", {"a/0.png": 3}), ("files", None),
    ("fingerprint", None), ("fingerprint", 3), ("former", 3), ("pictures", None), ("pictures", 3),
    ("pictures", "x"), ("sizes", None), ("sizes", [])])
def test_an_edited_stamp_does_no_harm(tmp_path, field, value):
    make_some(tmp_path / "p")
    want = colours(opened(tmp_path / "p", tmp_path / "cache").images)
    stamp = read_stamp(tmp_path / "cache/images.json") | {field: value}
    (tmp_path / "cache/images.json").write_text(json.dumps(stamp))
    assert colours(opened(tmp_path / "p", tmp_path / "cache").images) == want


def test_an_interrupted_decoding_leaves_nothing(tmp_path, monkeypatch):
    make_some(tmp_path / "p")

    calls, plain = [], decoded.read_image

    def interrupt(*args, **options):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(*args, **options)

    monkeypatch.setattr(decoded, "read_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path / "p", tmp_path / "cache")
    assert contents(tmp_path / "cache") == {"images.lock"}


# ---- millions of pictures

def test_strings_in_one_piece():
    strings = ["b", "", "\u7dd1", "a\udce9", "b"]
    found = Strings.of(iter(strings))
    assert found == strings and list(found) == strings
    assert found != strings[:4] and found != [*strings[:4], "c"]
    assert found[-2] == "a\udce9" and found[1:4] == strings[1:4]
    assert found[np.array([4, 2])] == ["b", "\u7dd1"]
    assert len(found.flat) == 1 + 0 + 3 + 4 + 1 and Strings.of([]) == []
    with pytest.raises(IndexError):
        found[5]
    for part in (strings, [], [("a", 1)], ["x"]):
        assert digest("y", iter(part), 3) == digest("y", part, 3)
    keys = np.array([key_of(string) for string in strings[:4]], np.uint64)
    assert places(keys[[3, 0]], keys).tolist() == [3, 0] and places(keys, keys[:0]).tolist() == [-1] * 4
    assert places(keys, keys[[2, 1]]).tolist() == [-1, 1, 0, -1]


ODD = ["a", "b", "1", "10", "2", "-", ".", " ", "~", "A", "\u7dd1", "\ue000", "\U0001f600"]
if sys.platform == "linux":
    ODD.append(os.fsdecode(b"\xe9"))


def grow(root, rng, count=60):
    """A tree of odd names, with a caption beside each picture that is its path."""
    folders = [root / "c", root / "c 2", root / "c10", root / "c.9"]
    for i in range(count):
        if i % 5 == 0:
            folders.append(folders[rng.integers(len(folders))] / f"d{''.join(rng.choice(ODD, 2))}")
        folder = folders[rng.integers(len(folders))]
        path = folder / f"x{''.join(rng.choice(ODD, 3))}{rng.choice(['.png', '.JPG', '.x.bmp'])}"
        if not path.exists():
            picture(path.with_name("x.png"), (i, 0, 0)).rename(path)
            path.with_suffix(".txt").write_bytes(os.fsencode(path.relative_to(root)).replace(b"\xe9", b"?"))


@pytest.mark.parametrize("seed", range(6))
def test_the_order_is_that_of_sorted_paths(tmp_path, seed):
    """Within each class, and classes by number, as in every earlier version."""
    root = tmp_path / "p"
    grow(root, np.random.default_rng(seed))
    folder = list_folder(root, "captions")
    want = sorted(path for path in root.rglob("*.*") if path.is_file() and path.suffix != ".txt")
    classes = sorted({path.relative_to(root).parts[0] for path in want}, key=natural)
    want = [path for name in classes for path in want if path.relative_to(root).parts[0] == name]
    assert list(folder.pictures) == want and folder.classes == classes and len(want) > 40
    assert [classes[label] for label in folder.labels] == [path.relative_to(root).parts[0] for path in want]
    captions = [os.fsencode(path.relative_to(root)).replace(b"\xe9", b"?").decode() for path in want]
    captions = [" ".join(caption.split()) for caption in captions]
    assert [os.path.dirname(caption) for caption in folder.words] == list(map(os.path.dirname, captions))
    assert folder.pictures[3:7][1] == want[4] and folder.pictures[-1] == want[-1]
    assert list(folder.pictures[np.array([5, 0])]) == [want[5], want[0]]


@pytest.mark.parametrize("multiple, crops", [(None, 1), (None, 3), ((4, 4), 1)])
def test_a_cache_of_an_earlier_version_is_taken_over(tmp_path, monkeypatch, multiple, crops):
    """All in one stamp of JSON, an entry for each file: nothing is read or decoded again, and the fingerprint
    is what it was."""
    grow(tmp_path / "p", np.random.default_rng(1))
    folder = list_folder(tmp_path / "p")
    folder.pictures[3].write_bytes(b"broken")
    first = open_pictures(folder, (8, 8), tmp_path / "cache", crops, multiple)
    entries = {}
    for path in folder.pictures:
        about, content = path.stat(), hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        entries[path.relative_to(tmp_path / "p").as_posix()] = [about.st_size, about.st_mtime_ns,
                                                                about.st_ctime_ns, content]
    named = [(name, entry[0], entry[3]) for name, entry in entries.items()]
    want = digest("folder", "mixed", 64, multiple, named)
    if multiple is None:
        want = digest("folder", "content", (8, 8), named)
    assert first.fingerprint == (want if crops == 1 else digest(want, crops))
    assert first.keep.tolist() == [i for i in range(len(entries)) if i != 3]
    stamp_path = tmp_path / ("cache/images-4x4.json" if multiple else "cache/images.json")
    new = read_stamp(stamp_path)
    assert set(new) == {"fingerprint", "former", "pictures", "sizes"}
    old = {"fingerprint": first.fingerprint, "keep": first.keep.tolist(), "files": entries}
    if multiple is None:
        old["former"] = None
    else:
        old["shapes"] = [list(image.shape) for image in first.images]
    stamp_path.write_text(json.dumps(old))
    stamp_path.with_suffix(".about.npy").rename(tmp_path / "about.npy")
    calls = count_reads(monkeypatch)
    second = open_pictures(folder, (8, 8), tmp_path / "cache", crops, multiple)
    assert not calls and second.fingerprint == first.fingerprint and second.keep.tolist() == old["keep"]
    assert all((a == b).all() for a, b in zip(first.images, second.images, strict=True))
    assert read_stamp(stamp_path) == new                            # in the new form
    assert stamp_path.with_suffix(".about.npy").read_bytes() == (tmp_path / "about.npy").read_bytes()


def test_only_what_is_new_is_read(tmp_path, monkeypatch):
    """Among known pictures in another order; and a process that is killed while it notes new times leaves a
    cache that fits."""
    make_some(tmp_path / "p")
    opened(tmp_path / "p", tmp_path / "cache")
    picture(tmp_path / "p/a/10.png")
    picture(tmp_path / "p/0/1.png")
    calls = count_reads(monkeypatch)
    kept = opened(tmp_path / "p", tmp_path / "cache")
    assert sorted(path.name for path in calls[:2]) == ["1.png", "10.png"]
    assert len(calls) == 2 + 8                              # then all are decoded, in their new places
    assert kept.fingerprint == opened(tmp_path / "p", tmp_path / "new-cache").fingerprint
    for path in (tmp_path / "p").rglob("*.png"):
        os.utime(path, (1, 1))

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(decoded, "write_stamp", killed)
    monkeypatch.setattr(decoded, "read_image", killed)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path / "p", tmp_path / "cache")
    monkeypatch.undo()
    calls = count_reads(monkeypatch)
    assert (opened(tmp_path / "p", tmp_path / "cache").images == kept.images).all() and not calls


def test_the_first_of_many_broken_pictures_are_named_once(tmp_path, capsys):
    for i in range(300):
        (tmp_path / f"p/{i:03d}.png").parent.mkdir(exist_ok=True)
        (tmp_path / f"p/{i:03d}.png").write_bytes(b"broken")
    for found in range(2):
        if found:
            picture(tmp_path / "p/150.png")
            assert opened(tmp_path / "p", tmp_path / "cache").keep.tolist() == [150]
        else:
            with pytest.raises(ValueError, match="none of its 300 pictures can be used"):
                opened(tmp_path / "p", tmp_path / "cache")
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
        lines = [line for line in lines if "skipped" in line]
        names = [re.search("[0-9]+.png", line)[0] for line in lines[:-1]]
        assert names == [f"{i:03d}.png" for i in range(12)]
        assert lines[-1] == f"skipped {288 - found} more of 300 pictures, which cannot be used either"


def test_metadata_rows_are_matched_by_path(tmp_path):
    """The last row of a picture counts, whatever the order and the spelling."""
    captioned(tmp_path / "p/class", [None] * 4)
    rows = [("class/3.png", "three"), ("class/0.png", "first"), ("./class/1.png", "one"), ("none.png", "?"),
            ("class/0.png", "zero"), (str(tmp_path / "p/class/2.png"), "two"), ("class/../class/2.png", "?")]
    text = "\n".join(json.dumps({"file_name": name, "text": text}) for name, text in rows)
    (tmp_path / "p/metadata.jsonl").write_text(text)
    assert list_folder(tmp_path / "p", "captions").words == ["zero", "one", "two", "three"]
    picture(tmp_path / "p/class/4.png")
    with pytest.raises(ValueError, match="1 of 5 pictures .* names 2 pictures not there, such as 2.png$"):
        list_folder(tmp_path / "p", "captions")


@pytest.mark.long
def test_memory_per_picture(tmp_path, monkeypatch):
    """At rest and at the peak of every step. benchmarks/loading.py measures larger folders."""
    count = 3000
    image = Image.new("RGB", (2, 2))
    monkeypatch.setattr(decoded, "read_image", lambda *args: image)         # the slowest part
    monkeypatch.setattr(decoded, "_changes_colours", lambda path: False)
    monkeypatch.setattr(sys, "intern", lambda text: text)   # a table in which the parts of paths come and go
    first = picture(tmp_path / "p/class 0/00000.png")
    opened(tmp_path / "p", tmp_path / "small", (2, 2))                  # loads all that is loaded once
    for i in range(1, count):
        path = tmp_path / f"p/class {i // 1000}/{i:05d}.png"
        path.parent.mkdir(exist_ok=True)
        os.link(first, path)
    fixed = 20_000 / count                              # of tqdm, NumPy and open files
    tracemalloc.start()
    try:
        folder = list_folder(tmp_path / "p")
        listed = tracemalloc.get_traced_memory()
        peaks = []
        for multiple in (None, None, (1, 1), (1, 1)):                   # decodes, compares, at either form
            tracemalloc.reset_peak()
            found = open_pictures(folder, (2, 2), tmp_path / "cache", multiple=multiple)
            peaks.append(tracemalloc.get_traced_memory())
            assert len(found.keep) == count
    finally:
        tracemalloc.stop()
    names = folder.pictures.names
    assert len(names.flat) + names.starts.nbytes + folder.labels.nbytes == (17 + 8 + 4) * count
    assert listed[0] / count < 50 + fixed and listed[1] / count < 150 + fixed
    for now, peak in peaks:
        assert now / count < 100 + fixed and peak / count < 250 + fixed
    assert (tmp_path / "cache/images.about.npy").stat().st_size < 50 * count
