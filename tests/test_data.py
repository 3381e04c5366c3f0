"""Data sets: every road in, the cache, the errors, batches and augmentation. All offline."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from subbyte.data import Augment, ImageSet, batches, cutout, load_images, random_crop, random_flip
from subbyte.data.decode import checked_labels
from subbyte.errors import SubbyteError

datasets = pytest.importorskip("datasets")

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no data in {SHARED}")
NAMES = ["cat", "dog", "eel"]


def pixels(seed, height=5, width=6, channels=3):
    """Random uint8 [h, w, 3], or [h, w] for one channel."""
    shape = (height, width, 3) if channels == 3 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(array, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def cell(array, kind="PNG", **options):
    return {"bytes": encoded(array, kind, **options), "path": None}


def parquet(folder, split, columns, **features):
    """One split in the hub's layout; images and labels named as in `features`."""
    types = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=NAMES), **features}
    types = {name: types[name] for name in columns}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(types))
    data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


def image_folder(folder, arrays):
    """PNG files from {"train/cat/1": array}."""
    for name, array in arrays.items():
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(array))


def chw(array):
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    (path / "data").mkdir(parents=True)
    return path


@pytest.fixture
def load(source, tmp_path):
    """Loads from `source`, into a cache of this test only."""

    def loaded(split="train", **options):
        return load_images(str(source), split, cache_dir=tmp_path / "cache", **options)

    return loaded


def refusal(load, *arguments, **options):
    with pytest.raises(SubbyteError) as caught:
        load(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- roads in


def test_parquet_pixels_labels_and_names_are_exact(source, load):
    arrays = [pixels(i) for i in range(150)]  # more than one chunk
    labels = [i % 3 for i in range(150)]
    parquet(source, "train", {"picture": [cell(a) for a in arrays], "kind": labels})
    data = load()
    assert torch.equal(data.images, torch.stack([chw(a) for a in arrays]))
    assert data.images.dtype == torch.uint8
    assert data.labels.tolist() == labels
    assert data.labels.dtype == torch.int64
    assert (data.classes, data.source, data.split) == (tuple(NAMES), str(source), "train")
    assert len(data) == 150


def test_image_folder(source, load):
    arrays = {"train/cat/1": pixels(1), "train/dog/1": pixels(2), "test/dog/1": pixels(3)}
    image_folder(source, arrays)
    train, test = load("train"), load("test")
    assert {train.classes[label] for label in train.labels} == {"cat", "dog"}
    for image, label in zip(train.images, train.labels, strict=True):
        assert torch.equal(image, chw(arrays[f"train/{train.classes[label]}/1"]))
    assert [test.classes[label] for label in test.labels] == ["dog"]
    assert torch.equal(test.images[0], chw(arrays["test/dog/1"]))


def test_plain_integer_labels_count_the_classes_of_all_splits(source, load):
    kind = datasets.Value("int64")
    one = [cell(pixels(0))]
    parquet(source, "train", {"picture": one, "kind": [1]}, kind=kind)
    parquet(source, "test", {"picture": one, "kind": [4]}, kind=kind)
    assert load("train").classes == load("test").classes == ("0", "1", "2", "3", "4")


def test_test_falls_back_to_validation_and_says_so(source, load):
    parquet(source, "validation", {"picture": [cell(pixels(0))], "kind": [1]})
    assert load("test").split == "validation"
    assert load("test").split == "validation"  # from the cache
    parquet(source, "test", {"picture": [cell(pixels(1))], "kind": [2]})
    assert (load("test").split, load("test").labels.tolist()) == ("test", [2])


GREY, COLOUR = pixels(1, channels=1), pixels(2)
THRICE = np.repeat(GREY[..., None], 3, axis=2)


@pytest.mark.parametrize(
    ("cells", "arrays"),
    [
        ([cell(GREY), cell(GREY)], [GREY, GREY]),
        ([cell(GREY), cell(COLOUR)], [THRICE, COLOUR]),
        ([cell(THRICE)], [THRICE]),  # stored as RGB: stays RGB
        ([cell(THRICE, "WEBP", lossless=True)], [GREY]),  # WebP has no grey
        ([cell(COLOUR, "WEBP", lossless=True), cell(GREY)], [COLOUR, THRICE]),
    ],
    ids=["grey", "mixed", "grey as RGB", "grey as WebP", "WebP"],
)
def test_channels(source, load, cells, arrays):
    parquet(source, "train", {"picture": cells, "kind": [0] * len(cells)})
    assert torch.equal(load().images, torch.stack([chw(a) for a in arrays]))


def test_exif_orientation_is_applied(source, load):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    array = pixels(0)
    parquet(source, "train", {"picture": [cell(array, exif=exif)], "kind": [0]})
    assert torch.equal(load().images[0], chw(np.rot90(array, -1).copy()))


# 32 * 8 / 20 = 12.8 rounds up, 9 * 8 / 5 = 14.4 down
@pytest.mark.parametrize("shape", [(20, 32), (32, 20), (16, 16), (5, 9)])
def test_size_scales_the_shorter_side_and_cuts_the_centre(source, load, shape):
    array = pixels(3, *shape)
    parquet(source, "train", {"picture": [cell(array), cell(pixels(4, 9, 9))], "kind": [0, 1]})
    height, width = (max(8, round(side * 8 / min(shape))) for side in shape)
    scaled = np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BILINEAR))
    top, left = (height - 8) // 2, (width - 8) // 2
    data = load(size=8)
    assert data.images.shape == (2, 3, 8, 8)
    assert torch.equal(data.images[0], chw(scaled[top : top + 8, left : left + 8].copy()))


