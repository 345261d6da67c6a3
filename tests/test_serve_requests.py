"""Fields of requests and the shape of answers, without a server."""

from __future__ import annotations

import pytest

from rwkv_npu.serve.fields import FieldError, Fields


def test_an_error_names_the_whole_path_of_a_field() -> None:
    options = Fields({"options": {"stop": ["\ud83d"]}}).object("options")
    with pytest.raises(FieldError, match=r"^options\.stop: .*surrogate"):
        options.stops("stop")
