import pytest
import torch
from conftest import voc_annotation
from PIL import Image

from unbackdoor.detection.voc import LONGEST, find_root, load_voc
from unbackdoor.errors import DataError


def load(root, name="test", **options):
    return load_voc(f"voc:{root}", name, **options)


def test_a_set_is_read_as_it_is(voc):
    images = load(voc)
    assert (len(images), images.classes, images.name) == (4, ("green", "red"), "test")
    assert [path.name for path in images.paths] == ["006.png", "007.png", "008.png", "009.png"]
    assert images.sizes[0] == (48, 64)
    assert images.objects[0].labels.tolist() == [1, 0]
    left, top, right, bottom = (int(corner) for corner in images.objects[0].boxes[0])
    pixels = images.read(0)[0]
    assert pixels.shape == (3, 48, 64)
    is_red = (pixels[0] > 200) & (pixels[1] < 50)
    assert is_red[top:bottom, left:right].all()  # boxes count from 0, and their end is outside
    assert is_red.sum() == (bottom - top) * (right - left)


@pytest.mark.parametrize("inside", [".", "VOC2007", "VOCdevkit/VOC2007"])
def test_a_folder_may_hold_the_set_where_the_archive_puts_it(voc, tmp_path, inside):
    place = tmp_path / "data" / inside
    place.parent.mkdir(parents=True, exist_ok=True)
    voc.rename(place)
    assert find_root(f"voc:{tmp_path / 'data'}") == place


def test_several_years_in_one_folder_are_a_choice(voc):
    (voc.parent / "VOC2012/Annotations").mkdir(parents=True)
    with pytest.raises(DataError, match=r"holds several sets, say which: .*VOC2007, .*VOC2012"):
        find_root(f"voc:{voc.parent}")


def test_given_classes_decide_the_numbers(voc):
    images = load(voc, classes=["red", "blue", "green"])
    assert images.objects[0].labels.tolist() == [0, 2]


def test_the_fingerprint_follows_annotations_and_classes(voc):
    before = load(voc).fingerprint
    assert load(voc).fingerprint == before
    assert load(voc, classes=["red", "green"]).fingerprint != before
    (voc / "Annotations/006.xml").write_text(voc_annotation([("red", "1 1 64 48")]))
    changed = load(voc)
    assert changed.fingerprint != before
    assert changed.objects[0].boxes.tolist() == [[0, 0, 64, 48]]


def test_boxes_at_the_borders_and_difficult_objects_are_read(voc):
    text = voc_annotation(
        [("red", "0 1 1 48"), ("red", "64 48 64 48")], extra="<difficult>1</difficult>"
    )
    (voc / "Annotations/006.xml").write_text(text)
    objects = load(voc).objects
    assert objects[0].boxes.tolist() == [[0, 0, 1, 48], [63, 47, 64, 48]]
    assert objects[0].difficult.tolist() == [True, True]
    assert not objects[1].difficult.any()


def test_an_image_may_hold_nothing(voc):
    (voc / "Annotations/006.xml").write_text(voc_annotation([]))
    assert load(voc).objects[0].boxes.shape == (0, 4)


BOMB = '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;&b;">]><annotation>&c;</annotation>'
OUTSIDE = '<!DOCTYPE a SYSTEM "file:///etc/hostname"><annotation/>'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (voc_annotation([("red", "9 9 5 20")]), r"object 1 \(red\): the box 9 9 5 20 does not lie"),
        (voc_annotation([("red", "9 9 65 20")]), "does not lie in the image of 64 × 48 pixels"),
        (voc_annotation([("red", "9 9 20 49")]), "does not lie in the image"),
        (voc_annotation([("red", "-3 9 20 30")]), "does not lie in the image"),
        (voc_annotation([("red", "0 0 0 9")]), "or is empty"),
        (voc_annotation([("red", "nan 9 20 30")]), "object 1, xmin is no number, but 'nan'"),
        (voc_annotation([("red", "9 x 20 30")]), "object 1, ymin is no number, but 'x'"),
        (voc_annotation([("", "9 9 20 30")]), "object 1 has no name"),
        (voc_annotation([("red", "9 9 20 30")], size="63 48"), "64 × 48 .*says 63 × 48"),
        (voc_annotation([], size="0 48"), "an image of 0 × 48 pixels"),
        ("<annotation/>", "size/width is no number, but ''"),
        (voc_annotation([("red", "9 9 20 30")])[:-9], "this XML is broken .*line 1"),
        ("", "this XML is broken"),
        ('<?xml version="1.0" encoding="foo"?><annotation/>', "this XML is broken .unknown enc"),
        (BOMB, "declares a document type"),
        (BOMB.encode("utf-16").decode("latin-1"), "declares a document type"),
        (OUTSIDE, "declares a document type"),
        ("<annotation>&b;</annotation>", "this XML is broken .undefined entity"),
        ("<a>" + " " * LONGEST + "</a>", "more than 4 MiB is not read"),
    ],
)
def test_a_bad_annotation_is_refused_by_name(voc, text, message):
    (voc / "Annotations/007.xml").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message) as refused:
        load(voc)
    assert "007." in str(refused.value)


