from __future__ import annotations

import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from student.serve.errors import Refused
from student.serve.guard import OutsideStrings

STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
texts = st.text(st.sampled_from('"\\[]{},:x é'), max_size=12)
values = st.recursive(texts | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(texts, inner))


def accepts(pieces: list[bytes], most: int) -> bool:
    outside = OutsideStrings(most)
    try:
        for piece in pieces:
            outside.read(piece)
    except Refused:
        return False
    return True


@given(value=values, cuts=st.lists(st.integers(0, 400)), ascii=st.booleans())
def test_json_around_strings_is_counted_to_the_byte_however_it_is_cut(value: object, cuts: list[int], ascii: bool):
    body = json.dumps(value, ensure_ascii=ascii)
    count = len(STRING.sub('""', body))
    encoded = body.encode()
    ends = sorted({min(cut, len(encoded)) for cut in cuts} | {0, len(encoded)})
    pieces = [encoded[start:end] for start, end in itertools.pairwise(ends)]
    assert accepts(pieces, count)
    assert not accepts(pieces, count - 1)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_json_in_other_encodings_is_refused_as_it_would_not_be_counted(encoding: str):
    assert not accepts(['{"a": "\u2222"}'.encode(encoding)], 1000)