def test_digits_are_the_originals_split_once_and_stratified():
    from sklearn.datasets import load_digits

    train, test = load_images("digits", "train"), load_images("digits", "test")
    original = load_digits()
    assert (len(train), len(test)) == (1442, 355)
    expected = np.rint(original.images * 255 / 16).astype(np.uint8).reshape(-1, 64)
    expected = np.column_stack([expected, original.target])
    found = [np.column_stack([d.images.reshape(-1, 64), d.labels]) for d in (train, test)]
    assert sorted(map(tuple, np.concatenate(found))) == sorted(map(tuple, expected))
    counts = [torch.bincount(d.labels, minlength=10) for d in (train, test)]
    assert ((counts[1] * 5 - counts[0] - counts[1]).abs() <= 4).all()
    assert train.images.shape[1:] == (1, 8, 8)
    assert train.images.max() == 255
    assert torch.equal(train.images, load_images("digits", "train").images)
    assert train.classes == tuple("0123456789")


def test_a_hub_id_takes_the_same_road(monkeypatch, tmp_path):
    types = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=NAMES)}
    )
    columns = {"picture": [cell(COLOUR)], "kind": [2]}
    hub = datasets.DatasetDict(train=datasets.Dataset.from_dict(columns, features=types))
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, cache_dir=None: (asked.append(path), hub)[1]
    )
    data = load_images("some/thing", "train", cache_dir=tmp_path)
    assert asked == ["some/thing"]
    assert torch.equal(data.images[0], chw(COLOUR))
    assert data.labels.tolist() == [2]


# --- the cache


def fill(source, n=3):
    arrays = [pixels(i) for i in range(n)]
    parquet(source, "train", {"picture": [cell(a) for a in arrays], "kind": [0] * n})


def test_second_call_reads_the_cache_only(source, load, monkeypatch):
    fill(source)
    first = load()
    monkeypatch.setattr(datasets, "load_dataset", None)
    second = load()
    assert torch.equal(first.images, second.images)
    assert first.classes == second.classes


def test_images_are_mapped(source, load, tmp_path):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux lists the mapped files")
    fill(source)
    data = load()
    (stored,) = (tmp_path / "cache").rglob("images.u8")
    assert str(stored) in maps.read_text()
    del data
    assert str(stored) not in maps.read_text()


def test_writing_to_images_changes_no_file(source, load, tmp_path):
    fill(source)
    data = load()
    (stored,) = (tmp_path / "cache").rglob("images.u8")
    before = stored.read_bytes()
    assert before == data.images.numpy().tobytes()
    data.images.fill_(7)
    assert stored.read_bytes() == before
    assert load().images[0].float().std() > 1


def test_changed_files_split_and_size_are_decoded_anew(source, load):
    fill(source)
    assert len(load()) == 3
    fill(source, n=4)
    assert len(load()) == 4
    assert load(size=3).images.shape == (4, 3, 3, 3)
    parquet(source, "test", {"picture": [cell(pixels(9))], "kind": [1]})
    assert load("test").labels.tolist() == [1]


@pytest.mark.parametrize("change", ["cut", "no header", "bad header", "no labels"])
def test_damaged_entry_is_reported(source, load, tmp_path, change):
    fill(source)
    load()
    (entry,) = (tmp_path / "cache").iterdir()
    if change == "cut":
        (entry / "images.u8").write_bytes(b"12")
    elif change == "bad header":
        (entry / "header.json").write_text("{")
    else:
        (entry / {"no header": "header.json", "no labels": "labels.i64"}[change]).unlink()
    message = refusal(load)
    assert str(entry) in message
    assert "delete that folder" in message


