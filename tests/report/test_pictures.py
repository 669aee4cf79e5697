"""Figures lose bytes, not pixels."""

import base64
import io

import made_study
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from dense_rlhf.report.pictures import compact, source


def pixels(encoded):
    return Image.open(io.BytesIO(base64.b64decode(encoded.rpartition(",")[2]))).convert("RGBA").tobytes()


@given(arrays("uint8", (9, 7, 4), elements=st.sampled_from([0, 60, 255])))
@settings(deadline=None, max_examples=30)
def test_a_compact_figure_stays_as_it_is_and_its_webp_shows_the_same(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    small = compact(base64.b64encode(buffer.getvalue()).decode())
    assert compact(small) == small
    shown, wanted = pixels(source(small)), pixels(small)
    seen = [i for i in range(0, len(wanted), 4) if wanted[i + 3]]
    assert all(shown[i : i + 4] == wanted[i : i + 4] for i in seen) and shown[3::4] == wanted[3::4]


def test_a_figure_becomes_webp_where_that_is_smaller():
    png = made_study.picture()
    small = source(compact(png))
    assert small.startswith("data:image/webp;base64,") and len(small) < len(png) and pixels(small) == pixels(png)


@pytest.mark.parametrize("png", ["", "iVBORw0KGgo=", "not base64"])
def test_what_is_no_figure_stays(png):
    assert compact(png) == png and source(png) == f"data:image/png;base64,{''.join(png.split())}"
