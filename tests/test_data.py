"""The loaders: what is in a batch, that it depends on (seed, epoch) alone, and broken folders."""
import os
import shutil
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import ImageLoader, Split, load_data

CPU = torch.device("cpu")


def loader_of(images, *, batch_size=7, **options):
    labels = torch.arange(len(images)) % 10
    zero, one = torch.zeros(3), torch.ones(3)
    options = {"shuffle": True, "augment": True, **options}
    return ImageLoader(Split(images, labels), [str(n) for n in range(10)], zero, one, batch_size,
                       CPU, **options)


def pictures(count=23, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)


def whole_epoch(loader, epoch=0):
    loader.set_epoch(epoch)
    images, labels = zip(*loader)
    return torch.cat(images), torch.cat(labels)


# --- batches ------------------------------------------------------------------------------------

@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("size", [16, 32])
def test_crop_and_flip_are_those_of_a_slow_reference(size, reflect):
    images, margin = pictures(size=size), size // 8
    got, labels = whole_epoch(loader_of(images, seed=3, reflect=reflect), epoch=5)
    generator = torch.Generator().manual_seed(3 * 1_000_003 + 5)
    order = torch.randperm(len(images), generator=generator)
    shift = torch.randint(2 * margin + 1, (2, len(images)), generator=generator)
    flip = torch.randint(2, (len(images),), generator=generator)
    assert 0 < flip.sum() < len(images) and len(shift.unique()) > 3
    mode = {"mode": "reflect"} if reflect else {"mode": "constant"}
    for position, n in enumerate(order.tolist()):
        picture = images[n].numpy()
        if flip[position]:
            picture = picture[:, ::-1]
        padded = np.pad(picture, ((margin, margin), (margin, margin), (0, 0)), **mode)
        down, right = shift[:, position].tolist()
        crop = padded[down:down + size, right:right + size].transpose(2, 0, 1).astype(np.float32)
        assert np.array_equal(got[position].numpy(), crop)
        assert labels[position] == n % 10


def test_an_epoch_is_a_permutation():
    images = pictures(50)
    images[..., 0] = torch.arange(50, dtype=torch.uint8)[:, None, None]     # red names the picture
    for augment in (False, True):
        loader = loader_of(images, batch_size=8, augment=augment)
        seen, _ = whole_epoch(loader)
        assert sorted(seen[:, 0].amax((1, 2)).tolist()) == list(range(50))
        assert len(list(loader)) == len(loader) == 7


@pytest.mark.parametrize("augment", [False, True])
def test_one_image_alone_is_no_batch(augment):
    """BatchNorm cannot normalise it; another sits out each epoch. Tests measure every image."""
    loader = loader_of(pictures(22), batch_size=7, augment=augment)
    assert len(loader) == 3 and [len(labels) for _, labels in loader] == [7, 7, 7]
    left = []
    for epoch in range(8):
        seen = whole_epoch(loader, epoch)[1]
        left.append(int((torch.arange(22) % 10).sum() - seen.sum()))
    assert len(set(left)) > 2
    measured = loader_of(pictures(22), batch_size=7, augment=False, shuffle=False)
    assert len(measured) == 4 and len(whole_epoch(measured)[1]) == 22
    assert len(loader_of(pictures(1), batch_size=7)) == 1


def test_batches_depend_on_seed_and_epoch_alone():
    one, other = loader_of(pictures(), seed=1), loader_of(pictures(), seed=1)
    torch.manual_seed(99)
    first = whole_epoch(one, 4)
    whole_epoch(other, 2)                       # another history, the same epoch
    torch.rand(5)
    assert all(map(torch.equal, first, whole_epoch(other, 4)))
    assert not torch.equal(first[0], whole_epoch(one, 5)[0])
    assert not torch.equal(first[0], whole_epoch(loader_of(pictures(), seed=2), 4)[0])
    other.batch_size = 5                        # the same pictures, cut elsewhere
    assert torch.equal(first[0], whole_epoch(other, 4)[0])


def test_the_loader_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    whole_epoch(loader_of(pictures()))
    assert torch.equal(before, torch.get_rng_state())


