"""Configurations made short, and what is said of those that are refused."""

import pytest

from pretrain_merge.config import (
    MergeConfig,
    WindowConfig,
    build,
    parse_views,
)
from pretrain_merge.errors import ConfigError


def views_of(*views, window=10):
    return parse_views(WindowConfig(window=window, views=list(views)))


def message_of(values, schema=MergeConfig):
    with pytest.raises(ConfigError) as caught:
        build(schema, values)
    return str(caught.value)
