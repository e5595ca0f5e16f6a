"""A YOLO → exports, measured: `python -m jobs.export MODEL --format onnx,openvino --output DIR`; see --help."""

import sys

from shardsight.cli import export

if __name__ == "__main__":
    sys.exit(export())
