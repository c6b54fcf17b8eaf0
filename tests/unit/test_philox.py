import numpy as np

from streamswav.crops import uniforms


def test_the_same_key_gives_the_same_numbers_and_another_key_others():
    draws = uniforms(100, "crops", 3, 0, 2**63, 17)
    assert (draws == uniforms(100, "crops", 3, 0, 2**63, 17)).all()
    assert not np.isin(draws, uniforms(100, "crops", 3, 0, 2**63, 18)).any()
    assert not np.isin(draws, uniforms(100, "crops", 3, 0, 17, 2**63)).any()


def test_integers_of_numpy_are_the_same_key_as_pythons():
    assert (uniforms(4, 1, np.int64(2), np.uint64(3)) == uniforms(4, 1, 2, 3)).all()  # type: ignore[arg-type]


def test_parts_of_a_key_do_not_run_together():
    assert uniforms(1, 1, 23) != uniforms(1, 12, 3)
    assert uniforms(1, "1") != uniforms(1, 1)


def test_fewer_numbers_are_a_prefix_of_more():
    assert (uniforms(5, "a") == uniforms(50, "a")[:5]).all()


def test_numbers_are_those_that_earlier_versions_drew():
    expected = [0.48002964712225094, 0.4473788350224901, 0.6050054068736165]
    assert uniforms(3, "crops", 0, 1, 2, 3).tolist() == expected


def test_numbers_are_uniform_over_keys():
    draws = np.array([uniforms(4, "crops", 0, 0, 12345, ordinal) for ordinal in range(5000)])
    assert ((draws >= 0) & (draws < 1)).all()
    for column in draws.T:
        histogram = np.histogram(column, bins=20, range=(0, 1))[0]
        chi_square = ((histogram - 250) ** 2 / 250).sum()
        assert chi_square < 43.8  # 99.9% of 19 degrees of freedom
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.05
