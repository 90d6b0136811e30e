"""The loaders: what is in a batch, that (seed, epoch) alone decides it, and what people bring."""
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import transforms

import common
from common import FileLoader, ImageLoader, Split, UserError, load_data
from conftest import ROOT


def loader_of(images, labels=None, *, batch_size=7, **options):
    labels = torch.arange(len(images)) % 10 if labels is None else labels
    options = {"shuffle": True, "augment": True, **options}
    return ImageLoader(Split(images, labels), [str(n) for n in range(10)], torch.zeros(3),
                       torch.ones(3), batch_size, torch.device("cpu"), **options)


def pictures(count=23, size=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)


def load(folder, dataset="folder", **options):
    return load_data(dataset, folder, 8, "cpu", **dict(augment=False, seed=0, workers=0) | options)


def whole_epoch(loader, epoch=0):
    loader.set_epoch(epoch)
    images, labels = zip(*loader)
    return torch.cat(images), torch.cat(labels)


# --- batches ------------------------------------------------------------------------------------
@pytest.mark.parametrize("size, mode", [(16, "constant"), (32, "constant"), (32, "reflect")])
def test_crop_and_flip_are_those_of_a_slow_reference(size, mode):
    images, margin = pictures(size=size), size // 8
    got, labels = whole_epoch(loader_of(images, seed=3, reflect=mode == "reflect"), epoch=5)
    generator = torch.Generator().manual_seed(3 * 1_000_003 + 5)
    order = torch.randperm(len(images), generator=generator)
    shift = torch.randint(2 * margin + 1, (2, len(images)), generator=generator)
    flip = torch.randint(2, (len(images),), generator=generator)
    for position, n in enumerate(order.tolist()):
        picture = images[n].numpy()[:, ::-1] if flip[position] else images[n].numpy()
        padded = np.pad(picture, ((margin, margin), (margin, margin), (0, 0)), mode)
        down, right = shift[:, position].tolist()
        crop = padded[down:down + size, right:right + size].transpose(2, 0, 1)
        assert np.array_equal(got[position].numpy(), crop) and labels[position] == n % 10


@pytest.mark.parametrize("augment", [False, True])
def test_an_epoch_is_a_permutation_and_one_image_alone_is_no_batch(augment):
    """BatchNorm cannot normalise one image; another sits out each epoch. Tests measure each."""
    images = pictures(22)
    images[..., 0] = torch.arange(22, dtype=torch.uint8)[:, None, None]     # red names the picture
    def seen(loader, epoch=0):
        return sorted(whole_epoch(loader, epoch)[0][:, 0].amax((1, 2)).tolist())
    assert seen(loader_of(images, batch_size=8, augment=augment)) == list(range(22))
    loader = loader_of(images, augment=augment)
    assert len(loader) == 3 and [len(labels) for _, labels in loader] == [7, 7, 7]
    assert len(set.union(*(set(range(22)) - set(seen(loader, epoch)) for epoch in range(8)))) > 3
    measured = loader_of(images, augment=False, shuffle=False)
    assert len(measured) == 4 and seen(measured) == list(range(22))


