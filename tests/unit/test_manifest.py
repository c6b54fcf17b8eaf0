"""The manifest: whatever names shards, each is found once, in order, with an identity that moves along."""

import json
import shutil

import pytest

from streamswav.errors import ManifestError, NotFoundError, UnsupportedError
from streamswav.stream.manifest import Manifest, list_manifest
from streamswav.stream.store import Store

COUNTS = [3, 1, 2]
NAMES = [f"shard-{number:06d}.tar" for number in range(3)]


@pytest.fixture
def folder(make_shards, tmp_path):
    """Three shards and a file that is none."""
    make_shards(tmp_path / "train", counts=COUNTS, image=(8, 8))
    (tmp_path / "train" / "README.txt").write_text("not a shard")
    return tmp_path / "train"


def keys(manifest):
    return [shard.key for shard in manifest.shards]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/",
        "/shard-*.tar",
        "/shard-00000[0-2].tar",
        "/shard-{000000..000002}.tar",
        "/shard-00000{2,0,1}.tar",
        "/shard-00000{0.tar,[12].tar}",
    ],
)
def test_prefixes_globs_and_braces_find_the_same_shards(folder, url):
    manifest = list_manifest([f"{folder}{url}"], Store())
    assert keys(manifest) == NAMES
    assert manifest.digest == list_manifest([str(folder)], Store()).digest
    assert [shard.size for shard in manifest.shards] == [(folder / name).stat().st_size for name in NAMES]


def test_a_single_tar_is_a_manifest(folder):
    assert keys(list_manifest([f"{folder}/{NAMES[1]}"], Store())) == [NAMES[1]]


def test_a_list_file_names_patterns_a_line(folder, tmp_path):
    (tmp_path / "list").write_text(f"# chosen\n\n{folder}/{NAMES[2]}\n  {folder}/shard-00000{{0,1}}.tar  \n")
    assert keys(list_manifest([f"@{tmp_path}/list"], Store())) == NAMES


def test_s3_prefixes_globs_braces_and_lists(s3, folder):
    url, bucket = s3.make_bucket()
    shutil.copytree(folder, bucket / "train")
    (bucket / "list").write_text(f"{url}/train/{NAMES[0]}\n{url}/train/shard-00000{{1,2}}.tar\n")
    store = Store(s3.section)
    here = list_manifest([str(folder)], Store())
    for each in ("/train/", "/train", "/train/*.tar", "/train/shard-{000000..000002}.tar"):
        manifest = list_manifest([url + each], store)
        assert keys(manifest) == NAMES
        assert manifest.digest == here.digest
        assert all(shard.version for shard in manifest.shards)
    assert list_manifest([f"@{url}/list"], store).digest == here.digest


def test_web_addresses_with_braces(web, folder):
    shutil.copytree(folder, web.folder / "train")
    manifest = list_manifest([f"{web.url}/train/shard-00000{{0..2}}.tar"], Store())
    assert manifest.digest == list_manifest([str(folder)], Store()).digest
    assert [shard.url for shard in manifest.shards] == [f"{web.url}/train/{name}" for name in NAMES]
    with pytest.raises(UnsupportedError, match="cannot be listed"):
        list_manifest([f"{web.url}/train/"], Store())
    with pytest.raises(NotFoundError):
        list_manifest([f"{web.url}/train/shard-00000{{0..3}}.tar"], Store())


def test_signed_links_keep_their_secret_to_themselves(web, folder):
    shutil.copytree(folder, web.folder / "train")
    signed = [f"{web.url}/train/{name}?signature=a%2Fsecret{number}" for number, name in enumerate(NAMES)]
    manifest = list_manifest(signed, Store())
    assert manifest.digest == list_manifest([str(folder)], Store()).digest
    assert [shard.url for shard in manifest.shards] == signed
    assert "secret" not in json.dumps(manifest.to_json())


def test_several_urls_are_one_manifest_with_keys_below_their_common_folder(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "trained" / "deep")
    urls = [str(folder), str(tmp_path / "trained")]
    manifest = list_manifest(urls, Store())
    assert keys(manifest) == [f"train/{name}" for name in NAMES] + [f"trained/deep/{name}" for name in NAMES]
    turned = list_manifest(urls[::-1], Store())
    assert (turned.digest, keys(turned)) == (manifest.digest, keys(manifest))
    assert [shard.source for shard in manifest.shards] == [0] * len(NAMES) + [1] * len(NAMES)


def test_a_manifest_that_grew_is_a_chain_of_hashes(folder):
    shards = list_manifest([str(folder)], Store()).shards
    began = Manifest(shards[:1], (3,))
    grown = began.grown(shards[1:], (None,))
    assert grown.chain[0] == began.digest != grown.digest
    assert [grown.covered(digest) for digest in (*grown.chain, "other")] == [1, len(shards), None]
    assert Manifest.from_json(json.loads(json.dumps(grown.to_json()))) == grown
    assert Manifest(shards, (None,)).digest not in grown.chain


