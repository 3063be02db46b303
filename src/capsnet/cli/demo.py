"""The verb `demo`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional

from capsnet.cli.parsing import Range
from capsnet.cli.printing import show
from capsnet.errors import InputError

__all__ = ["Demo"]


@dataclass(frozen=True)
class Demo:
    """Serve a page in the browser: draw, watch the capsules, and change their dimensions.

    Examples:
      capsnet demo
      capsnet demo runs/mine --port 8080 --no-browser
    """

    model: Positional[str] = "capsnet-mnist"
    """Run directory, folder with weights, or the name of weights that ship with the package."""
    framing: Literal["off", "digits"] | None = None
    """digits: find the ink of an image file, scale and centre it as in MNIST; default: that of the network."""
    host: str = "127.0.0.1"
    """Address to serve at; 0.0.0.0 lets other machines use the page too."""
    port: Annotated[int, Range(0, 65535)] = 8000
    """Port to serve at; 0 finds a free one."""
    browser: bool = True
    """Open the page in the browser."""

    def run(self, line: str) -> int:
        """Serve the page until Ctrl-C."""
        try:
            import starlette  # noqa: F401
            import uvicorn  # noqa: F401
        except ImportError:
            raise InputError(
                "demo must have starlette and uvicorn; they are not installed (pip install 'capsnet[demo]')"
            ) from None
        from capsnet import memory
        from capsnet.checkpoints import pretrained
        from capsnet.demo import Viewer, serve

        card = pretrained.load_card(self.model)
        network = pretrained.load(self.model)
        memory.check_demo(network)
        reading = network.preprocessing.with_framing(self.framing)
        viewer = Viewer(network, self.model, reading=reading, threshold=card.threshold)
        try:
            serve(
                viewer,
                host=self.host,
                port=self.port,
                browser=self.browser,
                told=lambda address: show(f"{self.model} at {address} (Ctrl-C ends it)"),
            )
        except KeyboardInterrupt:  # the way to end it
            show("")
        return 0
