"""MOTChallenge: a text file of tracks for each video."""

import os
import tempfile
from collections import Counter
from collections.abc import Iterable

from shardsight.results.formats.geometry import xywh
from shardsight.results.formats.sample import Contents, Report, Sample, safe
from shardsight.results.formats.target import Target
from shardsight.row import digest


def write(samples: Iterable[Sample], contents: Contents, target: Target, report: Report) -> None:
    """Lines `frame,id,left,top,width,height,score,-1,-1,-1`, sorted. frame: frame_index + 1. Coordinates are pixels
    from 0, as in the results. A file has its video's name, and where several have one, a hash of its id."""
    videos: dict[str, str] = {}  # id → a file with its lines, as they come
    with tempfile.TemporaryDirectory() as place:
        for sample in samples:
            if sample.frame_index is None:
                report.leave_out("pictures, as tracks are of videos", sample.id)
                continue
            lines = []
            for found in sample.found:
                if found.track_id is None:
                    report.leave_out("objects without a track", sample.id)
                    continue
                box = ",".join(f"{value:.7g}" for value in xywh(found.box))
                score = 1 if found.score is None else f"{found.score:.6g}"
                lines.append(f"{sample.frame_index + 1},{found.track_id},{box},{score},-1,-1,-1\n")
            path = videos.setdefault(sample.video, os.path.join(place, str(len(videos))))
            with open(path, "a") as file:
                file.writelines(lines)
            report.written.update(frames=1, objects=len(lines))
        stems = {id: safe(os.path.splitext(id.rpartition("/")[2])[0]) for id in videos}
        times = Counter(stems.values())
        for id, path in videos.items():
            name = stems[id] if times[stems[id]] == 1 else f"{stems[id]}-{digest(id)[:8].hex()}"
            with open(path) as file:
                ordered = sorted(file, key=lambda line: tuple(map(int, line.split(",")[:2])))
            target.write(f"{name}.txt", "".join(ordered).encode())
    report.written["videos"] = len(videos)
