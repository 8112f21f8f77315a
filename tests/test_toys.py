"""toys.py: pictures are read back as drawn, and match their captions; benchmarks/scenes.py scores them."""

import os

import numpy as np
import pytest
from benchmarks.scenes import score_scene

import toys
from toys import (RELATIONS, SHAPE_CLASSES, UNSEEN_PAIRS, UNSEEN_RELATIONS, Scene, Thing, describe_scene,
                  draw_scene, draw_shape, omit_details, read_scene, read_shape, vary_caption)

SCENES = int(os.environ.get("SCENES", 2000))      # SCENES=9000 for the long version


def test_shapes_are_read_back_exactly():
    for i in range(2400):
        assert "-".join(read_shape(draw_shape(i))) == SHAPE_CLASSES[i % 24]
    for i in range(96):
        assert "-".join(read_shape(draw_shape(i, (48, 64)))) == SHAPE_CLASSES[i % 24]
        assert "-".join(read_shape(draw_shape(i, (8, 12)))) == SHAPE_CLASSES[i % 24]       # without a margin


def test_read_shape_survives_a_decoder_and_sees_a_wrong_picture():
    rng = np.random.default_rng(0)
    noisy = [np.clip(draw_shape(i) + rng.normal(0, 6, (32, 32, 3)), 0, 255).astype(np.uint8)
             for i in range(240)]
    assert np.mean(["-".join(read_shape(image)) == SHAPE_CLASSES[i % 24]
                    for i, image in enumerate(noisy)]) >= 0.99
    swapped = [draw_shape(i)[..., [1, 2, 0]] for i in range(48)]   # another colour than the one asked for
    assert not any("-".join(read_shape(image)) == SHAPE_CLASSES[i % 24] for i, image in enumerate(swapped))
    upside_down = [np.rot90(draw_shape(i), 2) for i in range(2, 240, 4)]        # is not the same triangle
    assert not any(read_shape(image)[1] == "triangle" for image in upside_down)


@pytest.mark.parametrize("unseen", [False, True])
def test_scenes_are_read_as_drawn(unseen):
    """Clean pictures: number, colours, kinds, sizes, place or relation, all exact."""
    for i in range(1000 if unseen else SCENES):
        scene = describe_scene(i, unseen=unseen)
        assert score_scene(scene, draw_scene(scene, i))["all"], (i, scene.caption)
    for i in range(100):
        scene = describe_scene(i, unseen=unseen)
        assert score_scene(scene, draw_scene(scene, i, (48, 64)))["all"], (i, scene.caption)


def test_scenes_keep_what_is_unseen_apart():
    seen = [describe_scene(i) for i in range(4000)]
    assert not any((t.colour, t.kind) in UNSEEN_PAIRS for scene in seen for t in scene.things)
    triples = {(s.things[0].kind, s.relation, s.things[1].kind) for s in seen if s.relation}
    assert not triples & UNSEEN_RELATIONS and len(triples) == 4 * 4 * 4 - len(UNSEEN_RELATIONS)
    asked = [describe_scene(i, unseen=True) for i in range(4000)]
    assert {(t.colour, t.kind) for scene in asked for t in scene.things} >= UNSEEN_PAIRS
    assert {(s.things[0].kind, s.relation, s.things[1].kind) for s in asked if s.relation} >= UNSEEN_RELATIONS
    # the same relation in other words (b right of a for a left of b) is unseen as well
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert {(b, opposite[relation], a) for a, relation, b in UNSEEN_RELATIONS} == UNSEEN_RELATIONS
    assert {len(scene.things) for scene in seen} == {1, 2}
    assert describe_scene(5) == describe_scene(5)
    assert {len(describe_scene(i, 1).things) for i in range(50)} == {1}


def test_captions():
    circle = Thing("red", "circle", "small", 0.24, 0.76)
    square = Thing("blue", "square", "large", 0.5, 0.5)
    assert Scene((circle,)).caption == "a small red circle at the bottom left"
    assert Scene((square,)).caption == "a large blue square in the centre"
    assert Scene((circle, square), "left of").caption == "a small red circle left of a large blue square"


def test_omitted_details():
    """Each detail is omitted independently; what remains is true and on its own side of the relation."""
    rng, one = np.random.default_rng(0), "a small red cross in the centre"
    made = [omit_details(one, rng) for _ in range(4000)]
    assert {*made} == {f"a {size}{colour}{kind}{place}" for size in ("", "small ") for colour in ("", "red ")
                       for kind in ("shape", "cross") for place in ("", " in the centre")}
    assert abs(np.mean([m == one for m in made]) - (6 / 7) ** 4) < 0.03
    assert abs(np.mean(["red" in m for m in made]) - 6 / 7) < 0.03
    two = describe_scene(3, count=2).caption
    relation = next(r for r in RELATIONS if r in two)
    for _ in range(100):
        assert all(set(kept.split()) <= {*full.split(), "shape"} for kept, full in
                   zip(omit_details(two, rng).split(relation), two.split(relation), strict=True))


