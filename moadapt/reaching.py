"""How a routing reaches a site: that of rows goes to their images, and what does not fit the input is refused."""

from torch import Tensor

from moadapt.call import Call
from moadapt.routing import Routing
from moadapt.sites import Site


def reach(call: Call, site: Site, place: str, routing: Routing, x: Tensor, *, by_sequence: bool) -> Routing:
    """Return a place's routing as the input of one of its sites needs it.

    Args:
        call: The current call.
        site: Where.
        place: Name of the place whose routing it is.
        routing: What was decided there.
        x: Input of the site, (B, T, D) or (N, D); before the language tower an entry an image, tile or patch.
        by_sequence: Whether the routing's rows are those of the call.

    Raises:
        ValueError: The rows of the input cannot be told, or the routing's rows or tokens are not those of the site.
    """
    images = site.tower != "language" or (x.ndim == 3 and len(x) != call.num_rows and bool(call.image_rows))
    if images and routing.per_row and by_sequence:
        routing = _of_images(call, site, routing, x)
    _check_reach(call, site, place, routing, x)
    return routing


def _of_images(call: Call, site: Site, routing: Routing, x: Tensor) -> Routing:
    """Give the images of each row, in a tower before the language tower, the routing of that row.

    Raises:
        ValueError: The rows cannot be told.
    """
    if call.in_step(x):
        return routing
    rows = call.rows_in(x)
    if rows is None:
        raise ValueError(
            f"{site.path} is routed by row, but how its input of shape {tuple(x.shape)} belongs to the {call.num_rows} "
            "rows of the call cannot be told; pass input_ids whose image tokens are those of the images, in order, run "
            "rows one by one, or place experts in the language tower only"
        )
    return routing.of_entries(rows, along_tokens=call.along_tokens(x))


def _check_reach(call: Call, site: Site, place: str, routing: Routing, x: Tensor) -> None:
    """Refuse a routing whose rows or tokens are not those of the site's input."""
    rows, tokens = routing.weights.shape[:2]
    if rows == 1 and tokens == 1:
        return
    if site.form == "experts":  # which get the tokens of all rows in one axis
        x = x.reshape(call.num_rows, -1, x.shape[-1]) if x.numel() // x.shape[-1] % call.num_rows == 0 else x
    lengths = x.shape[1:3] if site.form == "norm" and x.ndim == 4 else x.shape[1:2]  # norms of heads: either may be T
    if (
        (x.ndim == 2 and x.is_floating_point() and (rows > 1 or tokens != len(x)))
        or (x.ndim > 3 and site.form == "sublayer")
        or rows not in (1, len(x))
        or tokens not in (1, len(x) if x.ndim == 2 else 1, *lengths)
    ):
        raise ValueError(
            f"{site.path} gets input of shape {tuple(x.shape)}, but the routing at {place} has {rows} rows and "
            f"{tokens} tokens; use constant weights there or place experts elsewhere"
        )
