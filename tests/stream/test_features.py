"""Features of real shards: every labelled image once, in the shards' order, however many workers read."""

import io
import tarfile

import pytest
import torch
from conftest import encode_image
from tiny_run import tiny_config

from streamswav.config import StorageSection
from streamswav.crops import centre_crop
from streamswav.errors import DataError, ManifestError, NonFiniteError, StorageError
from streamswav.models import build_trunk
from streamswav.transfer.extraction.features import extract
from streamswav.transfer.extraction.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(
    resize=20, crop=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), max_pixels=10**6
)


@pytest.fixture
def trunk():
    torch.manual_seed(0)
    return build_trunk(tiny_config().model).eval()


def read(trunk, *folders, **options):
    urls = [str(folder) for folder in folders]
    return extract(trunk, urls, preprocessing=PREPROCESSING, storage=StorageSection(), **options)


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_features_are_the_trunks_on_centre_crops_in_the_order_of_the_shards(trunk, make_shards, tmp_path):
    make_shards(tmp_path, counts=[3, 1, 4], image=(50, 30))
    found = read(trunk, tmp_path, batch=3)
    assert found.keys == ("0_0", "0_1", "0_2", "1_0", "2_0", "2_1", "2_2", "2_3")
    assert found.labels.tolist() == list(range(8))
    assert found.features.dtype == torch.float32
    for number in range(8):
        image = encode_image(number, (50, 30), "JPEG")
        pixels = centre_crop(image, resize=20, crop=16, max_pixels=10**6)
        mean, std = torch.tensor(PREPROCESSING.mean), torch.tensor(PREPROCESSING.std)
        normalised = (torch.from_numpy(pixels) / 255 - mean) / std
        with torch.no_grad():
            expected = trunk(normalised.permute(2, 0, 1)[None])[0]
        torch.testing.assert_close(found.features[number], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", [[17], [5, 1, 7, 4, 3]])
def test_workers_change_neither_content_nor_order(trunk, make_shards, tmp_path, counts):
    make_shards(tmp_path, counts=counts)
    alone, shared = (read(trunk, tmp_path, batch=4, workers=workers) for workers in (0, 2))
    assert shared.keys == alone.keys
    assert torch.equal(shared.labels, alone.labels)
    torch.testing.assert_close(shared.features, alone.features, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_used_is_counted_by_reason(trunk, tmp_path):
    good = encode_image(0, (32, 32), "PNG")
    members = [
        *(("good.png", good), ("good.cls", b"3")),
        *(("torn.jpg", b"\xff\xd8\xff nothing"), ("torn.cls", b"1")),
        ("alone.png", good),
        *(("word.png", good), ("word.cls", b"cat")),
        *(("negative.png", good), ("negative.cls", b"-1")),
        ("blind.cls", b"2"),
        *(("last.png", good), ("last.cls", b"7\n")),
    ]
    write_tar(tmp_path / "a.tar", members)
    found = read(trunk, tmp_path)
    assert found.keys == ("good", "last")
    assert found.labels.tolist() == [3, 7]
    assert sum(found.skipped.values()) == 5
    assert found.skipped["no_label"] == found.skipped["no_image"] == 1
    assert found.skipped["label_not_a_class_number"] == 2


def test_a_damaged_stretch_is_counted_and_the_rest_is_used(trunk, make_shards, tmp_path):
    path = make_shards(tmp_path, counts=[6])[0]
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        begin = tar.getmember("0_3.cls").offset
    data[begin : begin + 512] = b"\x55" * 512
    path.write_bytes(data)
    found = read(trunk, tmp_path)
    assert {"0_0", "0_1", "0_5"} <= set(found.keys)
    assert "0_3" not in found.keys
    assert sum(found.skipped.values()) > 0


def test_shards_without_labels_are_refused_with_what_is_needed(trunk, make_shards, tmp_path):
    make_shards(tmp_path, counts=[2, 2], labels=False)
    with pytest.raises(DataError, match=r"4 no_label.*\.cls member"):
        read(trunk, tmp_path)


def test_an_empty_folder_is_refused(trunk, tmp_path):
    with pytest.raises(ManifestError, match=r"no \.tar objects"):
        read(trunk, tmp_path)


def test_an_error_of_a_worker_is_the_error_of_the_pass(trunk, make_shards, web):
    make_shards(web.folder, counts=[3])
    url = f"{web.url}/shard-000000.tar"
    web.ranges = False
    with pytest.raises(StorageError, match="range"):
        extract(trunk, [url], preprocessing=PREPROCESSING, storage=StorageSection(), workers=1)


def test_a_limit_takes_the_first_samples_of_every_shard(trunk, make_shards, tmp_path):
    make_shards(tmp_path, counts=[9, 9, 9])
    assert read(trunk, tmp_path, limit=6).keys == ("0_0", "0_1", "1_0", "1_1", "2_0", "2_1")
    assert read(trunk, tmp_path, limit=2).keys == ("1_0", "2_0")
    assert len(read(trunk, tmp_path, limit=100).keys) == 27


def test_a_limit_means_the_same_to_any_number_of_workers(trunk, make_shards, tmp_path):
    make_shards(tmp_path, counts=[30])
    keys = read(trunk, tmp_path, limit=11).keys
    assert len(keys) == 11
    assert read(trunk, tmp_path, limit=11, workers=2).keys == keys


def test_a_diverged_trunk_is_not_measured(trunk, make_shards, tmp_path):
    make_shards(tmp_path, counts=[3])
    trunk.conv1.weight.data.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="diverged"):
        read(trunk, tmp_path)


def test_progress_counts_images(trunk, make_shards, tmp_path):
    make_shards(tmp_path, counts=[7])
    seen = []
    read(trunk, tmp_path, batch=3, on_images=seen.append)
    assert seen == [3, 6, 7]
