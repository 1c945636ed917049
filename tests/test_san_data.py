"""Pairs are right, the stream of patches is a function of its seed, and bad files are named."""

import pickle

import pytest
import torch

pytest.importorskip("png", reason="san_model needs the extra [san]")
from torch.utils.data import DataLoader

from san_model.collage import collage
from san_model.data import Batches, Pair, Patches, by_name, collages_of, dataset_name, find_pairs, load_pairs
from san_model.images import InputError, Picture, bicubic, read_uint8, write


def random_image(height, width, seed=0):
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed)).float()


@pytest.fixture
def folder(tmp_path):
    """Three HR images in a folder HR; sides that scale 2 divides, but for the last."""
    for index, size in enumerate([(40, 36), (36, 48), (41, 33)]):
        write(tmp_path / "HR" / f"image{index}.png", Picture(random_image(*size, seed=index)))
    return tmp_path


def write_lr(folder, scale=2):
    for path in (folder / "HR").iterdir():
        image = read_uint8(path)
        image = image[:, : image.shape[1] // scale * scale, : image.shape[2] // scale * scale]
        small = Picture(bicubic(image, scale, down=True).float())
        write(folder / "LR_bicubic" / f"X{scale}" / f"{path.stem}x{scale}.png", small)


def test_lr_images_are_made_or_taken_and_are_the_same(folder):
    made = load_pairs([folder], 2)
    write_lr(folder)
    taken = load_pairs([folder], 2)
    assert all(paths.lr is not None for paths in find_pairs(folder, 2))
    assert [p.lr for p in find_pairs(folder / "HR", 2)] == [p.lr for p in find_pairs(folder, 2)]
    assert all(paths.lr is None for paths in find_pairs(folder, 3))
    for a, b in zip(made, taken, strict=True):
        assert torch.equal(a.lr, b.lr) and torch.equal(a.hr, b.hr)
        assert a.hr.shape[1:] == (a.lr.shape[1] * 2, a.lr.shape[2] * 2)
    assert made[2].hr.shape == (3, 40, 32)
    assert dataset_name(folder / "HR") == dataset_name(folder) == folder.name
    assert by_name([folder], "--val") == {folder.name: folder}
    with pytest.raises(InputError, match=f"--val .*: another folder is called '{folder.name}'"):
        by_name([folder, folder / "HR"], "--val")


def test_an_lr_image_of_another_size_is_refused(folder):
    write_lr(folder)
    write(folder / "LR_bicubic/X2/image1x2.png", Picture(random_image(18, 23)))
    with pytest.raises(InputError, match=r"image1x2\.png: 23 x 18, but 24 x 18 belongs to .*image1\.png"):
        load_pairs([folder], 2)


def test_bad_files_are_refused_or_skipped(folder):
    (folder / "HR/broken.png").write_bytes(b"\x89PNG nothing")
    write(folder / "HR/tiny.png", Picture(random_image(20, 20)))
    with pytest.raises(InputError, match=r"broken\.png: cannot be read"):
        load_pairs([folder], 2, least=16)
    lines = []
    pairs = load_pairs([folder], 2, least=16, bad_files="skip", report=lines.append)
    assert [pair.path.stem for pair in pairs] == ["image0", "image1", "image2"]
    assert len(lines) == 2 and "broken.png" in lines[0] and "tiny.png: 20 x 20 is too small, 32 a side" in lines[1]
    with pytest.raises(InputError, match="no usable image"):
        load_pairs([folder], 2, least=100, bad_files="skip", report=lines.append)
    with pytest.raises(InputError, match=r"--val .*absent: no such folder"):
        load_pairs([folder / "absent"], 2, argument="--val")
    with pytest.raises(InputError, match="--bad-files: expected refuse or skip, got 'ignore'"):
        load_pairs([folder], 2, bad_files="ignore")


def test_the_cache_holds_the_same_images(folder, monkeypatch):
    cache = folder / "cache"
    first = load_pairs([folder], 2, cache=cache)
    files = sorted(cache.iterdir())
    assert len(files) == 6
    monkeypatch.setattr("san_model.data.load_pair", None)  # nothing is decoded a second time
    second = load_pairs([folder], 2, cache=cache)
    for a, b, c in zip(load_pairs([folder], 2, cache=cache), first, second, strict=True):
        assert torch.equal(a.hr, b.hr) and torch.equal(a.lr, c.lr)
    monkeypatch.undo()
    write(folder / "HR/image0.png", Picture(random_image(40, 36, seed=9)))
    assert not torch.equal(load_pairs([folder], 2, cache=cache)[0].hr, first[0].hr)


@pytest.mark.parametrize("bad_files", ["refuse", "skip"])
def test_a_damaged_cache_is_made_anew(folder, bad_files):
    cache, whole = folder / "cache", load_pairs([folder], 2)
    load_pairs([folder], 2, cache=cache)
    for number, file in enumerate(sorted(cache.iterdir())):
        content = file.read_bytes()
        file.write_bytes([b"", b"junk" * 100, content[:50], content[:-1], content.replace(b"|u1", b"|i1")][number % 5])
    for _ in range(2):
        for a, b in zip(load_pairs([folder], 2, cache=cache, bad_files=bad_files), whole, strict=True):
            assert torch.equal(a.lr, b.lr) and torch.equal(a.hr, b.hr)
    assert len(list(cache.iterdir())) == 6
    hr = sorted(cache.glob("*-hr.npy"))
    hr[0].write_bytes(hr[1].read_bytes())  # of another image
    assert torch.equal(load_pairs([folder], 2, cache=cache)[0].hr, whole[0].hr)


def test_smaller_copies(folder):
    """Each image is followed by its copies, whose LR images are made of them."""
    write_lr(folder)
    pairs = load_pairs([folder], 2, shrink=[0.75, 0.5])
    assert [pair.shrink for pair in pairs] == [1.0, 0.75, 0.5] * 3
    assert [tuple(pair.hr.shape[1:]) for pair in pairs[6:]] == [(40, 32), (30, 24), (20, 16)]
    for pair in pairs:
        assert torch.equal(pair.lr, bicubic(pair.hr, 2, down=True))
    whole = read_uint8(pairs[0].path).float()
    halves = whole.unfold(1, 2, 2).unfold(2, 2, 2).mean((3, 4))  # bicubic is off by a fraction of such random numbers
    assert (pairs[2].hr - halves).abs().mean() < 0.5 * (halves - halves.mean()).abs().mean()
    cached = [load_pairs([folder], 2, shrink=[0.5], cache=folder / "cache") for _ in range(2)]
    for loaded in cached:
        assert all(torch.equal(a.hr, b.hr) for a, b in zip(loaded[1::2], pairs[2::3], strict=True))
    assert "image0.png at 0.5 of its size: LR rows 3..8" in Patches(pairs[2:3], 2, 6, seed=0, augment=False).describe(1)
    with pytest.raises(InputError, match=r"image0\.png at 0.25 of its size: 8 x 10 is too small"):
        load_pairs([folder], 2, shrink=[0.25], least=6)


def test_collages(folder):
    """Their edges, which the images do not have, are drawn as finely as the pixels allow, and are the seed's."""
    ramp = torch.arange(300.0).expand(3, 200, 300) / 300 * 255
    images = [ramp.byte(), ramp.flip(2).byte()]
    first, again, next_one, of_another_seed = (collage(images, *key, 256) for key in ((1, 0), (1, 0), (1, 1), (2, 0)))
    assert first.shape == (3, 256, 256) and first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, next_one) and not torch.equal(first, of_another_seed)
    steps = [image.float().diff(dim=2).abs() for image in (images[0], first)]
    assert steps[0].max() <= 1 and steps[1].max() > 100
    assert (steps[1] <= 3).float().mean() > 0.5  # within shapes it is as smooth as the images

    pairs = load_pairs([folder], 3)
    collages = collages_of(pairs, 3, 2, seed=1)
    assert [pair.path.name for pair in collages] == ["collage 0", "collage 1"]
    for pair in collages:
        assert pair.hr.shape == (3, 1023, 1023) and torch.equal(pair.lr, bicubic(pair.hr, 3, down=True))
    assert collages_of(pairs, 2, 1, seed=1, least=600)[0].lr.shape == (3, 600, 600)
    assert "collage 0: LR rows" in Patches(collages[:1], 3, 32, seed=0).describe(0)


