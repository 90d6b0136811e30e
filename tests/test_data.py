"""The loaders: what is in a batch, that it depends on (seed, epoch) alone, and broken folders."""
import multiprocessing
import os
import shutil
import sys
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

import common
from common import FileLoader, ImageLoader, Split, load_data

CPU = torch.device("cpu")
pytestmark = [pytest.mark.filterwarnings("ignore:The image decoding"),     # see common.decode_image
              pytest.mark.filterwarnings("ignore:This DataLoader will create")]


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


# --- large pictures, which stay in their files ---------------------------------------------------

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """11 + 10 training and 5 + 4 other pictures of many sizes, and a folder of neither class."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for split, counts in (("train", (11, 10)), ("val", (5, 4))):
        for name, count in zip(("bird", "cat"), counts):
            (root / split / name).mkdir(parents=True)
            for n in range(count):
                coarse = Image.fromarray(generator.integers(0, 256, (6, 7, 3), dtype=np.uint8))
                picture = coarse.resize((70 + 9 * n, 110 - 4 * n), Image.Resampling.BICUBIC)
                picture.save(root / split / name / f"{n:02}.{'png' if n == 3 else 'jpg'}")
    (root / "test").mkdir()     # ImageNet's has no labels
    return root


def in_files(photos, **options):
    options = {"augment": True, "seed": 0, "image_size": 64, "workers": 0} | options
    return load_data("imagenet", photos, 8, CPU, **options)


def test_large_pictures_are_those_of_torchvisions_usual_transforms(photos):
    """By PIL, one by one: the middle for tests; crop and flip from each picture's own seed."""
    train, test = in_files(photos, seed=3)
    sources, _ = common.list_folder(photos, ("train", "val"))
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406),
                                                          (0.229, 0.224, 0.225)))

    def differs(images, others):
        return max((a * std + b.neg() * std).abs().mean().item() for a, b in zip(images, others))

    usual = transforms.Compose([transforms.Resize(73), transforms.CenterCrop(64),
                                transforms.ToTensor(), transforms.Normalize(mean.flatten(),
                                                                            std.flatten())])
    images, labels = whole_epoch(test)
    assert labels.tolist() == sources["val"].targets
    assert differs(images, [usual(picture) for picture, _ in sources["val"]]) < 0.01
    images, labels = whole_epoch(train, epoch=5)
    generator = torch.Generator().manual_seed(3 * 1_000_003 + 5)
    order = torch.randperm(21, generator=generator)
    seeds = torch.randint(2 ** 62, (21,), generator=generator)
    assert torch.equal(labels, torch.tensor(sources["train"].targets)[order])
    expected, mirrored = [], 0
    with torch.random.fork_rng():
        for n, seed in zip(order, seeds):
            picture = sources["train"][n][0]
            torch.manual_seed(seed)
            place = transforms.RandomResizedCrop.get_params(picture, (0.08, 1), (3 / 4, 4 / 3))
            picture = functional.resized_crop(picture, *place, [64, 64])
            if torch.rand(1) < 0.5:
                picture, mirrored = functional.hflip(picture), mirrored + 1
            expected.append((functional.to_tensor(picture) - mean) / std)
    assert differs(images, expected) < 0.01 and 3 < mirrored < 18
    assert differs(images, expected[::-1]) > 0.1


def test_pil_decodes_to_the_same_bits(photos, monkeypatch):
    """Where torchvision has no decoder any more, and for what it cannot read."""
    paths = sorted(photos.rglob("*/0*.*"))
    pictures = [common.decode(str(path)) for path in paths]
    monkeypatch.setattr(common, "decode_image", None)
    assert len(paths) > 20 and {path.suffix for path in paths} == {".jpg", ".png"}
    assert all(torch.equal(x, common.decode(str(path))) for x, path in zip(pictures, paths))


