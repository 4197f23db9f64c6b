"""The little that pictures share: SVG documents written by hand, readable on light and dark pages."""

from __future__ import annotations

from html import escape

STYLE = """
  svg { font-family: ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; }
  .page { fill: #ffffff } .panel { fill: #f6f8fa }
  text { fill: #1f2328; font-size: 13px } .quiet { fill: #57606a } .small { font-size: 12px }
  .heading { font-size: 19px; font-weight: 600 } .bold { font-weight: 600 }
  .grid { stroke: #d0d7de; stroke-width: 1 } .faint { stroke-opacity: .45 } .axis { stroke: #8c959f }
  path { fill: none; stroke-linejoin: round; stroke-linecap: round }
  .missed { fill: #cf222e } .good { fill: #1a7f37 }
"""
"""Page, text, grid and words of praise or blame."""

DARK_STYLE = """
    .page { fill: #0d1117 } .panel { fill: #161b22 }
    text { fill: #e6edf3 } .quiet { fill: #9198a1 }
    .grid { stroke: #30363d } .axis { stroke: #6e7681 }
    .missed { fill: #ff7b72 } .good { fill: #3fb950 }
"""
"""The same where the reader's scheme is dark."""


def document(width: float, height: float, heading: str, style: str, dark_style: str, parts: list[str]) -> str:
    """A whole SVG document: `parts` on a page of that size, in pixels, with styles besides the shared ones."""
    both = f"{STYLE}{style}  @media (prefers-color-scheme: dark) {{{DARK_STYLE}{dark_style}  }}\n"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(heading)}">'
    )
    title = f"<title>{escape(heading)}</title><style>{both}</style>"
    page = f'<rect class="page" width="{width}" height="{height}" rx="10"/>'
    return "\n".join(part for part in (head, title, page, *parts, "</svg>") if part) + "\n"


def text(x: float, y: float, words: str, css: str = "", anchor: str = "start") -> str:
    """Words at a place; `anchor` is the end of them that stands there."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'