def test_samples_are_counted_by_source_where_all_its_shards_are_counted(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    write_stats(folder, dict(zip(NAMES, COUNTS, strict=True)))
    manifest = list_manifest([str(folder), str(tmp_path / "other")], Store())
    assert manifest.counts == (sum(COUNTS), None)
    assert manifest.total((2, 1)) is None
    write_stats(tmp_path / "other", dict(zip(NAMES, COUNTS, strict=True)))
    manifest = list_manifest([str(folder), str(tmp_path / "other")], Store())
    assert manifest.total((2, 1)) == 3 * sum(COUNTS)
    assert manifest.total_bytes((2, 1)) == manifest.size * 3 // 2


def test_counts_of_img2dataset_are_read_beside_each_shard(folder):
    for name, count in zip(NAMES, COUNTS, strict=True):
        stats = {"count": count + 1, "successes": count, "failed_to_download": 1}
        (folder / name.replace(".tar", "_stats.json")).write_text(json.dumps(stats))
    assert list_manifest([str(folder)], Store()).samples == sum(COUNTS)


def test_the_identity_survives_a_move_and_changes_with_size_and_name(folder, tmp_path):
    before = list_manifest([str(folder)], Store())
    folder.rename(tmp_path / "elsewhere")
    moved = list_manifest([str(tmp_path / "elsewhere")], Store())
    assert moved.digest == before.digest
    assert [shard.digest for shard in moved.shards] == [shard.digest for shard in before.shards]
    first = tmp_path / "elsewhere" / NAMES[0]
    first.write_bytes(first.read_bytes() + bytes(512))
    longer = list_manifest([str(tmp_path / "elsewhere")], Store())
    assert longer.digest != before.digest
    assert [a.digest != b.digest for a, b in zip(longer.shards, before.shards, strict=True)] == [
        True,
        False,
        False,
    ]
    (tmp_path / "elsewhere" / NAMES[1]).rename(tmp_path / "elsewhere" / "zzz.tar")
    assert list_manifest([str(tmp_path / "elsewhere")], Store()).digest != longer.digest


@pytest.mark.parametrize("second", ["/shard-000001.tar", "/*.tar", "/shard-00000{1,2}.tar"])
def test_a_shard_that_is_named_twice_is_refused(folder, second):
    with pytest.raises(ManifestError, match=r"shard-00000[012]\.tar: named twice"):
        list_manifest([str(folder), f"{folder}{second}"], Store())


def test_where_no_shard_is_found_the_place_is_named(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list").write_text("# nothing yet\n")
    for url in (f"{tmp_path}/empty", f"{folder}/other-*.tar"):
        with pytest.raises(ManifestError, match=r"no \.tar objects there"):
            list_manifest([str(folder), url], Store())
    with pytest.raises(ManifestError, match=r"list.*no shards"):
        list_manifest([f"@{tmp_path}/list"], Store())
    with pytest.raises(ManifestError, match="braces"):
        list_manifest([f"{folder}/shard-{{000000..000002.tar"], Store())
    with pytest.raises(NotFoundError, match="nowhere"):
        list_manifest([f"{tmp_path}/nowhere"], Store())
    with pytest.raises(NotFoundError, match=r"no\.list"):
        list_manifest([f"@{tmp_path}/no.list"], Store())


def write_stats(folder, counts):
    shards = {name: {"samples": count} for name, count in counts.items()}
    (folder / "_stats.json").write_text(json.dumps({"shards": shards}))


def test_samples_are_counted_where_the_producers_counted_every_shard(folder, tmp_path):
    assert list_manifest([str(folder)], Store()).samples is None
    write_stats(folder, dict(zip(NAMES, COUNTS, strict=True)))
    assert list_manifest([str(folder)], Store()).samples == sum(COUNTS)
    assert list_manifest([f"{folder}/shard-00000{{0,2}}.tar"], Store()).samples == COUNTS[0] + COUNTS[2]
    shutil.copytree(folder, tmp_path / "more")
    both = [str(folder), str(tmp_path / "more")]
    assert list_manifest(both, Store()).samples == 2 * sum(COUNTS)
    (tmp_path / "more" / "_stats.json").unlink()
    assert list_manifest(both, Store()).samples is None
    write_stats(folder, {NAMES[0]: 3})
    assert list_manifest([str(folder)], Store()).samples is None
    (folder / "_stats.json").write_text("{")
    assert list_manifest([str(folder)], Store()).samples is None


def test_a_manifest_survives_json(folder):
    manifest = list_manifest([str(folder)], Store())
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def test_a_new_folder_below_the_prefix_leaves_the_keys_of_others_alone(make_shards, tmp_path):
    make_shards(tmp_path / "data" / "x", counts=[3])
    before = list_manifest([str(tmp_path / "data")], Store())
    make_shards(tmp_path / "data" / "y", counts=[3])
    after = list_manifest([str(tmp_path / "data")], Store())
    assert [shard.key for shard in before.shards] == ["x/shard-000000.tar"]
    assert {shard.key for shard in after.shards} >= {shard.key for shard in before.shards}