def test_the_number_of_workers_changes_no_batch(photos):
    before, epochs = torch.get_rng_state(), []
    for workers in (0, 1, 2, 4):
        train, test = in_files(photos, workers=workers, seed=1)
        epochs.append([*whole_epoch(train, 3), *whole_epoch(test)])
        assert len(train) == len(list(train)) == 3
    assert all(map(torch.equal, epochs[0] * 3, sum(epochs[1:], [])))
    assert torch.equal(before, torch.get_rng_state())
    images, _ = next(iter(train))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(epochs[0][0], whole_epoch(train, 4)[0])
    assert not torch.equal(epochs[0][0], whole_epoch(in_files(photos, seed=2)[0], 3)[0])


def test_imagenet_is_224_pixels_and_a_folder_32(photos, monkeypatch):
    train, test = in_files(photos, image_size=None, augment=False)
    assert next(iter(test))[0].shape == (8, 3, 224, 224)
    assert train.settings == {
        "data": "imagenet", "split": "test", "image_size": 224, "train_images": None,
        "images": [21, 9], "classes": 2, "in_files": True}
    parser = common.ArgumentParser()
    monkeypatch.setattr(sys, "argv", ["kd.py", "--dataset", "imagenet", "--lr", "1"])
    common.add_data_flags(parser)
    assert parser.get_default("image_size") == 224
    monkeypatch.setattr(sys, "argv", ["kd.py"])
    parser = common.ArgumentParser()
    common.add_data_flags(parser)
    assert parser.get_default("image_size") == 32