def test_a_broken_run_leaves_nothing(source, load, tmp_path, monkeypatch):
    fill(source)
    good = encoded(pixels(0))
    columns = {"picture": [{"bytes": b, "path": None} for b in (good, good[:60])], "kind": [0, 0]}
    parquet(source, "test", columns)
    refusal(load, "test")
    assert list((tmp_path / "cache").iterdir()) == []

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("subbyte.data.loading.write_pixels", full)
    message = refusal(load)
    assert f"cannot write decoded images to {tmp_path / 'cache'}: No space left" in message
    assert "free some space" in message
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_entry_made_meanwhile_by_another_process_is_kept(source, load, monkeypatch):
    fill(source)
    from subbyte.data import cache

    load()
    real, calls = cache.read, []

    def blind_once(*arguments):
        calls.append(arguments)
        return None if len(calls) == 1 else real(*arguments)

    monkeypatch.setattr(cache, "read", blind_once)
    assert len(load()) == 3
    assert len(calls) == 2


def test_cache_folder_from_the_environment(source, monkeypatch, tmp_path):
    fill(source)
    monkeypatch.setenv("SUBBYTE_CACHE", str(tmp_path / "elsewhere"))
    load_images(str(source), "train")
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1
    monkeypatch.setenv("SUBBYTE_CACHE", str(next(source.rglob("*.parquet"))))
    message = refusal(load_images, str(source), "train")
    assert "cannot create the cache" in message
    assert "set SUBBYTE_CACHE" in message


# --- errors


@pytest.mark.parametrize("path", ["./no/such", "../none", "/no/such", "~/none-such", "a/b/c", ""])
def test_a_missing_folder_is_not_sent_to_the_hub(monkeypatch, tmp_path, path):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    message = refusal(load_images, path, "train", cache_dir=tmp_path)
    assert f"no folder '{path}'" in message
    assert "check the path" in message


def test_a_file_is_no_source(source):
    fill(source)
    path = str(next(source.rglob("*.parquet")))
    assert f"'{path}' is a file; give the folder" in refusal(load_images, path, "train")


def test_hub_out_of_reach(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'some/thing' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = refusal(load_images, "some/thing", "train", cache_dir=tmp_path)
    assert "cannot reach the hub for 'some/thing', which is no folder here" in message
    assert "check the connection" in message


def test_folder_without_data(source, load):
    assert f"cannot read '{source}' as a data set" in refusal(load)
    (source / "data/train-00000-of-00001.parquet").write_bytes(b"PAR1 but not really")
    assert "give a folder of parquet files" in refusal(load)


def test_unknown_split_lists_the_others(source, load):
    fill(source)
    message = refusal(load, "dev")
    assert f"'{source}' has no split 'dev'; it has train." in message
    assert "has no split 'validation'; it has train, test" in refusal(
        load_images, "digits", "validation"
    )


def test_empty_split(source, load):
    parquet(source, "test", {"picture": [], "kind": []})
    message = refusal(load, "test")
    assert f"cannot read '{source}' as a data set" in message
    assert "no data" in message
    assert "no empty split" in message


def test_empty_split_of_the_hub(monkeypatch, tmp_path):
    hub = datasets.DatasetDict(test=datasets.Dataset.from_dict({"picture": [], "kind": []}))
    monkeypatch.setattr(datasets, "load_dataset", lambda path, cache_dir=None: hub)
    message = refusal(load_images, "some/thing", "test", cache_dir=tmp_path)
    assert message == "split 'test' of 'some/thing' holds no images; choose another."


@pytest.mark.parametrize(
    ("extra", "dropped", "problem"),
    [
        ({}, "picture", "no image column: kind (int64)"),
        ({}, "kind", "no label column: picture ("),
        ({"second": datasets.Image()}, None, "more than one image column: picture ("),
        ({"second": datasets.ClassLabel(names=NAMES)}, None, "more than one label column: picture"),
    ],
)
def test_columns_that_are_missing_or_ambiguous_are_listed(source, load, extra, dropped, problem):
    columns = {"picture": [cell(COLOUR)], "kind": [0]}
    columns |= {n: columns["picture" if "Image" in repr(f) else "kind"] for n, f in extra.items()}
    columns.pop(dropped, None)
    parquet(source, "train", columns, **extra)
    message = refusal(load)
    assert f"'{source}' has {problem}" in message
    assert all(name in message for name in columns)


def test_sizes_that_differ_need_size(source, load):
    cells = [cell(pixels(0)), cell(pixels(1)), cell(pixels(2, 4, 9))]
    parquet(source, "train", {"picture": cells, "kind": [0, 0, 0]})
    message = refusal(load)
    assert f"image 2 of split 'train' of '{source}' is 4x9, image 0 is 5x6" in message
    assert "pass size=" in message


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ({"bytes": encoded(COLOUR)[:70], "path": None}, "cannot be decoded"),
        ({"bytes": b"not an image", "path": None}, "cannot be decoded"),
        (None, "is missing; replace or remove it"),
        (cell(np.zeros((5, 6), dtype=np.uint16)), "has more than 8 bits per channel (mode I;16)"),
    ],
    ids=["cut", "text", "none", "16 bits"],
)
def test_an_image_that_cannot_be_used_is_named(source, load, broken, problem):
    cells = [cell(COLOUR)] * 70 + [broken]
    parquet(source, "train", {"picture": cells, "kind": [0] * 71})
    message = refusal(load)
    assert message.startswith(f"image 70 of split 'train' of '{source}' ")
    assert problem in message


