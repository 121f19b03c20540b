"""A figure of matplotlib as PNG bytes, without a display."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def png(figure: "Figure", *, dpi: int = 110) -> bytes:
    """The picture of a figure that has no canvas yet.

    Args:
        dpi: Pixels per inch of the figure's size.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # matplotlib takes a second to import

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