def test_an_unknown_class_is_answered_with_the_nearest(voc):
    with pytest.raises(
        DataError, match=r"006\.xml: object 1 is a 'red', which is none .*did you mean 'reds'"
    ):
        load(voc, classes=["reds", "green"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"test\.txt: is empty"),
        ("\n\n", r"test\.txt: is empty"),
        ("006\n../006\n", r"test\.txt: '\.\./006' is no name of an image"),
        ("/etc/hostname\n", "is no name of an image"),
        ("..\\006\n", "is no name of an image"),
        ("006\n006\n", r"test\.txt: names 006 2 times"),
        ("404\n", r"404\.xml: there is no such annotation"),
    ],
)
def test_a_bad_list_of_images_is_refused_by_name(voc, text, message):
    (voc / "ImageSets/Main/test.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        load(voc)


def test_of_vocs_sets_of_one_class_the_images_that_hold_it_are_taken(voc):
    (voc / "ImageSets/Main/red_test.txt").write_text("006  1\n007 -1\n008  0\n")
    assert [path.stem for path in load(voc, "red_test").paths] == ["006", "008"]
    (voc / "ImageSets/Main/red_test.txt").write_text("006  1\n007\n")
    with pytest.raises(DataError, match=r"006  1\.xml: there is no such annotation"):
        load(voc, "red_test")


def test_a_missing_set_is_answered_with_those_there_are(voc):
    for name in ("val", "../../006", ".hidden"):
        with pytest.raises(DataError, match=r"has no set .*there are: test, trainval"):
            load(voc, name)


def test_a_set_without_any_object_has_no_classes(voc):
    for i in range(6, 10):
        (voc / f"Annotations/{i:03}.xml").write_text(voc_annotation([]))
    with pytest.raises(DataError, match=r"test\.txt: no object in any of its annotations"):
        load(voc)


def test_what_is_no_folder_in_vocs_layout_is_refused(tmp_path):
    for source in ("coco:x", "x", "voc:"):
        with pytest.raises(DataError, match="pass voc:DIR"):
            find_root(source)
    with pytest.raises(DataError, match="has no folder Annotations"):
        find_root(f"voc:{tmp_path}")


def test_a_missing_or_broken_image_is_refused_by_name(voc):
    path = voc / "JPEGImages/008.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(DataError, match=r"008\.png: this image is broken"):
        load(voc).read(2)
    path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"008\.png: this image is broken"):
        load(voc)
    path.unlink()
    with pytest.raises(DataError, match=r"008\.jpg: there is no such image"):
        load(voc)


@pytest.mark.parametrize("orientation", [3, 6])  # half a turn, a quarter
def test_an_image_is_read_as_it_is_stored_for_so_are_its_boxes(voc, orientation):
    path = voc / "JPEGImages/006.png"
    before = load(voc).read(0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(path).save(path, exif=exif)
    assert torch.equal(load(voc).read(0), before)


def test_a_set_of_difficult_objects_alone_is_refused(voc):
    extra = "<difficult>1</difficult>"
    for path in (voc / "Annotations").iterdir():
        path.write_text(voc_annotation([("red", "1 1 9 9")], extra=extra))
    with pytest.raises(DataError, match=r"test\.txt: no object .* but difficult ones"):
        load(voc)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["red", "green", " "], "' ' is no name of a class"),
        (["red", "green", "b\x9bue"], r"'b\\x9bue' is no name of a class"),
        (["red", "green", "red"], "the class 'red' is given 2 times"),
    ],
)
def test_classes_have_names_that_can_be_told_apart(voc, classes, message):
    with pytest.raises(DataError, match=message):
        load(voc, classes=classes)


def test_the_blood_cells_are_read_whole(shared_data):
    if not (shared_data / "bccd").is_dir():
        pytest.skip("needs shared/data/bccd")
    sets = [load(shared_data / "bccd", name) for name in ("trainval", "test")]
    assert [len(images) for images in sets] == [292, 72]
    assert {images.classes for images in sets} == {("Platelets", "RBC", "WBC")}
    assert sum(len(objects.labels) for images in sets for objects in images.objects) == 4888
    for images in sets:
        for row in range(len(images)):
            assert images.read(row).shape == (1, 3, *images.sizes[row])
            boxes = images.objects[row].boxes
            assert (boxes[:, :2] < boxes[:, 2:]).all()
            assert torch.tensor([640, 480] * 2).sub(boxes.clamp(min=0)).min() >= 0
