"""The flags about reading clips, which are the same in every command."""

from __future__ import annotations

import argparse

import pytest

from stadapter.config import ConfigError
from stadapter.training.flags import add_reading_flags, reading_flags
from stadapter.training.options import TrainOptions


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_reading_flags(parser)
    return parser.parse_args(words)


def test_the_flags_default_to_what_a_training_defaults_to() -> None:
    assert TrainOptions(**reading_flags(parse())) == TrainOptions()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-bad-share", "1.5"], r"--max-bad-share 1.5: must be in \[0, 1\]"),
        (["--clip-time-limit", "0"], r"--clip-time-limit 0: must be above 0 seconds"),
        (["--spill-gb", "-1"], r"--local-copies-gb -1: must be at least 0"),
        (["--cache-gb", "-1"], r"--cache-gb -1: must be at least 0"),
    ],
)
def test_a_value_that_cannot_work_is_a_config_error(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reading_flags(parse(*words))