def coordinates(height, width, scale):
    """A pair whose pixels say where they are: rows in channel 0, columns in channel 1, a constant in channel 2."""

    def grid(h, w, step):
        rows, columns = torch.meshgrid(torch.arange(h) // step, torch.arange(w) // step, indexing="ij")
        return torch.stack([rows, columns, torch.full_like(rows, 7)]).to(torch.uint8)

    return grid(height, width, 1), grid(height * scale, width * scale, scale)


def test_patches_fit_together_and_cover_everything():
    pairs = [Pair(None, *coordinates(9, 12, 3)), Pair(None, *coordinates(8, 8, 3))]
    patches = Patches(pairs, scale=3, patch=8, seed=5)
    places = [patches.place(index) for index in range(400)]
    for index, place in enumerate(places):
        lr, hr, number = patches[index]
        assert number == index and lr.shape == (3, 8, 8) and hr.shape == (3, 24, 24)
        assert torch.equal(hr[:, ::3, ::3], lr) and lr.is_contiguous() and hr.is_contiguous()
        assert lr[0].min() == place.top and lr[1].min() == place.left
    for epoch in range(200):
        assert {place.image for place in places[2 * epoch : 2 * epoch + 2]} == {0, 1}
    assert {(p.top, p.left) for p in places if p.image == 0} == {(t, le) for t in range(2) for le in range(5)}
    assert len({p[3:] for p in places}) == 8
    plain = Patches(pairs, scale=3, patch=8, seed=5, augment=False)
    assert not any(any(plain.place(index)[3:]) for index in range(50))


def test_the_stream_is_a_function_of_the_seed(folder):
    pairs = load_pairs([folder], 2)
    patches = Patches(pairs, 2, 12, seed=3)

    def stream(patches, workers, start=0):
        loader = DataLoader(patches, batch_sampler=Batches(start, 6, 4), num_workers=workers)
        return [torch.cat([lr.flatten(), hr.flatten()]) for lr, hr, _ in loader]

    alone = stream(patches, 0)
    assert torch.equal(torch.stack(alone), torch.stack(stream(patches, 2)))
    assert torch.equal(torch.stack(alone[4:]), torch.stack(stream(pickle.loads(pickle.dumps(patches)), 0, start=4)))
    assert not torch.equal(torch.stack(alone), torch.stack(stream(Patches(pairs, 2, 12, seed=4), 0)))


def test_ranks_share_each_batch():
    whole = list(Batches(2, 5, 6))
    shares = [list(Batches(2, 5, 6, rank, 3)) for rank in range(3)]
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == whole
    assert whole[0] == [12, 13, 14, 15, 16, 17] and len(Batches(2, 5, 6)) == 3
    with pytest.raises(InputError, match="--batch 6: not divisible by the 4 processes"):
        Batches(0, 1, 6, 0, 4)


def test_a_patch_is_described(folder):
    patches = Patches(load_pairs([folder], 2), 2, 12, seed=0)
    place = patches.place(17)
    text = patches.describe(17)
    assert f"image{place.image}.png" in text and f"LR rows {place.top}..{place.top + 11}" in text
    assert f"columns {place.left}..{place.left + 11}" in text
