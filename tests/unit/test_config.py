"""Configuration: sources, precedence, and one clear line for what is wrong."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from streamswav.config import Config, CropsSection, dump_config, keys, load_config, parse_config
from streamswav.defaults import FINETUNE_BASE
from streamswav.errors import ConfigError

RECIPES = sorted((Path(__file__).parents[2] / "ops" / "recipes").glob("*.yaml"))


def message(**sources):
    with pytest.raises(ConfigError) as caught:
        load_config(**sources)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("swav: {epsilon: 0.1, temperature: 0.2}\noptimizer: {rate: 1}\n")
    environment = {"STREAMSWAV_SWAV__EPSILON": "0.2", "STREAMSWAV_OPTIMIZER__RATE": "2", "OTHER": "x"}
    config = load_config(file, environment, ["--swav.epsilon", "0.3"])
    assert (config.swav.epsilon, config.swav.temperature, config.optimizer.rate) == (0.3, 0.2, 2.0)


def test_a_dumped_configuration_reads_back_equal(tmp_path):
    config = load_config(arguments=["--stream.urls", "s3://b/x", "--crops.scales", "[[0.2,1],[0.1,0.2]]"])
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config


def test_a_single_url_is_a_list_of_one():
    assert load_config(arguments=["--stream.urls=s3://bucket/p"]).stream.urls == ["s3://bucket/p"]


def test_a_single_url_is_a_list_of_one_in_a_file_too(tmp_path):
    (tmp_path / "c.yaml").write_text("stream: {urls: s3://bucket/p/}\n")
    assert load_config(tmp_path / "c.yaml").stream.urls == ["s3://bucket/p/"]


@pytest.mark.parametrize("text", ["2024", "007", "1.10", "2024-01-01", "2024-99-99", "1_000", "no"])
def test_a_folder_may_have_a_name_that_yaml_takes_for_something_else(text):
    config = load_config(None, {"STREAMSWAV_STORAGE__REGION": text}, ["--run.directory", text])
    assert (config.run.directory, config.storage.region) == (text, text)
    assert load_config(arguments=["--stream.urls", text]).stream.urls == [text]


def test_text_stays_optional_and_quoted_where_yaml_says_so(tmp_path):
    config = load_config(arguments=["--storage.region", "null", "--run.directory", "'7'"])
    assert (config.storage.region, config.run.directory) == (None, "7")
    (tmp_path / "c.yaml").write_text("run: {directory: 2024}\n")
    assert load_config(tmp_path / "c.yaml").run.directory == "2024"


@pytest.mark.parametrize("text", ["1e6", "1.0e+6", "1000000", "1_000_000", "1000000.0"])
def test_whole_numbers_may_be_written_with_an_exponent(text, tmp_path):
    (tmp_path / "c.yaml").write_text(f"training: {{images: {text}}}\n")
    for config in (load_config(tmp_path / "c.yaml"), load_config(arguments=["--training.images", text])):
        assert repr(config.training.images) == "1000000"


@pytest.mark.parametrize("text", ["1e-1", "1.5e0", "1e400", "nan", "1e300", "-1e6", "many"])
def test_no_other_number_is_taken_for_a_whole_one(text):
    assert "training.images" in message(arguments=["--training.images", text])


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--swav.epsilom", "1"], ["swav.epsilom", "1", "swav.epsilon"]),
        (["--crop.sizes", "[1]"], ["crop", "crops"]),
        (["--swav.epsilon", "abc"], ["swav.epsilon", "abc", "number"]),
        (["--swav.epsilon", "0.0001"], ["swav.epsilon", "0.0001", "0.001"]),
        (
            ["--training.batch", "64", "--swav.queue_length", "10"],
            ["swav.queue_length", "10", "shorter", "64"],
        ),
        (["--training.batch", "64", "--stream.columns", "5"], ["stream.columns", "5", "64"]),
        (["--crops.counts", "[2]"], ["crops.counts", "[2]", "2 crops.sizes"]),
        (["--swav.assigned_crops", "[0,9]"], ["swav.assigned_crops", "[0, 9]", "8 crops"]),
        (["--loader.memory", "1000"], ["loader.memory", "did you mean stream.memory?"]),
        (["--stream.passes", "[1, 2]", "--stream.urls", "a"], ["stream.passes", "each of the 1 stream.urls"]),
        (["--stream.follow", "true", "--stream.passes", "2"], ["stream.follow", "by once"]),
        (["--stream.follow", "true", "--optimizer.schedule", "cosine"], ["optimizer.schedule", "no end"]),
        (["--training.batch"], ["training.batch", "no value"]),
        (["stray"], ["stray", "--section.key value"]),
        (["--model.stem", "large"], ["model.stem", "large", "imagenet"]),
    ],
)
def test_what_is_wrong_is_named_with_key_value_and_reason(arguments, parts):
    text = message(arguments=arguments)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("section", "key", "value", "reason"),
    [
        ({"sizes": []}, "sizes", "[]", "at least one"),
        ({"sizes": [96]}, "counts", "[2, 6]", "1 crops.sizes"),
        ({"sizes": [96], "counts": [2]}, "scales", "", "1 crops.sizes"),
        ({"aspect": (2, 1)}, "aspect", "[2.0, 1.0]", "larger"),
        ({"scales": [(0.5, 0.2), (0.1, 0.2)]}, "scales", "[0.5, 0.2]", "larger"),
    ],
)
def test_crops_that_do_not_fit_together_are_refused_however_they_are_given(section, key, value, reason):
    with pytest.raises(ValueError, match=rf"crops\.{key}: .*{reason}"):
        CropsSection(**section)
    with pytest.raises(ConfigError) as caught:
        parse_config({"crops": section})
    assert str(caught.value).startswith(f"crops.{key} = {value}")
    assert reason in caught.value.reason


ONE_CROP = {"sizes": [96], "counts": [1], "scales": [(0.1, 1)]}


def test_swapped_prediction_needs_two_crops_and_finetuning_takes_one():
    with pytest.raises(ConfigError, match=r"crops\.counts = \[1\]: .*at least two"):
        parse_config({"crops": ONE_CROP})
    assert parse_config({"run": {"task": "finetune"}, "crops": ONE_CROP}).crops.counts == [1]
    with pytest.raises(ConfigError, match=r"crops\.counts = \[2, 6\]: .*one crop"):
        parse_config({"run": {"task": "finetune"}})


BASE = {"run": {"task": "finetune"}, "crops": ONE_CROP | {"flip": 0.5}, "optimizer": {"name": "sgd"}}


def test_a_commands_own_defaults_lie_beneath_everything_and_do_not_count_as_given(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("crops: {flip: 0.25}\n")
    config = load_config(file, {}, ["--optimizer.rate", "0.1"], base=BASE)
    assert (config.crops.sizes, config.crops.flip, config.optimizer.name) == ([96], 0.25, "sgd")
    assert config.crops.model_fields_set == {"flip"}
    assert config.optimizer.model_fields_set == {"rate"}
    assert config.run.model_fields_set == set()


def test_a_misspelt_key_in_the_environment_is_named():
    assert "stream.sed" in message(environment={"STREAMSWAV_STREAM__SED": "1"})


def test_a_missing_or_broken_file_is_named(tmp_path):
    assert "no such file" in message(file=tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    assert "not YAML" in message(file=tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "sections" in message(file=tmp_path / "list.yaml")


def test_the_configuration_is_frozen():
    with pytest.raises(ValidationError):
        Config().swav.epsilon = 1


def test_every_key_is_described_and_the_schema_is_json():
    schema = json.loads(json.dumps(Config.model_json_schema()))
    for key in keys():
        section, name = key.split(".")
        model = schema["properties"][section]["$ref"].rpartition("/")[2]
        assert schema["$defs"][model]["properties"][name]["description"], key


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_a_valid_configuration_that_opens_with_its_lab_book_page(recipe):
    supervised = recipe.stem.startswith(("finetune-", "lowshot-"))
    load_config(recipe, base=FINETUNE_BASE if supervised else {})
    head = recipe.read_text().split("\n\n")[0]
    for word in ("Command:", "Hardware:", "Hours:", "Expected:", "Source:"):
        assert word in head, f"{recipe.name} does not say its {word}"


def test_the_papers_recipes_are_there():
    assert {path.stem for path in RECIPES} >= {
        "quickstart",
        "r50-100ep-4096",
        "r50-200ep-4096",
        "r50-400ep-4096",
        "r50-800ep-4096",
        "r50-400ep-2x224",
        "r50-200ep-256",
        "r50-400ep-256",
        "r50-200ep-256-2x160",
        "r50w2-400ep",
        "r50w4-400ep",
        "r50w5-400ep",
    }


@pytest.mark.parametrize("name", ["gradient_accumulation_steps", "accumulate_grad_batches", "accumulation"])
def test_gradient_accumulation_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ConfigError, match=r"another objective.*did you mean training\.micro_batches"):
        load_config(arguments=[f"--training.{name}", "4"])


def test_pieces_of_a_batch_have_no_statistics_of_the_whole_batch() -> None:
    with pytest.raises(ConfigError, match=r"training\.micro_batches = 2: .*topology_invariant"):
        load_config(arguments=["--training.micro_batches", "2", "--training.topology_invariant", "true"])


def test_statistics_of_the_whole_batch_are_not_those_of_groups() -> None:
    with pytest.raises(ConfigError, match=r"training\.sync_batch_norm = 1: .*topology_invariant"):
        load_config(arguments=["--training.sync_batch_norm", "1", "--training.topology_invariant", "true"])


def test_a_section_that_is_a_value_is_told_to_have_keys() -> None:
    with pytest.raises(ConfigError, match=r"^run = 'x': is a section; its keys stand below it"):
        parse_config({"run": "x"})


def test_values_of_the_chart_are_read_as_the_configuration_in_them(tmp_path: Path) -> None:
    file = tmp_path / "my-run.yaml"
    file.write_text("image: {repository: r/x}\nfinetune: {enabled: true}\nconfig: {swav: {epsilon: 0.03}}\n")
    assert load_config(file, {}, []) == parse_config({"swav": {"epsilon": 0.03}})
    file.write_text("config: {swav: {epsilon: 0.03}}\n")
    with pytest.raises(ConfigError, match="config"):
        load_config(file, {}, [])


@pytest.mark.parametrize(
    ("key", "place", "reason"),
    [
        ("storage.endpoint_url", "minio:9000", "http://HOST:PORT"),
        ("stream.urls", "s3://", "names no bucket"),
        ("run.directory", "s3:///", "names no bucket"),
        ("run.directory", "gs://bucket/run", "cannot be written to"),
        ("checkpoint.copy_to", "https://host/run", "cannot be written to"),
    ],
)
def test_places_that_are_none_are_refused_by_their_key(key: str, place: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        load_config(None, {}, [f"--{key}", place])
    assert caught.value.key == key