def test_score_sees_each_mistake():
    asked = Scene((Thing("red", "circle", "small", 0.24, 0.5), Thing("blue", "square", "large", 0.76, 0.5)),
                  "left of")

    def score(scene):
        return score_scene(asked, draw_scene(scene, 0))

    assert all(score(asked).values())
    wrong = {"colour": Scene((Thing("cyan", "circle", "small", 0.24, 0.5), asked.things[1]), "left of"),
             "kind": Scene((Thing("red", "cross", "small", 0.24, 0.5), asked.things[1]), "left of"),
             "size": Scene((Thing("red", "circle", "large", 0.24, 0.5), asked.things[1]), "left of")}
    for part, scene in wrong.items():
        assert not score(scene)[part] and not score(scene)["all"]
    mirrored = Scene((Thing("red", "circle", "small", 0.76, 0.5),
                      Thing("blue", "square", "large", 0.24, 0.5)))
    result = score(mirrored)
    assert not result["relation"] and result["colour"] and result["kind"] and result["size"]
    assert not any(score(Scene(asked.things[:1])).values())                          # one of two is missing
    alone = Scene((Thing("red", "circle", "small", 0.24, 0.24),))
    moved = score_scene(alone, draw_scene(Scene((Thing("red", "circle", "small", 0.76, 0.24),)), 0))
    assert not moved["place"] and moved["colour"] and moved["kind"] and moved["size"]
    assert read_scene(np.full((32, 32, 3), 80, np.uint8)) == []


def test_scenes_survive_a_decoder():
    rng = np.random.default_rng(0)
    right = []
    for i in range(300):
        scene = describe_scene(i)
        noisy = np.clip(draw_scene(scene, i) + rng.normal(0, 5, (32, 32, 3)), 0, 255).astype(np.uint8)
        right.append(score_scene(scene, noisy)["all"])
    assert np.mean(right) > 0.97


def test_varied_captions():
    rng, caption = np.random.default_rng(0), "smiling cat face with heart-shaped eyes"
    made = [vary_caption(caption, rng) for _ in range(1000)]
    assert 0.4 < np.mean([m == caption for m in made]) < 0.65
    assert all(m and set(m.split()) <= set(caption.split()) for m in made)
    assert any(sorted(m.split()) == sorted(caption.split()) and m != caption for m in made)
    assert {vary_caption("cat face", rng) for _ in range(200)} == {"cat face", "face cat", "cat", "face"}
    assert vary_caption("dog", rng) == "dog"


# ---- fonts

@pytest.mark.parametrize("content", [b"", b"no font", b"ttcf" + b"\xff" * 60, b"\0\1\0\0" + b"\xff" * 200,
                                     b"OTTO" + bytes(500)])
def test_a_damaged_font_is_one_line_with_its_name(tmp_path, content):
    (tmp_path / "NotoColorEmoji.ttf").write_bytes(content)
    with pytest.raises(ValueError, match="NotoColorEmoji.ttf: .*font") as error:
        toys.render_emoji(toys.find_emoji_font(tmp_path), (8, 8))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("error", [OSError("execution context too long"), ValueError("bad"), MemoryError()])
def test_a_font_damaged_at_a_glyph(tmp_path, monkeypatch, error):
    def draw(character, font):
        raise error

    monkeypatch.setattr(toys, "open_emoji_font", lambda path: None)
    monkeypatch.setattr(toys, "draw_character", draw)
    with pytest.raises(ValueError, match="a.ttf: damaged at the glyph of "):
        toys.render_emoji(tmp_path / "a.ttf", (8, 8))


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nothing"])
def test_only_a_file_is_a_font(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(toys, "EMOJI_FONTS", [])
    path = tmp_path / "emoji.ttf"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no colour font in"):
        toys.find_emoji_font(tmp_path)


# ---- corners

@pytest.mark.parametrize("size", [(32, 32), (64, 64), (48, 64)])
def test_corners_are_read_as_drawn(size):
    for index in range(240):
        scene = toys.describe_corners(index)
        first, second = scene.things
        assert (first.colour, first.kind) == (second.colour, second.kind)
        assert f"{first.colour}-{first.kind}" == toys.SHAPE_CLASSES[index % 24]
        found = toys.read_corners(toys.draw_corners(index, size))
        for asked, seen in zip(scene.things, found):
            assert (seen.colour, seen.kind, seen.place) == (asked.colour, asked.kind, asked.place)
            assert abs(seen.x - asked.x) < 0.04 and abs(seen.y - asked.y) < 0.04


def test_corners_that_differ_are_read_as_they_are():
    things = toys.describe_corners(3).things
    other = toys.describe_corners(8).things[1]
    found = toys.read_corners(toys.draw_scene(toys.Scene((things[0], other)), 0))
    assert [(t.colour, t.kind) for t in found] == [("red", "cross"), ("blue", "circle")]
    elsewhere = toys.Thing("red", "cross", "large", 0.75, 0.25)
    for scene in (things[:1], (things[0], elsewhere), (*things, elsewhere), ()):
        assert toys.read_corners(toys.draw_scene(toys.Scene(tuple(scene)), 0)) is None