def test_batches_are_normalised_and_channels_last():
    train, test = load_data("shapes", "unused", 64, CPU, augment=False, seed=0)
    images, labels = next(iter(train))
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert images.shape == (64, 3, 16, 16)
    assert images.is_contiguous(memory_format=torch.channels_last)
    everything, _ = whole_epoch(train)
    assert everything.mean((0, 2, 3)).abs().max() < 1e-4
    assert (everything.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert torch.equal(train.mean, test.mean) and torch.equal(train.std, test.std)
    raw = common.draw_shapes(2000, seed=3).images
    assert torch.equal(whole_epoch(test)[0].mul(test.std[0, 0, :, None, None])
                       .add(test.mean[0, 0, :, None, None]).round().byte(), raw.permute(0, 3, 1, 2))


def test_crops_move_and_mirror_evenly():
    image = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    image[0, 8, 5] = 255
    loader = loader_of(image.repeat(4000, 1, 1, 1), batch_size=500)
    images, _ = whole_epoch(loader)
    places = images[:, 0].flatten(1).argmax(1)
    counts = torch.bincount(places, minlength=256)
    assert (counts > 0).sum() == 5 * (5 + 5)        # 5 lines; 5 columns, and 5 of the mirror image
    assert 4000 / 50 * 0.5 < counts[counts > 0].min() and counts.max() < 4000 / 50 * 1.6


# --- data sets ----------------------------------------------------------------------------------

def test_shapes_are_the_same_every_time_and_splits_differ():
    one, again = common.draw_shapes.__wrapped__(200, 1), common.draw_shapes.__wrapped__(200, 1)
    assert torch.equal(one.images, again.images) and torch.equal(one.masks, again.masks)
    assert one.images.dtype == torch.uint8 and one.images.shape == (200, 16, 16, 3)
    assert torch.equal(one.labels.bincount(), torch.full((10,), 20))
    assert not torch.equal(one.images, common.draw_shapes.__wrapped__(200, 2).images)


def test_shapes_know_where_the_object_is():
    split = common.draw_shapes(2000, seed=3)
    assert split.masks.dtype == torch.bool and split.masks.shape == (2000, 16, 16)
    share = split.masks.float().mean((1, 2))
    assert 0.05 < share.min() and share.max() < 0.75
    # the object has one colour, the background many: pixels vary less inside than outside
    images = split.images.float()
    def spread(mask):
        weight = mask[..., None].float()
        mean = (images * weight).sum((1, 2), keepdim=True) / weight.sum((1, 2), keepdim=True)
        variance = ((images - mean).square() * weight).sum((1, 2)) / weight.sum((1, 2))
        return variance.mean()
    assert spread(split.masks) < 0.5 * spread(~split.masks)
    _, test = load_data("shapes", "unused", 64, CPU, augment=True, seed=0)
    assert torch.equal(test.masks, split.masks) and test.class_names == common.SHAPES


def test_val_split_is_neither_train_nor_test():
    train, test = load_data("shapes", "", 64, CPU, augment=False, seed=0)
    same, val = load_data("shapes", "", 64, CPU, augment=False, seed=0, split="val")
    assert torch.equal(train.images, same.images) and not torch.equal(test.images, val.images)


def test_train_images_are_a_fair_nested_sample():
    few, _ = load_data("shapes", "", 64, CPU, augment=False, seed=0, train_images=100)
    more, _ = load_data("shapes", "", 64, CPU, augment=False, seed=5, train_images=250)
    assert len(few.labels) == 100 and torch.equal(few.labels.bincount(), torch.full((10,), 10))
    assert {x.tobytes() for x in few.images.numpy()} < {x.tobytes() for x in more.images.numpy()}
    assert torch.equal(few.mean, more.mean), "normalised by the whole split, whatever is used of it"
    with pytest.raises(ValueError, match="4001 training images asked for, shapes has 4000"):
        load_data("shapes", "", 64, CPU, augment=False, seed=0, train_images=4001)


class FakeCIFAR:
    url, filename, base_folder = "https://host/cifar.tar.gz", "cifar.tar.gz", "cifar-batches"
    classes = ["cat", "dog"]

    def __init__(self, root, train, download):
        assert download
        self.data = pictures(40 if train else 10, 32).numpy()
        self.targets = [n % 2 for n in range(len(self.data))]


def test_cifar_comes_from_torchvision(monkeypatch):
    monkeypatch.setattr(common.datasets, "CIFAR10", FakeCIFAR)
    train, test = load_data("cifar10", "data", 8, CPU, augment=True, seed=0)
    assert (len(train.labels), len(test.labels), train.num_classes) == (40, 10, 2)
    assert train.images.shape == (80, 40, 40, 3)        # padded, then mirrored
    train, val = load_data("cifar10", "data", 8, CPU, augment=False, seed=0, split="val")
    assert (len(train.labels), len(val.labels)) == (36, 4)
    held_out = {x.tobytes() for x in val.images.numpy()}
    assert not held_out & {x.tobytes() for x in train.images.numpy()}


def test_cifar_without_network_says_what_to_do(monkeypatch):
    class Offline(FakeCIFAR):
        def __init__(self, *args, **kwargs):
            raise urllib.error.URLError("no route to host")
    monkeypatch.setattr(common.datasets, "CIFAR100", Offline)
    with pytest.raises(common.UserError) as caught:
        load_data("cifar100", "somewhere", 8, CPU, augment=True, seed=0)
    for part in ("https://host/cifar.tar.gz", "no route", "cifar.tar.gz or the unpacked folder "
                 "cifar-batches in somewhere/", "--dataset shapes"):
        assert part in str(caught.value)


# --- folders ------------------------------------------------------------------------------------

def save(path, size=(32, 32), colour=(250, 5, 5), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        for name, colour in (("bird", (250, 5, 5)), ("cat", (5, 250, 5))):
            for n in range(count):
                save(tmp_path / split / name / f"{n}.png", colour=colour)
    return tmp_path


def load(folder, **options):
    return load_data("folder", folder, 4, CPU, augment=False, seed=0, **options)


def test_folder_is_read_by_class(folder):
    train, test = load(folder)
    assert train.class_names == ["bird", "cat"] and train.num_classes == 2
    assert (len(train.labels), len(test.labels)) == (8, 4)
    for image, label in zip(train.images, train.labels):
        assert image[0, 0].tolist() == [[250, 5, 5], [5, 250, 5]][label]


def test_folder_takes_any_picture_and_resizes(folder):
    save(folder / "train/cat/grey.png", mode="L")
    save(folder / "train/cat/palette.png", mode="P")
    save(folder / "train/cat/clear.png", mode="RGBA")
    save(folder / "train/cat/wide.jpg", size=(90, 41))
    save(folder / "train/cat/UPPER.JPEG", size=(8, 8))
    (folder / "train/cat/notes.txt").write_text("not a picture")
    train, _ = load(folder, image_size=24)
    assert train.images.shape == (13, 24, 24, 3)


@pytest.mark.parametrize("name", ["val", "valid"])
def test_folder_with_val_instead_of_test(folder, name):
    (folder / "test").rename(folder / name)
    _, measured = load(folder)
    assert len(measured.labels) == 4
    train, held_out = load(folder, split="val")     # val/ is the test split: train gives a part
    assert len(train.labels) + len(held_out.labels) == 8


def test_cinic10_has_three_splits(folder):
    shutil.copytree(folder / "train", folder / "valid")
    train, test = load_data("cinic10", folder, 4, CPU, augment=False, seed=0)
    _, valid = load_data("cinic10", folder, 4, CPU, augment=False, seed=0, split="val")
    assert (len(train.labels), len(test.labels), len(valid.labels)) == (8, 4, 8)


def test_folder_cache_is_used_and_made_anew(folder, monkeypatch):
    decoded = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path: decoded.append(path) or real(path))
    first, _ = load(folder)
    assert len(decoded) == 12
    again, _ = load(folder)
    assert len(decoded) == 12 and torch.equal(first.images, again.images)
    assert len(list(folder.glob(".decoded*"))) == 1, "one file"
    changes = {
        "content": lambda: save(folder / "train/cat/0.png", colour=(1, 2, 3)),
        "time": lambda: os.utime(folder / "train/cat/1.png", (1, 1)),
        "more": lambda: save(folder / "test/cat/9.png"),
        "fewer": lambda: (folder / "test/cat/9.png").unlink(),
        "renamed": lambda: (folder / "train/cat/2.png").rename(folder / "train/cat/7.png"),
        "damaged cache": lambda: (folder / ".decoded_32.pt").write_bytes(b"PK not a cache"),
    }
    for change, make in changes.items():
        decoded.clear()
        make()
        train, _ = load(folder)
        assert decoded, f"the cache outlived: {change}"
    assert (train.images == torch.tensor([1, 2, 3], dtype=torch.uint8)).all(3).any()
    decoded.clear()
    load(folder, image_size=16)
    assert decoded, "another size is another cache"


def test_folder_cache_that_cannot_be_kept_is_only_a_note(folder, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(common.torch, "save", full)
    train, _ = load(folder)
    assert len(train.labels) == 8 and "No space left" in capsys.readouterr().err
    assert not list(folder.glob(".decoded*"))


@pytest.mark.parametrize("damage", ["not a picture", "cut short", "16 bits"])
def test_a_broken_picture_is_named(folder, damage):
    path = folder / "train/cat/broken.jpg"
    if damage == "16 bits":
        deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
        Image.fromarray(deep).save(path, format="PNG")
    elif damage == "cut short":
        save(path, size=(64, 64))
        path.write_bytes(path.read_bytes()[:300])
    else:
        path.write_text("hello")
    with pytest.raises(ValueError, match="train/cat/broken.jpg"):
        load(folder)


def test_broken_folders_say_what_is_wrong(folder, tmp_path):
    def refused(says):
        with pytest.raises(ValueError) as caught:
            load(folder)
        assert says in str(caught.value), caught.value

    with pytest.raises(ValueError, match="needs the folders train/ and test/"):
        load(tmp_path / "nowhere")
    (folder / "test/cat").rename(folder / "test/dog")
    refused("differ in cat, dog")
    (folder / "test/dog").rename(folder / "test/cat")
    (folder / "train/empty").mkdir()
    refused("empty")
    (folder / "train/empty").rmdir()
    shutil.rmtree(folder / "test")
    refused("needs the folders train/ and test/")
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()
    (folder / "test").mkdir()
    refused("one subfolder of images a class")


def test_an_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match="known are cifar10"):
        load_data("mnist", "", 8, CPU, augment=False, seed=0)
