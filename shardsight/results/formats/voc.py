"""Pascal VOC: Annotations/*.xml, JPEGImages/ and ImageSets/Main/."""

import re
from collections.abc import Iterable
from xml.etree import ElementTree

from shardsight.results.formats.sample import Contents, Found, Report, Sample
from shardsight.results.formats.target import Target

# XML cannot hold these in any form.
_NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write(samples: Iterable[Sample], contents: Contents, target: Target, report: Report) -> None:
    """Boxes are whole pixels counted from 1, the last within the box, as in VOC's own files."""
    sets: dict[str, list[str]] = {"train": [], "val": [], "trainval": []}
    for sample in samples:
        assert sample.picture
        target.put(f"JPEGImages/{sample.file}", sample.picture)
        target.write(f"Annotations/{sample.name}.xml", _annotation(sample, contents.names))
        for name in ("trainval", "val" if contents.validates(sample) else "train"):
            sets[name].append(sample.name)
        report.written.update(pictures=1, objects=len(sample.found))
    for name, lines in sets.items():
        target.write(f"ImageSets/Main/{name}.txt", "".join(f"{line}\n" for line in lines).encode())


def _annotation(sample: Sample, names: list[str]) -> bytes:
    root = ElementTree.Element("annotation")
    _add(root, folder="JPEGImages", filename=sample.file)
    _add(ElementTree.SubElement(root, "source"), database="Shardsight", image=sample.id)
    _add(ElementTree.SubElement(root, "size"), width=sample.width, height=sample.height, depth=3)
    _add(root, segmented=0)
    for found in sample.found:
        thing = ElementTree.SubElement(root, "object")
        _add(thing, name=names[found.category], pose="Unspecified", truncated=0, difficult=0)
        if found.score is not None:
            _add(thing, confidence=f"{found.score:.6g}")
        xmin, ymin, xmax, ymax = pixels(found)
        _add(ElementTree.SubElement(thing, "bndbox"), xmin=xmin, ymin=ymin, xmax=xmax, ymax=ymax)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


def pixels(found: Found) -> tuple[int, int, int, int]:
    """The first and the last pixel of a box, counted from 1."""
    x1, y1, x2, y2 = map(round, found.box)
    return x1 + 1, y1 + 1, max(x1 + 1, x2), max(y1 + 1, y2)


def _add(parent: ElementTree.Element, **children: object) -> None:
    for name, value in children.items():
        ElementTree.SubElement(parent, name).text = _NOT_IN_XML.sub("\ufffd", str(value))