def test_unreadable_images_up_to_a_number_are_left_out_and_named(source, load):
    """Of 70, two: the others keep their own pixels and labels, also when the cache is read."""
    cells = [cell(pixels(i)) for i in range(70)]
    cells[3], cells[68] = {"bytes": b"not an image", "path": "a.png"}, None
    parquet(source, "train", {"picture": cells, "kind": [i % 3 for i in range(70)]})
    assert "image 68 of split 'train'" in refusal(load, unreadable=1)
    kept = [i for i in range(70) if i not in (3, 68)]
    for _ in range(2):
        data = load(unreadable=2)
        assert data.labels.tolist() == [i % 3 for i in kept]
        assert all(
            np.array_equal(x.permute(1, 2, 0), pixels(i))
            for x, i in zip(data.images, kept, strict=True)
        )
        assert [why.split(" of ")[0] for why in data.left_out] == ["image 3", "image 68"]
    assert "(2 so far); replace or remove it" in refusal(load, unreadable=1)


@pytest.mark.parametrize("label", [-1, None])
def test_labels_that_are_missing(source, load, label):
    parquet(source, "train", {"picture": [cell(COLOUR)] * 2, "kind": [0, label]})
    message = refusal(load)
    assert f"label {label} of image 1 of split 'train' of '{source}'" in message
    assert "not one of the 3 classes, 0 to 2; use a labelled split" in message


def test_labels_beyond_the_classes():
    assert checked_labels([0, 2], 3, "here").tolist() == [0, 2]
    with pytest.raises(SubbyteError, match="label 3 of image 1 of here is not one of the 3"):
        checked_labels([0, 3], 3, "here")


def test_integers_that_are_no_classes(source, load):
    columns = {"picture": [cell(COLOUR)], "kind": [10**12]}
    parquet(source, "train", columns, kind=datasets.Value("int64"))
    message = refusal(load)
    assert f"column 'kind' of '{source}' holds {10**12}, which is no class number" in message


def test_sizes_that_make_no_sense(load):
    assert "size=0 for" in refusal(load, size=0)
    assert "size=9 does not fit 'digits', which are 8x8" in refusal(
        load_images, "digits", "train", size=9
    )


# --- image sets and batches


@pytest.fixture
def numbered():
    """Ten images, image i filled with i, label 10 i."""
    images = torch.arange(10, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 2, 2)
    return ImageSet(images, torch.arange(10) * 10, tuple(map(str, range(100))), "here", "train")


def test_subset_and_head(numbered):
    chosen = numbered.subset([7, 2, 2])
    assert chosen.images[:, 0, 0, 0].tolist() == [7, 2, 2]
    assert chosen.labels.tolist() == [70, 20, 20]
    assert (chosen.classes, chosen.source, chosen.split) == (numbered.classes, "here", "train")
    assert numbered.head(4).labels.tolist() == [0, 10, 20, 30]
    assert len(numbered.head(99)) == 10
    assert numbered.head(2).images.data_ptr() == numbered.images.data_ptr()
    for wrong in (10, -1):
        with pytest.raises(SubbyteError, match=rf"index {wrong} is outside the 10 .*use 0 to 9"):
            numbered.subset([0, wrong])
    with pytest.raises(SubbyteError, match=r"head\(0\) of split 'train' of 'here'.* use 1"):
        numbered.head(0)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(("size", "drop_last", "sizes"), [(4, False, [4, 4, 2]), (4, True, [4, 4])])
