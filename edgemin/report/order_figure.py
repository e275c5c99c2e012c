"""Figure 1: the pipeline drawn from the order, as SVG written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from xml.sax.saxutils import escape, quoteattr

from edgemin.report.schema import Run

_FONT = 13.0
_SMALL = 11.0
_CHARACTER = 0.6
"""Width of a character in font sizes: more than a sans-serif's average, so that text fits in every viewer."""
_PAD, _GAP_X, _GAP_Y, _LINE, _MARGIN = 12.0, 44.0, 22.0, 15.0, 24.0
_GREY, _ORANGE = "#7a868f", "#D55E00"
_COLOURS = {"teacher": ("#fdeee3", _ORANGE), "student": ("#e6f0f8", "#0072B2")}
_OTHERS = ("#eef3ee", "#4d7d5b")


@dataclass
class _Node:
    """A model or a stage: its caption, the names of the rows that end here, and what follows it."""

    caption: str
    path: str
    control: bool
    rows: list[str] = field(default_factory=list)
    children: dict[str, _Node] = field(default_factory=dict)
    x: float = field(init=False)
    y: float = field(init=False)
    width: float = field(init=False)

    @property
    def needed(self) -> float:
        texts = [len(self.caption) * _FONT, *(len(row) * _SMALL for row in self.rows)]
        return max(texts) * _CHARACTER + 2 * _PAD

    @property
    def height(self) -> float:
        return 2 * _PAD + _FONT + _LINE * len(self.rows)

    def everything(self) -> Iterator[_Node]:
        """This node and all that follow it."""
        yield self
        for child in self.children.values():
            yield from child.everything()


def pipeline(run: Run) -> str:
    """Draws the models and the stages of a run as trees, left to right.

    Each box is a model or a stage and carries the names of the rows that end there; a control, and what
    only controls need, is dashed. A dotted line leads from what teaches to the stage that learns from it,
    where run.json names the teachers of its nodes.
    """
    trees = _trees(run)
    columns = _columns(trees)
    bottom = _MARGIN
    for tree in trees:
        bottom = _lay(tree, 0, columns, bottom) + _GAP_Y
    nodes = [node for tree in trees for node in tree.everything()]
    width = max(node.x + node.width for node in nodes) + _MARGIN
    height = bottom - _GAP_Y + _MARGIN
    title = f"The pipeline: {_order(run)}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label={quoteattr(title)} '
        'font-family="DejaVu Sans, Helvetica, Arial, sans-serif">',
        f"<title>{escape(title)}</title>",
        f"<defs>{_tip('tip', _GREY)}{_tip('lesson', _ORANGE)}</defs>",
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
    ]
    for node in nodes:
        lines += [_edge(node, child) for child in node.children.values()]
    lessons = _lessons(run, {node.path: node for node in nodes})
    lines += lessons
    legend = ["dotted: teaches"] if lessons else []
    legend += ["dashed: control"] if any(node.control for node in nodes) else []
    lines.append(
        f'<text x="{width - _MARGIN:.1f}" y="{height - 6:.1f}" font-size="10" fill="#666" text-anchor="end">'
        f"{'; '.join(legend)}</text>"
    )
    for tree in trees:
        fill, stroke = _COLOURS.get(tree.caption, _OTHERS)
        for node in tree.everything():
            lines += _boxed(node, fill, stroke, bold=node is tree)
    return "\n".join([*lines, "</svg>", ""])


def _tip(name: str, colour: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0L10 5L0 10z" fill="{colour}"/></marker>'
    )


def _trees(run: Run) -> list[_Node]:
    """One tree per model, the teacher's first; a node is a control where only controls need it."""
    trees: dict[str, _Node] = {}
    paths = [((row.model, *row.stages), row.name, row.control) for row in run.rows]
    known = {path for path, _, _ in paths}
    # Nodes that no row shows (a teacher that the order does not print) are drawn all the same.
    for node in run.nodes:
        path = (node.model, *node.stages)
        if path not in known:
            paths.append((path, "", not any(other[: len(path)] == path for other in known)))
    for path, name, control in sorted(paths, key=lambda item: item[0][0] != "teacher"):
        box = trees.setdefault(path[0], _Node(path[0], path[0], control))
        box.control = box.control and control
        for depth, stage in enumerate(path[1:], 2):
            box = box.children.setdefault(stage, _Node(stage, "/".join(path[:depth]), control))
            box.control = box.control and control
        if name:
            box.rows.append(name)
    return list(trees.values())


