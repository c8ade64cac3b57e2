import pytest

from moadapt.registry import VIEWS
from moadapt_tasks.boxes import Frame
from moadapt_tasks.boxes.smart_resize import SmartResize
from moadapt_tasks.boxes.views import CentreCrop, PaddedSquare, WholePicture
from tests.tasks.boxes.drawing import SIZES, some_boxes


def test_frames_by_hand() -> None:
    assert WholePicture().frame((640, 480)) == Frame((0, 0, 640, 480), (640, 480))
    assert PaddedSquare().frame((640, 480)) == Frame((0, -80, 640, 560), (640, 640))
    assert PaddedSquare().frame((480, 641)) == Frame((-80, 0, 561, 641), (641, 641))  # 161 of padding, 80 on the left
    assert SmartResize().frame((640, 480)) == Frame((0, 0, 640, 480), (644, 476))
    # 448 by 336, of which 56 are cut left and right: 80 of 640
    assert CentreCrop().frame((640, 480)) == Frame(pytest.approx((80, 0, 560, 480)), (336, 336))
    assert CentreCrop(shortest=256, crop=224).frame((512, 512)) == Frame(pytest.approx((32, 32, 480, 480)), (224, 224))


@pytest.mark.parametrize("name", VIEWS.names())
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_fractions_are_undone_for_all_that_is_seen(name: str, size: tuple[int, int]) -> None:
    frame = VIEWS.get(name)().frame(size)
    left, top, right, bottom = frame.box
    for box in some_boxes(frame.box, ((right - left) / 9, (bottom - top) / 9), 50):
        fractions = frame.fractions(box)
        assert all(0 <= edge <= 1 for edge in fractions)
        assert frame.pixels(fractions) == pytest.approx(box, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CentreCrop(shortest=224, crop=225), "`crop` is 225; give 1 up to `shortest`, which is 224"),
        (lambda: CentreCrop(crop=0), "`crop` is 0"),
        (lambda: SmartResize(factor=0), "`factor` is 0; give at least 1"),
        (lambda: SmartResize(min_pixels=100), "`min_pixels` is 100 and `max_pixels` 12845056; give areas of at least"),
        (lambda: SmartResize(min_pixels=4000, max_pixels=3999), "`min_pixels` is 4000 and `max_pixels` 3999"),
    ],
)
def test_settings_out_of_range_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