def test_which_folders_stay_in_their_files(photos, tmp_path, capsys, monkeypatch):
    for split in ("train", "val"):
        shutil.copytree(photos / split, tmp_path / split)
    kinds, said = [], []
    for size, kind in ((24, ImageLoader), (64, FileLoader)):
        loaders = load(tmp_path, image_size=size, workers=0)
        kinds.append([type(loader) is kind for loader in loaders])
        said.append(capsys.readouterr().out)
    assert kinds == [[True, True]] * 2 and said[0] == ""
    assert said[1].count("\n") == 1 and "64 pixels or more stay in their files" in said[1]
    train, _ = loaders      # its colours are those of the pictures' middles
    train.left_out = 0
    seen = whole_epoch(train)[0].double()
    assert seen.mean((0, 2, 3)).abs().max() < 1e-5 and "in_files" in train.settings
    assert (seen.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    few, held_out = load(tmp_path, image_size=64, workers=0, train_images=6, split="val")
    assert few.labels.bincount().tolist() == [3, 3] and len(held_out.labels) == 2
    assert not {*few.images} & {*held_out.images} and torch.equal(few.mean, train.mean)
    monkeypatch.setattr(os, "sysconf", lambda name: 200)        # 40,000 bytes of memory
    assert isinstance(load(tmp_path, image_size=24, workers=0)[0], FileLoader)
    assert "GiB" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_large_picture_is_named_and_no_worker_stays(photos, tmp_path, workers):
    for split in ("train", "val"):
        shutil.copytree(photos / split, tmp_path / split)
    train, test = in_files(tmp_path, workers=workers)
    batches = iter(train)
    next(batches)
    del batches     # an epoch that is broken off
    path = tmp_path / "val/cat/02.jpg"
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(common.UserError) as caught:
        whole_epoch(test)
    assert str(caught.value).startswith(f"cannot decode {path} (") and "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_one_line():
    """torch raises it from a signal, wherever the program then is."""
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert "fewer --workers" in common.one_line(error)


def test_one_image_alone_is_still_a_list_of_one():
    """51 images: the last of the parts of 50, of which colours are measured, has one."""
    split = common.Split(np.array(["one", "two"], dtype=object), torch.arange(2))
    chosen = common.subset(split, torch.tensor([1]))
    assert chosen.images.tolist() == ["two"] and chosen.labels.tolist() == [1]


def test_training_from_files(photos, cli, tmp_path):
    flags = ["--dataset", "imagenet", "--data-dir", photos, "--image-size", "64", "--batch-size", 8,
             "--student", "imagenet_mobilenet", "--device", "cpu", "--out", tmp_path / "runs"]
    done = cli("kd", *flags, "--baseline", "--epochs", "1")
    assert done.code == 0 and "imagenet/baseline/imagenet_mobilenet" in done.out
    assert "no recipe for imagenet" in cli("fsp", *flags).mistyped()
    line = cli("kd", *flags, "--teacher", "imagenet_resnet18", "--teacher-ckpt",
               "ResNet18_Weights.NONE").refused()
    assert "torchvision has no such weights" in line


# --- shares of several processes -----------------------------------------------------------------

def of_each(monkeypatch, shares, make):
    """make() as each of so many processes would call it."""
    loaders = []
    for rank in range(shares):
        monkeypatch.setattr(common, "processes", lambda rank=rank: (rank, shares))
        loaders.append(make())
    return loaders


@pytest.mark.parametrize("kind", ["memory", "memory, augment", "files"])
@pytest.mark.parametrize("shares", [2, 4])
def test_the_shares_of_a_batch_are_the_batch(shares, kind, photos, monkeypatch):
    def make():
        if kind == "files":
            return in_files(photos, seed=1)[0]
        return loader_of(pictures(30), batch_size=8, augment="augment" in kind)

    alone = make()
    alone.set_epoch(2)
    batches, seen = list(alone), 0
    loaders = of_each(monkeypatch, shares, make)
    for loader in loaders:
        loader.set_epoch(2)
    steps = list(zip(*loaders, strict=True))
    assert {len(loader) for loader in loaders} == {len(steps)}
    assert loaders[0].settings == alone.settings
    for (images, labels), parts in zip(batches, steps):
        assert len({len(part[1]) for part in parts}) == 1 and len(parts[0][1]) > 1
        whole = shares * len(parts[0][1])
        seen += whole
        for rank, part in enumerate(parts):
            assert torch.equal(part[0], images[:whole][rank::shares])
            assert torch.equal(part[1], labels[:whole][rank::shares])
    # the last batch has 6 images, of files 5: a pair for each of two, and none for each of four
    assert len(alone.labels) - seen == {2: {30: 0, 21: 1}, 4: {30: 6, 21: 5}}[shares][
        len(alone.labels)]


@pytest.mark.parametrize("count", [9, 11, 16])
def test_all_processes_together_measure_every_image_once(count, monkeypatch):
    images = pictures(count)
    loaders = of_each(monkeypatch, 4, lambda: loader_of(images, batch_size=8, augment=False,
                                                        shuffle=False))
    parts = [[batch for batch, _ in loader] for loader in loaders]
    assert [len(part) for part in parts] == [len(loader) for loader in loaders]
    together = torch.cat(sum(parts, [])).permute(0, 2, 3, 1).byte()
    assert sorted(x.numpy().tobytes() for x in together) == sorted(
        x.numpy().tobytes() for x in images)


def test_what_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setattr(common, "processes", lambda: (0, 4))
    for batch_size, says in ((6, "--batch-size 6 is for all 4"), (4, "two or more"),
                             (8, "7 training images are too few for 4")):
        with pytest.raises(common.UserError, match=says):
            load_data("shapes", "", batch_size, CPU, augment=False, seed=0, train_images=7)


@pytest.mark.parametrize("rank, order", [(0, ["read", "wait"]), (1, ["wait", "read"])])
def test_the_first_process_reads_first(rank, order, monkeypatch):
    done = []
    monkeypatch.setattr(common, "processes", lambda: (rank, 2))
    monkeypatch.setattr(common, "wait_for_all", lambda: done.append("wait"))
    common.in_turn(lambda: done.append("read"))
    assert done == order
    with pytest.raises(common.UserError):       # which no other process waits for in vain
        common.in_turn(lambda: load_data("folder", "nowhere", 8, CPU, augment=False, seed=0))
    assert done.count("wait") == 2