def _columns(trees: list[_Node]) -> list[tuple[float, float]]:
    """The left edge and the width of each column: one column per depth, as wide as its widest box."""
    widths: list[float] = []

    def widen(node: _Node, depth: int) -> None:
        if depth == len(widths):
            widths.append(0.0)
        widths[depth] = max(widths[depth], node.needed)
        for child in node.children.values():
            widen(child, depth + 1)

    for tree in trees:
        widen(tree, 0)
    lefts = [_MARGIN + sum(widths[:depth]) + depth * _GAP_X for depth in range(len(widths))]
    return list(zip(lefts, widths, strict=True))


def _lay(node: _Node, depth: int, columns: list[tuple[float, float]], top: float) -> float:
    """Places a node and all below it; returns the bottom of what it placed."""
    (node.x, node.width), node.y = columns[depth], top
    bottom = top + node.height
    below = top
    for child in node.children.values():
        below = _lay(child, depth + 1, columns, below) + _GAP_Y
    return max(bottom, below - _GAP_Y) if node.children else bottom


def _edge(node: _Node, child: _Node) -> str:
    start = (node.x + node.width, node.y + _PAD + _FONT / 2)
    end = (child.x, child.y + _PAD + _FONT / 2)
    middle = child.x - _GAP_X / 2
    dash = ' stroke-dasharray="5 4"' if child.control else ""
    return (
        f'<path d="M{start[0]:.1f} {start[1]:.1f}H{middle:.1f}V{end[1]:.1f}H{end[0] - 1:.1f}" fill="none" '
        f'stroke="{_GREY}" stroke-width="1.4"{dash} marker-end="url(#tip)"/>'
    )


def _lessons(run: Run, nodes: dict[str, _Node]) -> list[str]:
    """Dotted lines from what teaches to what learns from it."""
    lines = []
    for node in run.nodes:
        pupil = nodes.get(node.path)
        for path in node.teachers:
            teacher = nodes.get(path)
            if teacher is None or pupil is None:
                continue
            start = (teacher.x + teacher.width / 2, teacher.y + teacher.height)
            end = (pupil.x + pupil.width / 2, pupil.y)
            middle = end[1] - _GAP_Y / 2
            lines.append(
                f'<path d="M{start[0]:.1f} {start[1]:.1f}V{middle:.1f}H{end[0]:.1f}V{end[1] - 1:.1f}" '
                f'fill="none" stroke="{_ORANGE}" stroke-width="1.4" stroke-dasharray="1.5 3.5" '
                'stroke-linecap="round" marker-end="url(#lesson)"><title>teaches</title></path>'
            )
    return lines


def _boxed(node: _Node, fill: str, stroke: str, *, bold: bool) -> Iterator[str]:
    dash = ' stroke-dasharray="5 4"' if node.control else ""
    yield (
        f'<rect x="{node.x:.1f}" y="{node.y:.1f}" width="{node.width:.1f}" height="{node.height:.1f}" rx="7" '
        f'fill="{"white" if node.control else fill}" stroke="{stroke}" stroke-width="1.4"{dash}/>'
    )
    weight = ' font-weight="bold"' if bold else ""
    y = node.y + _PAD + _FONT * 0.85
    left = f"{node.x + _PAD:.1f}"
    yield f'<text x="{left}" y="{y:.1f}" font-size="{_FONT:g}"{weight}>{escape(node.caption)}</text>'
    for row in node.rows:
        y += _LINE
        yield f'<text x="{left}" y="{y:.1f}" font-size="{_SMALL:g}" fill="#444">{escape(row)}</text>'


def _order(run: Run) -> str:
    return run.order.name or ", ".join(run.order.stages) or run.study
