"""A run's report: one HTML file of numbers, figures and how to repeat the run, which loads nothing from elsewhere."""

from capsnet.report.report import (
    draw_reconstructions,
    drawn_apart,
    reconstruction_figure,
    render,
    result_figures,
    write,
)

__all__ = ["draw_reconstructions", "drawn_apart", "reconstruction_figure", "render", "result_figures", "write"]
