"""Results for the eye: heatmaps, curves, contact sheets, HTML pages and terminal tables."""

from glance_ext.report.curves import plot_losses, plot_roc_pro
from glance_ext.report.heatmap import overlay, write_png
from glance_ext.report.html import Block, Paragraph, Picture, Section, Table, write_report
from glance_ext.report.sheet import Tile, contact_sheet
from glance_ext.report.table import format_table

__all__ = [
    "Block",
    "Paragraph",
    "Picture",
    "Section",
    "Table",
    "Tile",
    "contact_sheet",
    "format_table",
    "overlay",
    "plot_losses",
    "plot_roc_pro",
    "write_png",
    "write_report",
]
