import html
import re
from typing import Any

import numpy as np
import pytest

from student.config import PruneConfig
from student.prune import plots
from student.prune.importance import Importance
from student.prune.page import PAGE, write_page
from tests.browser import shown
from tests.names import drawn, left_open


def made_up(layers: int, heads: int, neurons: int, width: int) -> Importance:
    rng = np.random.default_rng(0)
    return Importance(
        heads_LH=rng.random((layers, heads)),
        neurons_LF=rng.lognormal(0, 1, (layers, neurons)),
        channels_D=rng.random(width),
        cosine_L=rng.random(layers),
        loss_L=rng.normal(size=layers),
    )


def about(layers: int, heads: int, neurons: int, width: int) -> dict[str, Any]:
    """What prune.json holds where the first of all units were kept."""
    return {
        "source": {"student": "out/large", "content": "0"},
        "prune": {"examples": 1024},
        "sizes": {"width": width, "heads": heads, "groups": heads, "mlp": neurons, "layers": layers},
        "kept": {"layers": list(range(layers)), "channels": list(range(width)), "heads": [list(range(heads))] * layers},
        "parameters": {"source": 7_851_776, "student": 1_962_944},
        "seconds": {"scoring": 20.34, "all": 21.0},
    }


def written(folder: Any, what: dict[str, Any], importance: Importance) -> str:
    write_page(str(folder), what, importance)
    return (folder / PAGE).read_text()


def drawings(page: str) -> list[str]:
    return [drawn(uri) for uri in re.findall(r"data:image/svg\+xml;base64,[^\"]+", page)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of a student cut in every way."""
    return written(tmp_path_factory.mktemp("cut"), about(2, 3, 20, 16), made_up(4, 4, 40, 32))


def test_the_page_says_what_was_cut_from_what(page):
    sizes = ("2 of 4 layers", "16 of 32 channels", "3 of 4 heads", "20 of 40 neurons")
    figures = ("out/large", "7,851,776", "1,962,944", "4.00 ×", "1,024 training examples", "20.3 s", "2407.14679")
    for said in (*sizes, *figures, "The rise of the loss ranks"):
        assert said in page


def test_the_page_needs_nothing_beside_it(page):
    assert len(drawings(page)) == 5
    assert not re.search(r"<script|<link|src=\"(?!data:)", page)


def test_plots_show_where_the_cut_is(page):
    _, _, heads, neurons, channels = drawings(page)
    assert plots.CUT in heads
    assert "20 of 40 kept" in neurons
    assert "16 of 32 kept" in channels


def test_nothing_is_marked_where_nothing_was_cut(tmp_path):
    page = written(tmp_path, about(4, 4, 40, 32), made_up(4, 4, 40, 32))
    assert not any(plots.CUT in drawing for drawing in drawings(page))
    assert "was cut" not in page


def test_the_page_with_every_setting_left_open_and_any_place(tmp_path):
    place = "s3://bucket/$x_<script>alert(1)</script>/[red]"
    open_ = {
        "prune": PruneConfig.model_validate(left_open(PruneConfig)).recipe(),
        "source": {"model": place, "revision": None},
        "parent_run": None,
    }
    page = written(tmp_path, about(2, 3, 20, 16) | open_, made_up(4, 4, 40, 32))
    assert html.escape(place) in page
    assert "<script" not in page


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("zero", [False, True])
def test_a_student_may_have_one_unit_of_each_kind_and_no_activity(tmp_path, zero):
    importance = made_up(1, 1, 1, 1)
    if zero:
        importance = Importance(**{name: np.zeros_like(values) for name, values in vars(importance).items()})
    page = written(tmp_path, about(1, 1, 1, 1), importance)
    assert len(drawings(page)) == 5


def test_importance_of_nothing_is_zero():
    worth = plots.relative(np.array([[0.0, 0.0], [1.0, 3.0]]))
    assert worth.tolist() == [[0, 0], [0.5, 1.5]]


@pytest.mark.parametrize("count", [1, 2, 200, 201, 16384])
def test_curves_have_few_points_and_both_ends(count):
    indices = plots.thinned(count)
    assert len(indices) <= plots.POINTS
    assert indices[0] == 0
    assert indices[-1] == count - 1
    assert (np.diff(indices) > 0).all()


def test_a_browser_shows_it_at_every_width(browser, page, tmp_path):
    shown(browser, page, tmp_path)
