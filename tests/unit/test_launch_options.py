import pytest

from streamswav.errors import ConfigError
from streamswav.launch_options import LaunchOptions, parse_launch

POD = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "run-0.run", "PET_NPROC_PER_NODE": "8"}


def parse(*arguments, **environment):
    return parse_launch([*arguments, "pretrain", "--config", "x.yaml"], environment)[0]


def test_without_flags_the_ranks_of_this_machine_run_alone():
    assert parse() == LaunchOptions()


def test_what_follows_the_command_is_the_command_s():
    options, command = parse_launch(["--nproc-per-node", "2", "pretrain", "--nnodes", "3"], {})
    assert (options.nodes, options.ranks) == (1, "2")
    assert command == ["pretrain", "--nnodes", "3"]


def test_variables_of_torchrun_are_read_and_flags_win():
    options = parse("--nproc-per-node", "4", **POD, PET_MASTER_PORT="1234", PET_RDZV_CONF="timeout=60")
    assert (options.nodes, options.node, options.address, options.port) == (2, 1, "run-0.run", 1234)
    assert (options.ranks, options.join_seconds) == ("4", 60)


def test_what_operators_set_stands_in_for_what_is_missing():
    options = parse(PET_NNODES="3", JOB_COMPLETION_INDEX="2", MASTER_ADDR="a", MASTER_PORT="5")
    assert (options.nodes, options.node, options.address, options.port) == (3, 2, "a", 5)
    assert parse(JOB_COMPLETION_INDEX="2", MASTER_ADDR="a") == LaunchOptions()


def test_an_endpoint_says_where_the_nodes_meet():
    options = parse(PET_NNODES="2:2", PET_NODE_RANK="0", PET_RDZV_ENDPOINT="a.b:77", PET_RDZV_BACKEND="c10d")
    assert (options.address, options.port) == ("a.b", 77)


def test_an_empty_variable_is_none():
    assert parse(PET_NNODES="", MASTER_PORT="") == LaunchOptions()


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        ((), {"PET_NNODES": "two"}, "PET_NNODES = 'two': must be a whole number"),
        ((), {"PET_NNODES": "1:4"}, "PET_NNODES = '1:4': a range"),
        (
            ("--nproc-per-node", "all"),
            {},
            "--nproc-per-node = 'all': must be a whole number from 1 on, or auto",
        ),
        (("--nproc-per-node", "0"), {}, "--nproc-per-node = '0'"),
        (("--node-rank", "1"), {}, "--node-rank = 1: must be below"),
        ((), {**POD, "PET_NODE_RANK": "2"}, "PET_NODE_RANK = 2: must be below the number of nodes (2)"),
        ((), {"PET_NNODES": "2", "MASTER_ADDR": "a"}, "--node-rank: is missing"),
        ((), {"PET_NNODES": "2", "NODE_RANK": "0"}, "--master-addr: is missing"),
        (
            (),
            {**POD, "MASTER_PORT": "70000"},
            "MASTER_PORT = '70000': must be a whole number from 1 to 65535",
        ),
        ((), {**POD, "PET_MAX_RESTARTS": "1"}, "PET_MAX_RESTARTS = 1: with several nodes"),
        ((), {**POD, "PET_RDZV_BACKEND": "etcd"}, "PET_RDZV_BACKEND = 'etcd'"),
        ((), {"PET_RDZV_CONF": "timeout=soon"}, "PET_RDZV_CONF = 'soon'"),
        (("--grace-seconds", "-1"), {}, "--grace-seconds = '-1': must be a number of seconds"),
        (("--retry-code", "0"), {}, "--retry-code = '0'"),
        (("--retry-code", "78"), {}, "--retry-code = '78': means that a restart is in vain"),
    ],
)
def test_a_bad_value_is_refused_by_the_name_it_came_under(arguments, environment, says):
    with pytest.raises(ConfigError) as caught:
        parse(*arguments, **environment)
    assert str(caught.value).startswith(says)


def test_a_launch_of_nothing_says_what_is_missing():
    with pytest.raises(ConfigError, match="streamswav launch pretrain"):
        parse_launch(["--nproc-per-node", "2"], {})
