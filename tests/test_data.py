"""What the user has becomes tensors that mean the same: scales invert, splits stay, pixels land where they should."""

import gzip
import math
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ancestral.data import Facts, Scale, draw, load
from ancestral.data.dataset import digest_of, held_out_by_content
from ancestral.errors import DataError, OptionError
from ancestral.rng import randn, stream

SHARED = Path(__file__).parents[2] / "shared" / "data"


def picture(seed: int, height: int = 4, width: int = 4, channels: int = 3) -> np.ndarray:
    """Random pixels (H, W, C), or (H, W) for one channel."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def only(root: Path, **options) -> torch.Tensor:
    """The one held-out example of a folder that has its own split."""
    (example,) = load(root, **options).held_out
    return example


def rows(x: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in x}


class TestScale:
    @pytest.mark.parametrize("levels", [2, 16, 17, 256, 65536])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_every_level_comes_back(self, levels, dtype):
        k = torch.arange(levels).reshape(-1, 1)
        x = Scale.of_levels(levels).forward(k, dtype=dtype)
        assert torch.equal(Scale.of_levels(levels).inverse(x).round().long(), k)
        assert x[0] == -1
        assert x[-1] == 1
        expected = 2 * k.double() / (levels - 1) - 1
        assert torch.allclose(x.double(), expected, rtol=0, atol=torch.finfo(dtype).eps)

    @pytest.mark.parametrize(
        "kind", [np.bool_, np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64]
    )
    def test_every_level_of_every_type_of_integers_comes_back_from_a_file(self, tmp_path, kind):
        top = 1 if kind is np.bool_ else min(np.iinfo(kind).max, 65535)
        levels = np.concatenate([np.arange(top + 1), [0] * 3]).astype(kind)
        np.save(tmp_path / "x.npy", np.stack([levels, levels[::-1], np.roll(levels, 1)], axis=1))
        data = load(tmp_path / "x.npy")
        assert data.facts.levels == (256 if kind is np.uint8 else top + 1)
        for raw in (data.train, data.held_out):
            assert torch.equal(data.facts.to_raw(data.facts.scale.forward(raw)), raw)
            assert torch.equal(data.facts.scale.inverse(data.facts.scale.forward(raw)).round(), raw.float())
        seen = torch.cat([data.train, data.held_out])
        assert seen.unique().tolist() == list(range(top + 1))

    @pytest.mark.parametrize(
        "scale",
        [
            Scale.of_levels(2),
            Scale.of_levels(17),
            Scale.of_levels(65536),
            Scale(offset=range(6), factor=[0.1, 2, 3, 4, 5, 60]),
            Scale.of_values(torch.linspace(-3, 5, 600).reshape(100, 6) ** 3),
            Scale.of_values(torch.linspace(-3, 5, 600).reshape(100, 6) ** 3, shared=True),
        ],
    )
    def test_log_det_is_that_of_the_jacobian(self, scale):
        shape = (1, 2, 3)
        raw = randn((1, *shape), stream(0), dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda raw: scale.forward(raw, dtype=torch.float64), raw)
        expected = torch.linalg.slogdet(jacobian.reshape(6, 6))[1]
        assert scale.log_det(shape) == pytest.approx(float(expected), abs=1e-12)

    def test_change_of_variables_gives_the_density_in_the_users_units(self):
        """A standard normal x means raw ~ N(offset, factor^2): the same value, and it integrates to one."""
        scale = Scale(offset=(3.0, -1.0), factor=(0.25, 40.0))
        raw = randn((50, 2), stream(1), dtype=torch.float64) * 10
        x = scale.forward(raw, dtype=torch.float64)
        standard = torch.distributions.Normal(0.0, 1.0)
        log_p_raw = standard.log_prob(x).sum(1) + scale.log_det((2,))
        mean, deviation = torch.tensor([scale.offset, scale.factor], dtype=torch.float64)
        direct = torch.distributions.Normal(mean, deviation).log_prob(raw).sum(1)
        assert torch.allclose(log_p_raw, direct, rtol=1e-12)

        grid = torch.linspace(-7, 13, 4001, dtype=torch.float64).reshape(-1, 1)
        one = Scale(offset=(3.0,), factor=(0.25,))
        log_p = standard.log_prob(one.forward(grid, dtype=torch.float64)).sum(1) + one.log_det((1,))
        assert torch.trapezoid(log_p.exp(), grid[:, 0]).item() == pytest.approx(1, abs=1e-10)

    def test_of_values_standardises_and_leaves_a_constant_feature_its_unit(self):
        train = randn((1000, 3), stream(2)) * torch.tensor([5.0, 1e-3, 0.0]) + torch.tensor([100.0, 0.0, 0.1])
        scale = Scale.of_values(train)
        x = scale.forward(train, dtype=torch.float64)
        assert torch.allclose(x.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(x.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
        assert scale.factor[2] == 1

    def test_refuses_what_cannot_be_inverted(self):
        for offset, factor in [((0.0,), (0.0,)), ((0.0,), (math.nan,)), ((math.inf,), (1.0,)), ((0.0, 1.0), (1.0,))]:
            with pytest.raises(ValueError):
                Scale(offset=offset, factor=factor)
        with pytest.raises(OptionError, match="1 levels"):
            Scale.of_levels(1)
        with pytest.raises(OptionError, match="for 2 features"):
            Scale(offset=(0.0, 0.0), factor=(1.0, 1.0)).forward(torch.zeros(1, 3))


class TestFacts:
    def test_json_round_trip_is_exact_and_closed(self):
        facts = load("two-moons").facts
        assert Facts.model_validate_json(facts.model_dump_json()) == facts
        with pytest.raises(ValueError, match="Extra inputs"):
            Facts.model_validate({**facts.model_dump(), "colour": "red"})

    def test_a_uniform_law_on_levels_costs_log2_levels_bits_per_dim(self):
        facts = load("digits").facts
        nats = 64 * math.log(17)
        assert facts.bits_per_dim(nats) == pytest.approx(math.log2(17), rel=1e-15)
        assert facts.bits_per_dim(torch.tensor([nats])).item() == pytest.approx(math.log2(17))
        assert facts.unit == "bits/dim"
        assert load("ring-8").facts.unit == "nats"

    def test_to_raw_rounds_to_the_nearest_level_and_stays_among_them(self):
        facts = load("digits").facts
        k = torch.arange(17).repeat(64, 1).T.reshape(17, 1, 8, 8)
        x = facts.scale.forward(k)
        for shift in (-0.49 / 8, 0.0, 0.49 / 8):
            assert torch.equal(facts.to_raw(x + shift), k.to(torch.uint8))
        assert facts.to_raw(torch.full((1, 1, 8, 8), 9.0)).unique().tolist() == [16]
        assert facts.to_raw(torch.full((1, 1, 8, 8), -9.0)).unique().tolist() == [0]

    def test_digest_follows_the_content(self, tmp_path):
        x = np.random.default_rng(0).integers(0, 256, (40, 4, 4), dtype=np.uint8)
        digests = []
        for name, array in {"a": x, "b": x, "c": x ^ (np.arange(40) == 7)[:, None, None]}.items():
            np.save(tmp_path / f"{name}.npy", array)
            digests.append(load(tmp_path / f"{name}.npy").facts.digest)
        assert digests[0] == digests[1] != digests[2]


class TestDigest:
    @pytest.mark.parametrize("size", [50, 20_000])
    def test_differs_wherever_the_data_differ(self, size):
        """In any one value, in the order of examples, in their shape, their type and their labels."""
        x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, size), dtype=np.uint8))
        others = [x, x[[1, 0, 2]], x.reshape(3, 2, -1), x.int(), x[:2]]
        for row, column in np.random.default_rng(1).integers(0, (3, size), (200, 2)):
            others.append(x.clone())
            others[-1][row, column] ^= 1
        labels = torch.arange(3)
        digests = [digest_of(other, x, labels) for other in others]
        digests += [digest_of(x, x), digest_of(x, None, labels), digest_of(x, x, labels.flip(0))]
        assert digest_of(x.clone(), x, labels) == digests[0]
        assert len(set(digests)) == len({other.numpy().tobytes() for other in others[5:]}) + 8


class TestBuiltIn:
    def test_digits_are_the_1797_and_their_split_never_moves(self):
        data = load("digits")
        labels = torch.cat([data.train_labels, data.held_out_labels])
        assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
        assert int(data.train.max()) == 16
        assert data.facts.digest == "0b53c9d8dd5e20c2dc7216542816e909a7f5673685ec92877915a392b563fe3d"

    def test_a_label_belongs_to_its_image(self):
        """The nearest training image has the same label for nearly every held-out digit."""
        data = load("digits")
        distance = torch.cdist(data.held_out.flatten(1).float(), data.train.flatten(1).float())
        agree = data.train_labels[distance.argmin(1)] == data.held_out_labels
        assert agree.float().mean() > 0.97

    def test_batch_is_the_scaled_gather(self):
        data = load("digits")
        assert torch.equal(data.batch([5, 0, 5]), data.train[[5, 0, 5]].float() / 8 - 1)

    def test_toys_depend_on_the_seed_alone(self):
        first, again, other = load("ring-8"), load("ring-8"), load("ring-8", seed=1)
        assert torch.equal(first.train, again.train)
        assert not torch.equal(first.train, other.train)
        assert rows(first.train).isdisjoint(rows(first.held_out))
        x = first.batch(range(first.facts.n_train)).double()
        assert torch.allclose(x.std(0, correction=0), torch.ones(2, dtype=torch.float64), atol=1e-5)

    def test_loading_digits_loads_neither_scikit_learn_nor_pillow_nor_matplotlib(self):
        code = (
            "import sys; from ancestral.data import load; load('digits'); "
            "print({'sklearn', 'PIL', 'matplotlib'} & {*sys.modules})"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert run.stdout == "set()\n"


class TestSplit:
    @pytest.mark.parametrize("size", [9, 20_000])
    def test_by_content_whatever_the_order_and_the_copies(self, size):
        x = np.random.default_rng(0).integers(0, 256, (2000, size), dtype=np.uint8)
        x = np.concatenate([x, x[:300]])
        held = held_out_by_content(x)
        order = np.random.default_rng(1).permutation(len(x))
        assert np.array_equal(held_out_by_content(x[order]), held[order])
        assert np.array_equal(held[2000:], held[:300])
        assert rows(torch.from_numpy(x[held])).isdisjoint(rows(torch.from_numpy(x[~held])))

    def test_adding_examples_moves_none(self):
        x = np.random.default_rng(0).integers(0, 256, (2000, 9), dtype=np.uint8)
        assert np.array_equal(held_out_by_content(x[:1000]), held_out_by_content(x)[:1000])

    def test_holds_out_a_fifth_of_few_and_a_tenth_of_many(self):
        x = np.arange(30_000)
        for n, share in [(10_000, 0.2), (30_000, 0.1)]:
            deviation = math.sqrt(n * share * (1 - share))
            assert abs(held_out_by_content(x[:n]).sum() - n * share) < 4 * deviation

    @pytest.mark.parametrize("start", range(20))
    def test_three_examples_are_enough(self, start):
        assert held_out_by_content(np.arange(start, start + 3)).sum() == 1

    def test_a_source_keeps_its_own(self, tmp_path):
        for seed, name in enumerate(["train/a.png", "train/b.png", "Test/c.png", "Test/d.png", "valid/e.png"]):
            save(tmp_path / "set" / name, picture(seed))
        data = load(tmp_path)
        assert rows(data.train) == {picture(seed).transpose(2, 0, 1).tobytes() for seed in (0, 1)}
        assert rows(data.held_out) == {picture(seed).transpose(2, 0, 1).tobytes() for seed in (2, 3)}
        assert "left out 1 images" in data.description
        assert data.facts.classes is None

    def test_val_is_held_out_where_there_is_no_test(self, tmp_path):
        for seed in range(12):
            save(tmp_path / ("val" if seed % 3 == 0 else "train") / f"{seed}.png", picture(seed))
        assert rows(load(tmp_path).held_out) == {picture(seed).transpose(2, 0, 1).tobytes() for seed in (0, 3, 6, 9)}

    def test_one_side_alone_is_no_split(self, tmp_path):
        for seed in range(40):
            save(tmp_path / "train" / f"{seed}.png", picture(seed))
        data = load(tmp_path)
        assert data.facts.n_held_out > 1
        assert data.facts.n_train + data.facts.n_held_out == 40


class TestClasses:
    def test_are_the_folders(self, tmp_path):
        for seed, name in enumerate(["train/cat/a.png", "train/dog/b.png", "train/dog/c.png", "test/dog/d.png"]):
            save(tmp_path / name, picture(seed))
        data = load(tmp_path)
        assert data.facts.classes == ("cat", "dog")
        assert data.train_labels.tolist() == [0, 1, 1]
        assert data.held_out_labels.tolist() == [1]

    def test_follow_their_image_through_the_split_by_content(self, tmp_path):
        for seed in range(30):
            save(tmp_path / "abc"[seed % 3] / f"{seed}.png", picture(seed))
        data = load(tmp_path)
        expected = {picture(seed).transpose(2, 0, 1).tobytes(): seed % 3 for seed in range(30)}
        for x, labels in [(data.train, data.train_labels), (data.held_out, data.held_out_labels)]:
            assert [expected[row.numpy().tobytes()] for row in x] == labels.tolist()

    @pytest.mark.parametrize(
        "names", [["a.png", "b.png", "c.png"], ["x/a.png", "x/b.png", "x/c.png"], ["a.png", "x/b.png", "y/c.png"]]
    )
    def test_are_absent_unless_every_image_is_in_one_of_two_folders(self, tmp_path, names):
        for seed, name in enumerate(names):
            save(tmp_path / name, picture(seed))
        assert load(tmp_path).facts.classes is None


GREY = np.array([[0, 1, 127], [128, 200, 255]], dtype=np.uint8)
COLOUR = picture(7, 2, 3)
ALPHA = np.array([[0, 255, 128], [1, 254, 60]], dtype=np.uint8)


def over_white(pixels: np.ndarray) -> np.ndarray:
    """alpha c + (1 - alpha) 255, rounded."""
    alpha = ALPHA[..., None] / 255 if pixels.ndim == 3 else ALPHA / 255
    return np.rint(alpha * pixels + (1 - alpha) * 255).astype(np.uint8)


def palette() -> Image.Image:
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3)).convert("P")
    image.putpalette(COLOUR.reshape(-1).tolist())
    return image


def clear_grey() -> Image.Image:
    """A grey image whose level 127 is declared transparent."""
    image = Image.fromarray(GREY)
    image.info["transparency"] = 127
    return image


MODES = {
    "grey": (lambda: Image.fromarray(GREY), "png", GREY),
    "RGB": (lambda: Image.fromarray(COLOUR), "png", COLOUR),
    "RGBA": (lambda: Image.fromarray(np.dstack([COLOUR, ALPHA])), "png", over_white(COLOUR)),
    "grey and alpha": (lambda: Image.fromarray(np.dstack([GREY, ALPHA]), "LA"), "png", over_white(GREY)),
    "grey with a transparent level": (clear_grey, "png", np.where(GREY == 127, 255, GREY)),
    "palette": (palette, "png", COLOUR),
    "1 bit": (
        lambda: Image.fromarray(GREY).convert("1", dither=Image.Dither.NONE),
        "png",
        np.where(GREY >= 128, 255, 0),
    ),
    "16 bit": (
        lambda: Image.fromarray(np.array([[0, 128, 129], [385, 386, 65535]], dtype=np.uint16)),
        "png",
        np.array([[0, 0, 1], [1, 2, 255]]),
    ),
    "16 bit PGM": (
        lambda: Image.fromarray(np.array([[0, 128, 129], [385, 386, 65535]], dtype=np.uint16)),
        "pgm",
        np.array([[0, 0, 1], [1, 2, 255]]),
    ),
    "CMYK": (
        lambda: Image.fromarray(
            np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 255]]] * 2, dtype=np.uint8), "CMYK"
        ),
        "tiff",
        np.array([[[255, 255, 255], [0, 255, 255], [0, 0, 0]]] * 2),
    ),
    "RGB that is grey": (lambda: Image.fromarray(np.dstack([GREY] * 3)), "png", GREY),
    "BMP": (lambda: Image.fromarray(COLOUR), "bmp", COLOUR),
    "GIF": (palette, "gif", COLOUR),
    "TIFF": (lambda: Image.fromarray(COLOUR), "tif", COLOUR),
    "PPM": (lambda: Image.fromarray(COLOUR), "ppm", COLOUR),
    "PBM": (lambda: Image.fromarray(GREY).convert("1", dither=Image.Dither.NONE), "pbm", np.where(GREY >= 128, 255, 0)),
    "flat JPEG": (lambda: Image.new("L", (3, 2), 77), "JPG", np.full((2, 3), 77)),
}


class TestImages:
    @pytest.mark.parametrize("mode", MODES)
    def test_every_kind_of_pixel_is_read_exactly(self, tmp_path, mode):
        build, suffix, expected = MODES[mode]
        for seed in range(2):
            save(tmp_path / "train" / f"{seed}.png", picture(seed, 2, 3, channels=1))
        (tmp_path / "test").mkdir()
        build().save(tmp_path / "test" / f"target.{suffix}")
        example = only(tmp_path, on_bad="fail").numpy()
        assert example.shape[0] == (1 if expected.ndim == 2 else 3)
        assert np.array_equal(example.transpose(1, 2, 0).squeeze(), expected)

    def test_lossless_webp_is_read_exactly(self, tmp_path):
        for seed in range(2):
            save(tmp_path / "train" / f"{seed}.png", picture(seed, 2, 3))
        (tmp_path / "test").mkdir()
        Image.fromarray(COLOUR).save(tmp_path / "test" / "a.webp", lossless=True)
        assert np.array_equal(only(tmp_path).numpy().transpose(1, 2, 0), COLOUR)

    @pytest.mark.parametrize("suffix", ["png", "tiff"])
    @pytest.mark.parametrize(
        ("orientation", "stored"),
        {
            1: lambda upright: upright,
            2: lambda upright: upright[:, ::-1],
            3: lambda upright: upright[::-1, ::-1],
            4: lambda upright: upright[::-1],
            5: lambda upright: upright.T,
            6: lambda upright: upright.T[::-1],
            7: lambda upright: upright.T[::-1, ::-1],
            8: lambda upright: upright.T[:, ::-1],
        }.items(),
    )
    def test_exif_orientation_is_undone(self, tmp_path, suffix, orientation, stored):
        """The first stored row and column are the sides of the upright picture that EXIF 2.3 names for each value."""
        for seed in range(2):
            save(tmp_path / "train" / f"{seed}.png", picture(seed, 2, 3, channels=1))
        exif = Image.Exif()
        exif[0x0112] = orientation
        (tmp_path / "test").mkdir()
        image = Image.fromarray(np.ascontiguousarray(stored(GREY)))
        image.save(tmp_path / "test" / f"turned.{suffix}", exif=exif)
        data = load(tmp_path, on_bad="fail")
        assert data.facts.shape == (1, 2, 3)
        assert np.array_equal(data.held_out[0, 0].numpy(), GREY)

    def test_a_fresh_process_reads_kinds_that_pillow_loads_late(self, tmp_path):
        for seed in range(3):
            Image.fromarray(picture(seed, channels=1)).save(tmp_path / f"{seed}.{['gif', 'bmp', 'tiff'][seed]}")
        code = f"from ancestral.data import load; load({str(tmp_path)!r}, on_bad='fail')"
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_damaged_exif_does_not_spoil_the_pixels(self, tmp_path):
        broken = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03"
        for seed in range(3):
            Image.new("L", (8, 8), 80 * seed).save(tmp_path / f"{seed}.jpg", exif=broken)
        data = load(tmp_path, on_bad="fail")
        assert sorted(torch.cat([data.train, data.held_out])[:, 0, 0, 0].tolist()) == [0, 80, 160]

    def test_an_animation_gives_its_first_frame(self, tmp_path):
        for seed in range(2):
            save(tmp_path / "train" / f"{seed}.png", picture(seed, 2, 3, channels=1))
        (tmp_path / "test").mkdir()
        frames = [Image.new("L", (3, 2), shade) for shade in (0, 255)]
        frames[0].save(tmp_path / "test" / "a.gif", save_all=True, append_images=frames[1:])
        assert only(tmp_path).unique().tolist() == [0]

    def test_a_size_crops_the_centre_and_nothing_else(self, tmp_path):
        """A wide picture whose centre square is flat: no pixel of the sides reaches the result, at any scale."""
        for seed in range(2):
            save(tmp_path / "train" / f"{seed}.png", picture(seed, 50, 50, channels=1))
        wide = picture(3, 60, 200, channels=1)
        wide[:, 70:130] = 99
        save(tmp_path / "test" / "wide.png", wide)
        save(tmp_path / "test" / "tall.png", np.ascontiguousarray(wide.T))
        for size in (7, 60, 64):
            assert load(tmp_path, size=size).held_out.unique().tolist() == [99]

    @pytest.mark.parametrize(("sides", "chosen"), [((20, 40, 63), 32), ((63, 64, 300), 64), ((9, 10, 11), 32)])
    def test_mixed_sizes_are_brought_to_one_and_said(self, tmp_path, sides, chosen):
        for seed, side in enumerate(sides):
            save(tmp_path / f"{seed}.png", picture(seed, side, side + 5))
        data = load(tmp_path)
        assert data.facts.shape == (3, chosen, chosen)
        assert f"resized to {chosen}x{chosen}" in data.description

    def test_equal_sizes_stay_as_they_are(self, tmp_path):
        for seed in range(3):
            save(tmp_path / f"{seed}.png", picture(seed, 5, 9))
        data = load(tmp_path)
        assert rows(torch.cat([data.train, data.held_out])) == {
            picture(seed, 5, 9).transpose(2, 0, 1).tobytes() for seed in range(3)
        }
        assert "resized" not in data.description

    def test_a_large_jpeg_shrinks_to_its_local_means(self, tmp_path):
        ramp = np.tile(np.linspace(0, 255, 1024), (1024, 1)).astype(np.uint8)
        for seed in range(2):
            save(tmp_path / "train" / f"{seed}.png", picture(seed, 16, 16, channels=1))
        (tmp_path / "test").mkdir()
        Image.fromarray(ramp).save(tmp_path / "test" / "ramp.jpg", quality=95)
        expected = ramp.reshape(16, 64, 16, 64).mean(axis=(1, 3))[:, 1:-1]
        assert np.abs(only(tmp_path, size=16)[0].numpy()[:, 1:-1] - expected).max() < 1.5

    def test_a_zip_equals_the_folder_it_was_made_from(self, tmp_path):
        root = tmp_path / "set"
        names = [
            "a.png",
            "a/b.png",
            "a/c.JPG",
            "B/d.bmp",
            "z/y/e.png",
            ".hidden.png",
            "__MACOSX/f.png",
            "notes.txt.png",
        ]
        for seed, name in enumerate(names):
            save(root / name, picture(seed, 8 + seed, 8))
        (root / "readme.txt").write_text("not an image")
        (root / "notes.txt.png").write_text("not an image either")
        archive = tmp_path / "set.zip"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for path in sorted(root.rglob("*"), reverse=True):
                file.write(path, path.relative_to(root))
        folder, packed = load(root), load(archive)
        assert folder.facts.n_train + folder.facts.n_held_out == 5
        assert folder.facts.digest == packed.facts.digest
        assert folder.description == packed.description
        assert torch.equal(folder.train, packed.train)
        assert {**folder.facts.model_dump(), "source": ""} == {**packed.facts.model_dump(), "source": ""}

    def test_progress_ends_at_the_whole(self, tmp_path):
        for seed in range(20):
            save(tmp_path / f"{seed}.png", picture(seed))
        calls = []
        load(tmp_path, progress=lambda *call: calls.append(call))
        assert [call for call in calls if call[1] == 20] == [("decoding", 20, 20)]

    def test_a_link_back_up_does_not_go_round_for_ever(self, tmp_path):
        for seed in range(3):
            save(tmp_path / f"{seed}.png", picture(seed))
        (tmp_path / "again").symlink_to(tmp_path)
        data = load(tmp_path)
        assert data.facts.n_train + data.facts.n_held_out == 3


def idx(array: np.ndarray, kind: int = 0x08) -> bytes:
    big = array.astype(array.dtype.newbyteorder(">"))
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + big.tobytes()


class TestArrays:
    images = np.random.default_rng(0).integers(0, 256, (30, 5, 4), dtype=np.uint8)
    labels = np.arange(30, dtype=np.uint8) % 3

    def test_idx_folder_with_its_own_split(self, tmp_path):
        (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(self.images[:20]))
        (tmp_path / "train-labels.idx1-ubyte").write_bytes(idx(self.labels[:20]))
        (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(self.images[20:])))
        (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(self.labels[20:])))
        data = load(tmp_path)
        assert np.array_equal(data.train[:, 0], self.images[:20])
        assert np.array_equal(data.held_out[:, 0], self.images[20:])
        assert data.held_out_labels.tolist() == self.labels[20:].tolist()
        assert data.facts.classes == ("0", "1", "2")

    def test_idx_file_with_the_labels_beside_it(self, tmp_path):
        (tmp_path / "faces-images-idx3-ubyte").write_bytes(idx(self.images))
        (tmp_path / "faces-labels-idx1-ubyte").write_bytes(idx(self.labels))
        data = load(tmp_path / "faces-images-idx3-ubyte")
        label = {image.tobytes(): int(y) for image, y in zip(self.images, self.labels, strict=True)}
        assert [label[row.numpy().tobytes()] for row in data.train] == data.train_labels.tolist()

    def test_idx_of_floats_is_big_endian(self, tmp_path):
        x = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)
        (tmp_path / "x.idx").write_bytes(idx(x, 0x0D))
        data = load(tmp_path / "x.idx")
        assert rows(torch.cat([data.train, data.held_out])) == rows(torch.from_numpy(x))

    @pytest.mark.parametrize(
        ("array", "shape", "levels"),
        [
            (images, (1, 5, 4), 256),
            (np.stack([images, images // 2, 255 - images], axis=3), (3, 5, 4), 256),
            (np.stack([images, images // 2, 255 - images], axis=1), (3, 5, 4), 256),
            (images.reshape(30, 20), (20,), 256),
            (images > 99, (1, 5, 4), 2),
            (images.astype(np.int64) % 17, (1, 5, 4), 17),
            (images.astype(np.uint16) * 200, (1, 5, 4), int(images.max()) * 200 + 1),
            (images.astype(np.float64), (5, 4), None),
            (images[:, None].astype(np.float32) / 255, (1, 5, 4), None),
            (images[:, 0].astype(np.float16), (4,), None),
            (np.arange(30.0), (1,), None),
        ],
        ids=lambda value: f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else str(value),
    )
    def test_npy_means_what_its_type_and_shape_say(self, tmp_path, array, shape, levels):
        np.save(tmp_path / "x.npy", array)
        data = load(tmp_path / "x.npy")
        assert (data.facts.shape, data.facts.levels) == (shape, levels)
        assert data.train.dtype == data.facts.dtype
        channels_first = np.moveaxis(array, 3, 1) if array.ndim == 4 and array.shape[3] == 3 else array
        expected = torch.from_numpy(np.ascontiguousarray(channels_first.astype(np.float64))).reshape(30, *shape)
        assert rows(torch.cat([data.train, data.held_out]).double()) == rows(expected)

    def test_float_images_share_one_scale_and_vectors_have_one_each(self, tmp_path):
        np.save(tmp_path / "images.npy", self.images[:, None] / 255)
        np.save(tmp_path / "vectors.npy", self.images.reshape(30, 20) / 255)
        assert len(load(tmp_path / "images.npy").facts.scale.factor) == 1
        assert len(load(tmp_path / "vectors.npy").facts.scale.factor) == 20

    @pytest.mark.parametrize("names", [("x", "y"), ("images", "labels"), ("data", "labels"), ("arr_0", "y")])
    def test_npz_with_labels(self, tmp_path, names):
        np.savez(
            tmp_path / "set.npz", **dict(zip(names, (self.images, np.array(["b", "a", "c"])[self.labels]), strict=True))
        )
        data = load(tmp_path / "set.npz")
        assert data.facts.classes == ("a", "b", "c")
        label = {image.tobytes(): [1, 0, 2][y] for image, y in zip(self.images, self.labels, strict=True)}
        assert [label[row.numpy().tobytes()] for row in data.train] == data.train_labels.tolist()
        assert data.facts.class_counts == tuple(data.train_labels.tolist().count(y) for y in range(3))

    @pytest.mark.parametrize("form", ["{what}_{side}", "{side}_{what}"])
    def test_npz_with_its_own_split(self, tmp_path, form):
        x, y = ("x", "y") if form.startswith("{what}") else ("images", "labels")
        arrays = {
            form.format(what=what, side=side): array[part]
            for side, part in {"test": slice(20, 30), "train": slice(0, 20)}.items()
            for what, array in {x: self.images, y: self.labels[:, None]}.items()
        }
        np.savez_compressed(tmp_path / "set.npz", **arrays)
        data = load(tmp_path / "set.npz")
        assert np.array_equal(data.train[:, 0], self.images[:20])
        assert data.held_out_labels.tolist() == self.labels[20:].tolist()

    def test_labels_that_are_no_classes_are_left_out_and_said(self, tmp_path):
        np.savez(tmp_path / "set.npz", x=self.images, y=np.linspace(0, 1, 30))
        data = load(tmp_path / "set.npz")
        assert data.train_labels is None
        assert "left out its labels" in data.description

    def test_mnist_is_60000_and_10000(self):
        if not (SHARED / "mnist").is_dir():
            pytest.skip("no MNIST in ../shared/data/mnist")
        data = load(SHARED / "mnist")
        assert (data.facts.n_train, data.facts.n_held_out, data.facts.shape) == (60_000, 10_000, (1, 28, 28))
        assert data.train_labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


class TestDraw:
    def test_a_tile_shows_its_levels_and_the_gap_is_paper(self):
        digits = load("digits")
        raw = digits.train[:6]
        pixels = np.asarray(draw.grid(digits.facts, raw, columns=3))
        zoom, gap = 512 // 24, 2
        step = 8 * zoom + gap
        for n in range(6):
            top, left = n // 3 * step, n % 3 * step
            shown = pixels[top : top + 8 * zoom : zoom, left : left + 8 * zoom : zoom]
            assert np.array_equal(shown, np.rint(raw[n, 0].numpy() / 16 * 255))
        assert (pixels[8 * zoom : step] == 255).all()
        assert (pixels[:, 8 * zoom : step] == 255).all()

    def test_colours_keep_their_order_and_real_values_their_range(self, tmp_path):
        np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(9, 3, 4, 4)))
        facts = load(tmp_path / "x.npy").facts
        raw = torch.zeros(1, 3, 4, 4)
        raw[0, 0], raw[0, 1], raw[0, 2] = -2.0, 0.0, 2.0
        assert np.asarray(draw.grid(facts, raw))[0, 0].tolist() == [0, 128, 255]

    def test_points_are_drawn_where_they_lie(self):
        facts = load("ring-8").facts
        pixels = np.asarray(draw.grid(facts, torch.tensor([[2.0, 1.0]]).repeat(50, 1))).sum(axis=2)
        down, right = np.unravel_index(pixels.argmin(), pixels.shape)
        assert right > 256 > down

    def test_every_feature_has_its_histogram(self, tmp_path):
        np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(50, 3)))
        data = load(tmp_path / "x.npy")
        pixels = np.asarray(draw.grid(data.facts, data.train)).sum(axis=2)
        half = len(pixels) // 2
        ink = [(pixels[y : y + half, x : x + half] < 600).any() for y in (0, half) for x in (0, half)]
        assert ink == [True, True, True, False]

    def test_refuses_examples_of_another_shape(self):
        with pytest.raises(OptionError, match="expected at least one of shape"):
            draw.grid(load("digits").facts, torch.zeros(4, 1, 9, 9))

    def test_a_png_carries_its_recipe(self, tmp_path):
        recipe = {
            "run": "digits-0001",
            "step": 400,
            "seeds": [0, 1],
            "sampler": {"name": "ddim", "eta": 0.1},
            "note": "é\n",
        }
        image = Image.fromarray(GREY)
        draw.save_png(image, tmp_path / "a.png", recipe)
        assert draw.read_recipe(tmp_path / "a.png") == recipe
        assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), GREY)
        assert b"tEXtancestral\0" in (tmp_path / "a.png").read_bytes()

    def test_a_foreign_file_has_no_recipe(self, tmp_path):
        save(tmp_path / "plain.png", GREY)
        (tmp_path / "text.png").write_text("{}")
        for name in ("plain.png", "text.png", "absent.png"):
            with pytest.raises(DataError, match=f"{name}: carries no recipe"):
                draw.read_recipe(tmp_path / name)