def test_batches_cover_the_data_once(numbered, shuffled, size, drop_last, sizes):
    generator = torch.Generator().manual_seed(0) if shuffled else None
    got = list(batches(numbered, size, generator=generator, drop_last=drop_last))
    assert [len(labels) for _, labels in got] == sizes
    for images, labels in got:
        assert torch.equal(images[:, 0, 0, 0].long() * 10, labels)
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
        images.fill_(255)
    labels = torch.cat([labels for _, labels in got]).tolist()
    assert len(set(labels)) == sum(sizes)
    assert (labels == sorted(labels)) != shuffled
    assert numbered.images.max() == 9  # the batches were copies


def test_shuffling_repeats_with_the_seed_and_moves_on_within_it(numbered):
    def epochs(seed):
        generator = torch.Generator().manual_seed(seed)
        return [next(iter(batches(numbered, 10, generator=generator)))[1].tolist() for _ in "ab"]

    assert epochs(3) == epochs(3)
    assert epochs(3)[0] != epochs(3)[1]


@pytest.mark.parametrize(("size", "drop_last"), [(0, False), (-1, True), (11, True)])
def test_batch_sizes_that_make_no_batch(numbered, size, drop_last):
    with pytest.raises(SubbyteError, match=f"batch_size={size} makes no batch of the 10 images of"):
        batches(numbered, size, drop_last=drop_last)


# --- augmentation, against one image at a time


@pytest.fixture
def batch():
    return torch.randint(1, 256, (40, 3, 7, 9), dtype=torch.uint8)


def same_draws(*limits, n):
    """What a generator with seed 5 draws: one vector of n integers below each limit."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(limit, (n,), generator=generator).tolist() for limit in limits]


def seeded():
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("padding", [1, 4])
def test_random_crop(batch, padding):
    tops, lefts = same_draws(2 * padding + 1, 2 * padding + 1, n=40)
    result = random_crop(batch, padding, seeded())
    for image, cropped, top, left in zip(batch, result, tops, lefts, strict=True):
        padded = np.pad(image.numpy(), ((0, 0), (padding, padding), (padding, padding)))
        assert np.array_equal(cropped, padded[:, top : top + 7, left : left + 9])
    assert {0, 2 * padding} <= set(tops)


def test_random_flip(batch):
    (mirrored,) = same_draws(2, n=40)
    for image, flipped, mirror in zip(batch, random_flip(batch, seeded()), mirrored, strict=True):
        assert np.array_equal(flipped, image.numpy()[:, :, ::-1] if mirror else image)
    assert set(mirrored) == {0, 1}


@pytest.mark.parametrize("size", [1, 3, 4, 20])
def test_cutout(batch, size):
    rows, columns = same_draws(7, 9, n=40)
    for image, cut, row, column in zip(
        batch, cutout(batch, size, seeded()), rows, columns, strict=True
    ):
        expected = image.numpy().copy()
        top, left = row - size // 2, column - size // 2
        expected[:, max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = 0
        assert np.array_equal(cut, expected)


def test_augment_is_crop_then_flip_then_cutout(batch):
    before = batch.clone()
    generator = seeded()
    expected = cutout(random_flip(random_crop(batch, 2, generator), generator), 3, generator)
    assert torch.equal(Augment(crop=2, flip=True, cutout=3)(batch, seeded()), expected)
    assert not torch.equal(expected, batch)
    assert torch.equal(batch, before)  # inputs are never written to
    assert Augment()(batch) is batch


@pytest.mark.parametrize("wrong", [{"crop": -1}, {"cutout": -4}])
def test_augment_refuses_negative_numbers(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(SubbyteError, match=f"{name}={value} of Augment is negative; use 0"):
        Augment(**wrong)


# --- real data


@needs_shared
@pytest.mark.parametrize(
    ("name", "shape", "classes", "split"),
    [
        ("mnist", (10_000, 1, 28, 28), "0", "test"),
        ("imagenet1000", (600, 3, 256, 256), "0", "validation"),
    ],
)
def test_real_data(name, shape, classes, split, tmp_path):
    data = load_images(str(SHARED / name), "test", cache_dir=tmp_path)
    assert data.images.shape == shape
    assert data.split == split
    assert data.classes[0] == classes
    assert len(data.classes) == (1000 if name == "imagenet1000" else 10)