def test_batches_depend_on_seed_and_epoch_alone():
    one, other, before = loader_of(pictures(), seed=1), loader_of(pictures()), torch.get_rng_state()
    first = whole_epoch(one, 4)
    assert torch.equal(before, torch.get_rng_state()), "the global generator is the network's"
    whole_epoch(other, 2)                       # another history, the same epoch
    torch.rand(5)
    assert not torch.equal(first[0], whole_epoch(other, 4)[0])
    other.set_epoch(0, seed=1)
    assert all(map(torch.equal, first, whole_epoch(other, 4)))
    assert not torch.equal(first[0], whole_epoch(one, 5)[0])
    other.batch_size = 5                        # the same pictures, cut elsewhere
    assert torch.equal(first[0], whole_epoch(other, 4)[0])


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_made_together_are_those_made_alone(shuffle, world):
    """As on a GPU: 16 at once are normalised and cut together, then dealt."""
    loader = loader_of(pictures(38), shuffle=shuffle, augment=shuffle, batch_size=6)
    loader.world = world
    alone = [*loader]
    loader.at_once = 4
    together = [*loader]
    assert [len(labels) for _, labels in alone] == [6 // world] * 6 + [2 // world]
    assert all(torch.equal(x, y) for pair in zip(alone, together, strict=True)
               for x, y in zip(*pair))
    assert together[0][0].is_contiguous(memory_format=torch.channels_last)


# --- data sets ----------------------------------------------------------------------------------
def test_shapes_are_drawn_alike_and_know_where_the_object_is():
    split, again = (common.draw_shapes.__wrapped__(500, 3) for _ in range(2))
    assert torch.equal(split.images, again.images) and torch.equal(split.masks, again.masks)
    assert split.images.dtype == torch.uint8 and split.images.shape == (500, 16, 16, 3)
    assert torch.equal(split.labels.bincount(), torch.full((10,), 50))
    share = split.masks.float().mean((1, 2))
    assert 0.05 < share.min() and share.max() < 0.75
    # the object has one colour, the background many: pixels vary less inside than outside
    inside, outside = (sum(image[mask].float().var(0).mean() for image, mask in zip(
        split.images, masks)) for masks in (split.masks, ~split.masks))
    assert inside < 0.5 * outside


def test_batches_are_normalised_and_train_images_a_fair_nested_sample():
    train, test = load("", "shapes")
    images, labels = next(iter(train))
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert images.shape == (8, 3, 16, 16) and test.masks.shape == (2000, 16, 16)
    assert images.is_contiguous(memory_format=torch.channels_last)
    everything = whole_epoch(train)[0].transpose(0, 1).flatten(1)
    assert everything.mean(1).abs().max() < 1e-4 and (everything.std(1) - 1).abs().max() < 1e-3
    mean, std = (torch.tensor(x)[:, None, None] for x in (test.mean, test.std))
    raw = common.draw_shapes(2000, seed=3).images.permute(0, 3, 1, 2)
    assert torch.equal((255 * (whole_epoch(test)[0] * std + mean)).round().byte(), raw)
    few, _ = load("", "shapes", train_images=100)
    more, val = load("", "shapes", train_images=250, seed=5, split="val")
    assert len(few.labels) == 100 and torch.equal(few.labels.bincount(), torch.full((10,), 10))
    assert {x.tobytes() for x in few.images.numpy()} < {x.tobytes() for x in more.images.numpy()}
    assert few.mean == more.mean == train.mean, "normalised by the whole split"
    assert not torch.equal(test.images, val.images)
    with pytest.raises(UserError, match="4001 training images asked for, shapes has 4000"):
        load("", "shapes", train_images=4001)


class FakeCIFAR:
    url, filename, base_folder = "https://host/cifar.tar.gz", "cifar.tar.gz", "cifar-batches"

    def __init__(self, root, train, download):
        if str(root) == "offline":
            raise OSError("no route to host")
        self.data, self.classes = pictures(40 if train else 10, 32).numpy(), ["cat", "dog"]
        self.targets = [n % 2 for n in range(len(self.data))]


def test_cifar_comes_from_torchvision(monkeypatch):
    monkeypatch.setattr(common.datasets, "CIFAR10", FakeCIFAR)
    train, test = load("data", "cifar10", augment=True)
    assert (len(train.labels), len(test.labels), train.num_classes) == (40, 10, 2)
    train, val = load("data", "cifar10", split="val")
    assert (len(train.labels), len(val.labels)) == (36, 4) and val.settings["split"] == "val"
    assert len({x.tobytes() for x in torch.cat([val.images, train.images]).numpy()}) == 40
    with pytest.raises(UserError, match="no route.*; put cifar.tar.gz or .* cifar-batches in off"):
        load("offline", "cifar10")


# --- folders ------------------------------------------------------------------------------------
def save(path, colour=(5, 250, 5), mode="RGB", size=(70, 70), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        for n in range(count):
            save(tmp_path / "pets" / split / "bird" / f"{n}.png", (250, 5, 5))
            save(tmp_path / "pets" / split / "cat" / f"{n}.png")
    return tmp_path / "pets"


def test_a_folder_is_known_by_its_name_and_classes(folder, tmp_path, monkeypatch):
    train, test = load(folder)
    assert train.settings == test.settings == {
        "data": "pets", "split": "test", "image_size": 32, "images": [8, 4],
        "class_names": ["bird", "cat"], "mean": [0.5, 0.5, 0.02], "std": [0.48, 0.48, 0.0]}
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to("elsewhere")
    assert load(f"{folder}/")[0].settings == train.settings
    for split in ("train", "test"):
        (folder / split / "cat").rename(folder / split / "dog")
    assert load(folder)[0].settings == train.settings | {"class_names": ["bird", "dog"]}
    monkeypatch.chdir(folder)
    assert load(".")[0].settings["data"] == "elsewhere"


@pytest.mark.parametrize("rename, dataset", [
    ("val", "folder"), ("valid", "cinic10"), ("val", "imagenet"), ("test", "folder")])
def test_which_split_is_measured(folder, rename, dataset):
    (folder / "test").rename(folder / rename)
    for split in ("test", "val"):
        train, measured = load(folder, dataset, split=split, image_size=64)
        assert train.settings["split"] == (split if rename == "test" else "val")
        held_out = rename == "test" and split == "val"      # one of the 8 training images
        assert train.settings["images"] == ([7, 1] if held_out else [8, 4])


FOUND = "pets: 2 classes (bird, cat), "
BROUGHT = {     # what people bring, as commands in pets/train, and what they are told
    "mv ../../more/* cat": FOUND + "15 train and 4 test images\n",
    "cp -r cat .ipynb_checkpoints; cp -r .ipynb_checkpoints cat/.trash; touch bird/._0.png; ln -s "
    ".. up; ln -s ../.. cat/up; ln -s bird again; ln -s . cat/self; ln -s ../../test/cat cat/test":
        FOUND + "8 train and 4 test images\n",
    "mv cat ../../pool; ln -s ../../pool cat": FOUND + "8 train and 4 test images\n",
    "touch cat/a.GIF notes.txt ../test/cat/LICENSE":
        FOUND + "8 train and 4 test images, 3 files left out (.gif, .txt, LICENSE)\n",
    "rm -r ../test": "needs the folders train/ and test/ or val/ or valid/, with one subfolder",
    "cp cat/* .; rm -r cat bird": "train needs two or more subfolders of images, one per class",
    "mkdir dog ../test/dog": "train/dog has no images (.jpg, .jpeg, .png",
    "mv ../test ../val; cp -r ../val ../valid": "has both val/ and valid/: remove or rename one",
    "ln -s train ../val": "the classes of train/ and val/ differ in bird, cat; give both",
    "mv ../../deep.jpg cat": "cat/deep.jpg (it has more than 8 bits per channel",
    "head -c 300 ../../more/photo.JPEG > cat/x.jpg": "cat/x.jpg (",
    "echo hello > cat/x.jpg": "cat/x.jpg (cannot identify image file",
    "ln -s nowhere cat/x.jpg": "cat/x.jpg ([Errno 2] No such file or directory"}


@pytest.mark.parametrize("size, workers, kind", [(63, 2, ImageLoader), (64, 1, FileLoader)])
@pytest.mark.parametrize("command", BROUGHT)
def test_what_people_bring(folder, command, size, workers, kind, capsys):
    more, says = folder.parent / "more", BROUGHT[command]
    for mode in ("L", "P", "CMYK", "1"):
        save(more / f"{mode}.tif", mode=mode, size=(40, 90))
    save(more / "photo.JPEG")
    save(more / "deeper/and/deeper.webp")
    Image.new("RGB", (70, 70), "lime").save(more / "moving.jpg", format="GIF", save_all=True,
                                            append_images=[Image.new("RGB", (70, 70), "red")])
    save(folder.parent / "deep.jpg", mode="I;16", format="PNG")
    subprocess.run(command, shell=True, check=True, cwd=folder / "train")
    if says.startswith(FOUND):
        train, _ = load(folder, image_size=size, workers=workers)
        images, labels = whole_epoch(train)
        assert type(train) is kind and images.mean((0, 2, 3)).abs().max() < 1e-2
        assert capsys.readouterr().out == says and len(labels) == int(says.split()[5])
        greener = images[:, 1, 20, 20] > images[:, 0, 20, 20]
        assert torch.equal(greener, labels == 1) or "more" in command
    else:
        with pytest.raises(UserError, match=f"^.*{folder}.*$") as caught:
            load(folder, image_size=size, workers=workers)
        assert says in str(caught.value)


def test_pictures_are_upright_and_white_where_transparent(tmp_path):
    upright, path = Image.fromarray(pictures(1)[0].numpy()).crop((0, 0, 16, 9)), tmp_path / "x.png"
    for orientation, undo in enumerate([1, 2, 3, 4, 5, 8, 7, 6], 1):
        tag, held = Image.Exif(), upright.copy()
        held.getexif()[0x112], tag[0x112] = undo, orientation
        ImageOps.exif_transpose(held).save(path, exif=tag)
        assert np.array_equal(common.decode(path), upright), orientation
    for mode, transparent in (("RGBA", None), ("LA", None), ("P", 0), ("P", bytes([0, 128])),
                              ("L", 0), ("RGB", (0, 0, 0))):
        Image.new(mode, (4, 4), 0).save(path, transparency=transparent)
        assert common.decode(path).getpixel((2, 2)) == (255, 255, 255), mode


def test_warnings_as_errors_unknown_names_and_what_may_not_be_read(folder, monkeypatch):
    code = ("import sys, common; common.Image.MAX_IMAGE_PIXELS = 3000     # PIL warns of more\n"
            "for size in (32, 64): common.load_data('folder', sys.argv[1], 4, 'cpu', augment=False,"
            " seed=0, workers=1, image_size=size)")
    subprocess.run([sys.executable, "-B", "-W", "error", "-c", code, folder], check=True, cwd=ROOT)
    for dataset in ("mnist", "shapes"):
        with pytest.raises(UserError, match="known are cifar10|of shapes have 16 pixels"):
            load("", dataset, image_size=24)
    def forbidden(path):        # to everybody but root
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(PermissionError, match="pets/train"):
        load(folder)


# --- pictures that stay in their files ------------------------------------------------------------
@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """11 + 10 training and 5 + 4 other pictures of many sizes, and a folder of neither class."""
    root, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for kind, count in (("train/bird", 11), ("train/cat", 10), ("val/bird", 5), ("val/cat", 4)):
        for n in range(count):
            coarse = Image.fromarray(generator.integers(0, 256, (6, 7, 3), dtype=np.uint8))
            (root / kind).mkdir(parents=True, exist_ok=True)
            coarse.resize((70 + 9 * n, 110 - 4 * n), Image.Resampling.BICUBIC).save(
                root / kind / f"{n:02}.{'png' if n == 3 else 'jpg'}")
    (root / "test").mkdir()     # ImageNet's has no labels
    return root


def in_files(photos, seed=0, workers=0):
    return load(photos, "imagenet", augment=True, image_size=64, seed=seed, workers=workers)


def test_pictures_are_those_of_torchvisions_usual_transforms(photos):
    """By PIL, one by one: the middle for tests; crop and flip from each picture's own seed."""
    train, test = in_files(photos, seed=3)
    usual = transforms.Compose([transforms.ToTensor(), transforms.Normalize(
        (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    middle = transforms.Compose([transforms.Resize(73), transforms.CenterCrop(64), usual])
    for image, path in zip(whole_epoch(test)[0], test.images, strict=True):
        assert (image - middle(Image.open(path))).abs().mean() < 0.04
    before, workers = torch.get_rng_state(), in_files(photos, seed=3, workers=2)[0]
    images, labels = whole_epoch(train, 5)
    assert torch.equal(images, whole_epoch(workers, 5)[0]), "the number of workers changes nothing"
    assert torch.equal(before, torch.get_rng_state()) and train.settings["in_files"]
    assert next(iter(workers))[0].is_contiguous(memory_format=torch.channels_last)
    pass_seed = 3 * 1_000_003 + 5
    order = torch.randperm(21, generator=torch.Generator().manual_seed(pass_seed))
    assert torch.equal(labels, (order >= 11).long())
    with torch.random.fork_rng():
        for image, n in zip(images, order.tolist(), strict=True):
            picture = Image.open(train.images[n])
            torch.manual_seed(pass_seed * 1_000_003 + n)
            place = transforms.RandomResizedCrop.get_params(picture, (0.08, 1), (3 / 4, 4 / 3))
            picture = transforms.functional.resized_crop(picture, *place, [64, 64])
            if torch.rand(1) < 0.5:
                picture = transforms.functional.hflip(picture)
            assert (image - usual(picture)).abs().mean() < 0.04


def test_what_goes_wrong_in_a_worker_is_one_line_and_no_worker_stays(photos, tmp_path, monkeypatch):
    shutil.copytree(photos, tmp_path / "photos")
    train, test = in_files(tmp_path / "photos", workers=2)
    path = tmp_path / "photos/val/cat/02.jpg"
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(UserError, match=rf"^cannot decode {path} \(.*\); repair or remove it$"):
        whole_epoch(test)
    assert not multiprocessing.active_children()
    with pytest.raises(UserError, match="^a process that decodes images was killed: try fewer"):
        for _ in train:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(0.2)     # a signal that torch would raise in, here
    assert not multiprocessing.active_children()
    small = [str(photos / "train/cat/00.jpg"), str(photos / "train/bird/00.jpg")] * 500
    squares = common.read_squares(small, 8, workers=2)      # so many are read by processes, too
    for number in (0, 1, 499, 999):
        assert torch.equal(squares[number], common.read_square(small[number], 8))
    with pytest.raises(UserError, match=rf"^cannot decode {path} \(.*\); repair or remove it$"):
        common.read_squares([*small, str(path)], 8, workers=2)
    assert not multiprocessing.active_children()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Namespace(free=1 << 18))
    assert in_files(photos, workers=1)      # 2 batches of 8 images of 12 KB
    with pytest.raises(UserError, match=r"--workers 2 need 0 MB of /dev/shm.*--workers 0"):
        in_files(photos, workers=2)


def test_training_from_files(photos, cli, tmp_path):
    flags = [*"--dataset imagenet --image-size 64 --batch-size 8 --student imagenet_mobilenet "
             "--device cpu --out".split(), tmp_path / "runs", "--data-dir", photos]
    done = cli("kd", *flags, "--baseline", "--epochs", "1")
    assert done.code == 0 and "val accuracy" in done.out, done.all
    assert (tmp_path / "runs/imagenet/imagenet-guo/baseline/imagenet_mobilenet/seed0").is_dir()
    line = cli("kd", *flags, "--teacher", "imagenet_resnet18", "--teacher-ckpt",
               "ResNet18_Weights.NONE").refused()
    assert "torchvision has no " in line


# --- shares of several processes -----------------------------------------------------------------
def of_each(monkeypatch, shares, make):
    """make() as each of so many processes would call it."""
    for rank in range(shares):
        monkeypatch.setattr(common, "processes", lambda: (rank, shares))
        yield make()


@pytest.mark.parametrize("kind, shares, left_out", [
    ("memory", 2, 0), ("memory", 4, 6), ("augment", 4, 6), ("files", 2, 1), ("files", 4, 5)])
def test_the_shares_of_a_batch_are_the_batch(kind, shares, left_out, photos, monkeypatch):
    """The last of 30 images has 6, of 21 in files 5: a pair for each of two, none for each of 4."""
    def make():
        return (in_files(photos)[0] if kind == "files" else
                loader_of(pictures(30), batch_size=8, augment=kind == "augment"))
    alone, seen = make(), 0
    batches, loaders = list(alone), list(of_each(monkeypatch, shares, make))
    steps = list(zip(*loaders, strict=True))
    assert {len(loader) for loader in loaders} == {len(steps)}
    assert loaders[0].settings == alone.settings
    for (images, labels), parts in zip(batches, steps):
        whole = shares * len(parts[0][1])
        seen += whole
        assert whole > shares and {len(part[1]) for part in parts} == {whole // shares}
        for rank, part in enumerate(parts):
            assert torch.equal(part[0], images[:whole][rank::shares])
            assert torch.equal(part[1], labels[:whole][rank::shares])
    assert len(alone.labels) - seen == left_out


@pytest.mark.parametrize("count", [9, 11, 16, "files"])
def test_all_processes_together_measure_every_image_once(count, photos, monkeypatch):
    def make():
        return (in_files(photos)[1] if count == "files" else
                loader_of(pictures(count), batch_size=8, augment=False, shuffle=False))
    alone = [x.numpy().tobytes() for images, _ in make() for x in images]
    loaders = list(of_each(monkeypatch, 4, make))
    parts = [[batch for batch, _ in loader] for loader in loaders]
    assert [len(part) for part in parts] == [len(loader) for loader in loaders]
    assert sorted(x.numpy().tobytes() for x in torch.cat(sum(parts, []))) == sorted(alone)


def test_who_downloads_first_and_what_cannot_be_shared(monkeypatch):
    done = []
    monkeypatch.setattr(common.distributed, "all_reduce", lambda x: done.append("wait"))
    for rank, order in ((1, ["wait", "fetch"]), (0, ["fetch", "wait"])):
        monkeypatch.setattr(common, "processes", lambda: (rank, 4))
        common.rank0_first(lambda: done.append("fetch"))
        assert done[-2:] == order
    with pytest.raises(ZeroDivisionError):      # which no other process waits for in vain
        common.rank0_first(lambda: 1 / 0)
    assert done.count("wait") == 3
    for batch_size, says in ((10, "size 10: .* equally"), (4, "two images"), (8, "7 .* too few")):
        with pytest.raises(UserError, match=says):
            load_data("shapes", "", batch_size, "cpu", augment=False, seed=0, train_images=7)
