"""The page in the browser: draw, see what the network sees, move the dimensions of its capsules.

`viewer` makes the numbers, `messages` reads requests, `guard` turns away what does not come from the page, `app` is
the table of addresses, and `serving` runs it all; `static/` is the page itself, in plain JavaScript and CSS.
"""

from capsnet.demo.serving import serve
from capsnet.demo.viewer import Viewer

__all__ = ["Viewer", "serve"]
